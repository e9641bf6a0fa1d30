"""Values on the command line: durations, points in time, and JSON."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from click import BadParameter

from apoq.core.durations import read_duration
from apoq.core.retry import seconds

_EXAMPLE: Final = "2031-05-04T12:00Z"


def duration(value: Any) -> timedelta:
    """Read a length of time, such as 90 (seconds), 90s, 15m or 1h30m."""
    if isinstance(value, timedelta):
        return value
    try:
        return read_duration(value)
    except ValueError:
        raise BadParameter(f"{value!r} is no duration: write 90s, 15m, 2h, 1d, 1w or 1h30m.") from None
    except OverflowError:
        raise BadParameter(f"{value} is longer than the calendar.") from None


def age(value: Any) -> timedelta:
    """Read how long ago something was, within the calendar."""
    length = duration(value)
    try:
        datetime.now(UTC) - length
    except OverflowError:
        raise BadParameter(f"{value} ago is before the calendar begins.") from None
    return length


def patience(value: Any) -> float:
    """Read how long to wait, in seconds."""
    try:
        return seconds(float(value), "it")
    except ValueError:
        raise BadParameter(f"{value} is not a number of seconds between zero and a century.") from None


def time(value: Any) -> datetime:
    """Read a point in time in ISO 8601, with a time zone."""
    if isinstance(value, datetime):
        return value
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        raise BadParameter(f"{value!r} is no time: write it as {_EXAMPLE}.") from None
    if at.utcoffset() is None:
        raise BadParameter(
            f"{value!r} has no time zone, so nobody knows when it is: write it as {_EXAMPLE}, or with an "
            "offset such as +02:00 at its end."
        )
    return at


def past_time(value: Any) -> datetime:
    """Read a point in time, or how long ago it was by this machine's clock."""
    if isinstance(value, datetime):
        return value
    if not value[-1:].islower():  # as a unit does, and no time in ISO 8601
        return time(value)
    return datetime.now(UTC) - age(value)


def json_value(value: Any) -> Any:
    """Read JSON as it stands, from a file (``@path``) or stdin (``-``); show where it can't be."""
    if not isinstance(value, str):
        return value
    try:
        text = _contents(value)
    except (OSError, UnicodeDecodeError) as error:
        raise BadParameter(f"{value!r} can't be read: {error}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadParameter(_explain(text, error)) from None
    except (ValueError, RecursionError) as error:
        raise BadParameter(f"this JSON can't be read: {error}") from None


def _contents(value: str) -> str:
    # JSON is UTF-8, whatever encoding the terminal has.
    if value == "-":
        if sys.stdin is None:
            raise OSError("stdin is closed")
        return sys.stdin.buffer.read().decode("utf-8-sig")
    if value.startswith("@"):
        return Path(value[1:]).read_text("utf-8-sig")
    return value


def _explain(text: str, error: json.JSONDecodeError) -> str:
    if not text.strip():
        return "this is empty, and no JSON: leave the data out, or give {}."
    line = text.splitlines()[error.lineno - 1] if error.lineno <= len(text.splitlines()) else ""
    start = max(0, error.colno - 41)
    excerpt = "".join(c if c.isprintable() else " " for c in line[start : start + 78])
    mark = " " * (error.colno - 1 - start) + "^"
    where = f"line {error.lineno}, column {error.colno}"
    return f"this is no JSON, at {where}: {error.msg}\n\n  {excerpt}\n  {mark}"
