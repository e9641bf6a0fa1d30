"""Durations as people write them."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_NUMBER: Final = re.compile(r"\d+(\.\d+)?", re.ASCII)
_PART: Final = re.compile(
    r"(\d+(?:\.\d+)?)\s*((?:second|sec|minute|min|hour|day|week)s?|[smhdw])\s*", re.ASCII
)


def read_duration(text: str) -> timedelta:
    """Read 90 (seconds), 90s, 15m, 30 min, 1h30m, 10 minutes or 7 days.

    ValueError if the text is not a duration; OverflowError if it is too long for a timedelta.
    """
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return timedelta(seconds=float(text))
    if not text or _PART.sub("", text):
        raise ValueError(f"{text!r} is not a duration: write 90s, 15m, 2h, 1d, 1w or 1h30m")
    parts = (timedelta(**{_UNITS[unit[0]]: float(count)}) for count, unit in _PART.findall(text))
    return sum(parts, timedelta())
