"""The standard streams, which may be closed, full, without a reader, or in a limited encoding."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import click

NARROWEST: Final = 20
"""The least number of columns that a terminal is assumed to have."""

_PLAIN: Final = {"✓": "+", "✗": "x", "→": "->", "…": "...", "·": ".", "─": "-", "�": "?"} | dict.fromkeys(
    "🐘📥👷💀🔁✨💸", "*"
)
"""Replacements for our own signs if an encoding lacks them."""

_ERRORS: Final = "apoq.plain"


def is_terminal(stream: Any) -> bool:
    """Return whether a standard stream is a terminal; it is None if it was closed."""
    return stream is not None and stream.isatty()


def has_colors(stream: Any) -> bool:
    """Return whether a stream is a terminal on which colors are wanted."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def is_narrow(stream: Any) -> bool:
    """Return whether a stream's encoding lacks characters."""
    return not (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


@contextmanager
def writing() -> Iterator[None]:
    """Replace characters that the streams lack; end the command if stdout is full or has no reader."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS)
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        _give_up_output()
        if error.errno == errno.EPIPE:
            raise click.exceptions.Exit(1) from None
        raise click.ClickException(str(error)) from error


def _give_up_output() -> None:
    """Redirect stdout to nowhere, because Python would flush it again at its end."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write_plainly(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return "".join(
        _PLAIN.get(each) or each.encode("ascii", "backslashreplace").decode() for each in characters
    ), error.end


codecs.register_error(_ERRORS, _write_plainly)
