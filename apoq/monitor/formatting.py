"""How numbers, times and a user's own texts are written for people."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final
from unicodedata import category

from apoq.schema.statements.count import COUNTED

_JOINER: Final = "\N{ZERO WIDTH JOINER}"

_LENGTHS: Final = ((86_400 * 2, 86_400, "d"), (3_600 * 2, 3_600, "h"), (120, 60, "min"), (0, 1, "s"))


def length(seconds: float) -> str:
    """Write a length of time in its largest suitable unit, such as ``3 min``."""
    for least, unit, name in _LENGTHS:
        if seconds >= least:
            return f"{seconds / unit:,.0f} {name}"
    return "0 s"


def ago(at: datetime | None, now: datetime) -> str:
    """Write how long ago something was, or in what time it will be; nothing if there is no such time."""
    if at is None:
        return ""
    seconds = (now - at).total_seconds()
    return f"{length(seconds)} ago" if seconds >= 0 else f"in {length(-seconds)}"


def local(at: datetime) -> str:
    """Write a time in this machine's time zone, with the zone's name."""
    try:
        return at.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    except (OverflowError, ValueError, OSError):  # beyond the operating system's calendar
        return at.isoformat(" ", "seconds")


def number(count: int, bound: int = COUNTED, *, total: int | None = None) -> str:
    """Write a number that was counted up to one more than the bound.

    `total` is the sum of the numbers that were counted together with it, up to the same bound.
    """
    if count > bound:
        return f"{bound:,}+"
    return f"{count:,}" if total is None or total <= bound else f"{count:,}+"


def size(count: float) -> str:
    """Write a number of bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 10_000:  # noqa: PLR2004 - four digits can be read at a glance
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.0f} TB"


def tasks(count: int, bound: int = 10**9) -> str:
    """Write a number of tasks."""
    return "1 task" if count == 1 else f"{number(count, bound)} tasks"


def clean(text: Any) -> str:
    """Write a text on one line, without characters that a terminal would obey."""
    return "".join(c if is_printable(c) else " " if c in "\n\t" else "�" for c in str(text))


def is_printable(character: str) -> bool:
    """Return whether a character can be shown: also a space of any width, and the joiner of emojis."""
    return character.isprintable() or character == _JOINER or category(character) == "Zs"
