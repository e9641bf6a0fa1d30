"""The format of the command line's log."""

from __future__ import annotations

import logging
import sys
from copy import copy
from datetime import UTC, datetime
from typing import Any, Final

import click

from apoq.cli.output import json_text
from apoq.cli.streams import has_colors, is_terminal
from apoq.monitor.formatting import clean

FORMATS: Final = ("text", "json")
LEVELS: Final = ("debug", "info", "warning", "error", "critical")

_COLORS: Final = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "bright_red"}
_STANDARD: Final = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def set_up(format_: str | None, level: str | None) -> None:
    """Log to stderr, in this format and from this level.

    If neither is given and the application has configured logging, its configuration stays.
    """
    root = logging.getLogger()
    if format_ is None and level is None and root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format_ == "json" else TextFormatter())
    root.handlers[:] = [handler]
    root.setLevel((level or "info").upper())


class TextFormatter(logging.Formatter):
    """Lines for people; on a terminal, with a shorter prefix and with colors."""

    def __init__(self) -> None:
        self._has_colors = has_colors(sys.stderr)
        if is_terminal(sys.stderr):
            super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        else:
            super().__init__("%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line, followed by an indented traceback if there is one."""
        shown = copy(record)
        shown.exc_text = None  # another handler may have set it, unindented
        return super().format(shown)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return an indented traceback."""
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """Return an indented stack."""
        return _indented(super().formatStack(stack_info))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line, in color if it is a warning or an error."""
        # A message may quote foreign text: a task's type, or an error.
        record.message = clean(record.message)
        line = super().formatMessage(record)
        color = _COLORS.get(record.levelname) if self._has_colors else None
        return line if color is None else click.style(line, fg=color)


class JsonFormatter(logging.Formatter):
    """One JSON object per line, including what a caller gave as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD | {*line}}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json_text(line, default=str)


def _indented(text: str) -> str:
    return "\n".join(f"  {clean(line)}" for line in text.splitlines())
