"""What the command line's log looks like."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final

import click

FORMATS: Final = ("text", "json")
LEVELS: Final = ("debug", "info", "warning", "error", "critical")

_COLORS: Final = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "bright_red"}
_STANDARD: Final = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def set_up(format_: str | None, level: str | None) -> None:
    """Log to stderr, in this format and from this level on.

    Where neither is asked for and the application has set up a log of its own, that one stays.
    """
    root = logging.getLogger()
    if format_ is None and level is None and root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format_ == "json" else TextFormatter())
    root.handlers[:] = [handler]
    root.setLevel((level or "info").upper())


class TextFormatter(logging.Formatter):
    """Lines for people: on a terminal with less in front of the message, and with colours."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        if self._is_terminal:
            super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        else:
            super().__init__("%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Color what wants to be seen."""
        line = super().formatMessage(record)
        color = _COLORS.get(record.levelname) if self._is_terminal else None
        return line if color is None else click.style(line, fg=color)


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what a caller gave as ``extra`` is in it, too."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record."""
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
        return json.dumps(line, default=str, ensure_ascii=False)
