"""Values on the command line: durations, times, IDs, and JSON."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from click import BadParameter

from apoq.core.durations import read_duration
from apoq.core.recycling import read_max_memory
from apoq.core.retry import seconds

_DURATIONS: Final = "90s, 30 min, 2h, 1d, 1w or 1h30m"
_TIMES: Final = "2031-05-04, 2031-05-04T12:00 (in your time zone) or 2031-05-04T12:00Z"
_DAY: Final = re.compile(r"\d{8}", re.ASCII)
"""A date without hyphens, which could also be read as a number of seconds."""


FIRST_ID, LAST_ID = -(2**63), 2**63 - 1


def duration(value: Any) -> timedelta:
    """Read a length of time, such as 90 (seconds), 90s, 30 min or 1h30m."""
    if isinstance(value, timedelta):
        return value
    try:
        return read_duration(value)
    except ValueError:
        raise BadParameter(f"must be a length of time such as {_DURATIONS}, got {value!r}.") from None
    except OverflowError:
        raise BadParameter(f"must be within the range of dates, got {value!r}.") from None


def age(value: Any) -> timedelta:
    """Read how long ago something was; within the calendar."""
    length = duration(value)
    try:
        datetime.now(UTC) - length
    except OverflowError:
        raise BadParameter(f"must not be before the year 1, got {value!r} ago.") from None
    return length


def patience(value: Any) -> float:
    """Read how long to wait, and return the seconds."""
    length = value if isinstance(value, int | float) else duration(value).total_seconds()
    try:
        return seconds(length, "it")
    except ValueError:
        raise BadParameter(f"must be between zero and a century, got {value!r}.") from None


def lifetime(value: Any) -> timedelta:
    """Read a length of time that is longer than zero."""
    length = duration(value)
    if not length:
        raise BadParameter(f"must be longer than zero, got {value!r}: leave it out for no limit.")
    return length


def memory(value: Any) -> int:
    """Read how much memory a process may use, such as 512M, and return the bytes."""
    try:
        return read_max_memory(value) or 0
    except ValueError as error:
        raise BadParameter(f"{error}.") from None


def time(value: Any) -> datetime:
    """Read a date, or a time in ISO 8601; without a time zone, it is in the machine's own."""
    if isinstance(value, datetime):
        return value
    try:
        at = datetime.fromisoformat(value.strip())
    except ValueError:
        raise BadParameter(f"must be a time such as {_TIMES}, got {value!r}.") from None
    return _zoned(at, value)


def past_time(value: Any) -> datetime:
    """Read a time, or how long ago it was by this machine's clock: 2h, yesterday, 2031-05-04."""
    if isinstance(value, datetime):
        return value
    text = value.strip().lower()
    if text in {"today", "yesterday"}:
        day = datetime.now().astimezone().date() - timedelta(days=text == "yesterday")
        return _zoned(datetime(day.year, day.month, day.day), value)  # noqa: DTZ001 - `_zoned` adds it
    if not _DAY.fullmatch(text):
        try:
            read_duration(text.removesuffix("ago"))
        except ValueError:
            pass  # it must be a time
        except OverflowError:
            return datetime.now(UTC) - age(value)  # which says what is wrong
        else:
            return datetime.now(UTC) - age(text.removesuffix("ago"))
    try:
        return time(value)
    except BadParameter:
        raise BadParameter(
            f"must be how long ago ({_DURATIONS}), today, yesterday, or a time such as {_TIMES}, "
            f"got {value!r}."
        ) from None


def _zoned(at: datetime, value: str) -> datetime:
    try:
        return at.astimezone() if at.utcoffset() is None else at
    except (OverflowError, ValueError, OSError):  # the operating system's limits
        raise BadParameter(
            f"must have a time zone, such as {value}Z, because the year is so far away."
        ) from None


def identifier(value: Any) -> int:
    """Read a task's ID."""
    try:
        number = int(value)
    except ValueError:
        number = None
    if number is None or not FIRST_ID <= number <= LAST_ID:
        raise BadParameter(f"must be a task's ID, which is a whole number, got {str(value)[:40]!r}.")
    return number


def json_value(value: Any) -> Any:
    """Read JSON from the argument, a file (``@path``) or stdin (``-``); show an invalid place."""
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
    # JSON is UTF-8, in any terminal.
    if value == "-":
        if sys.stdin is None:
            raise OSError("stdin is closed")
        return sys.stdin.buffer.read().decode("utf-8-sig")
    if value.startswith("@"):
        return Path(value[1:]).read_text("utf-8-sig")
    return value


def _explain(text: str, error: json.JSONDecodeError) -> str:
    if not text.strip():
        return "must be JSON, got nothing: omit the data, or give {}."
    line = text.splitlines()[error.lineno - 1] if error.lineno <= len(text.splitlines()) else ""
    start = max(0, error.colno - 41)
    excerpt = "".join(c if c.isprintable() else " " for c in line[start : start + 78])
    mark = " " * (error.colno - 1 - start) + "^"
    where = f"line {error.lineno}, column {error.colno}"
    return f"must be JSON, but is invalid at {where}: {error.msg}\n\n  {excerpt}\n  {mark}"
