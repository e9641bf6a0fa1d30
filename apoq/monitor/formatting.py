"""How numbers, times and a user's own words are written for people."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from apoq.schema.statements.count import COUNTED

_LENGTHS: Final = ((86_400 * 2, 86_400, "d"), (3_600 * 2, 3_600, "h"), (120, 60, "min"), (0, 1, "s"))


def length(seconds: float) -> str:
    """Write a length of time in its largest sensible unit, as in ``3 min``."""
    for least, unit, name in _LENGTHS:
        if seconds >= least:
            return f"{seconds / unit:,.0f} {name}"
    return "0 s"


def ago(at: datetime | None, now: datetime) -> str:
    """Write when something was, or will be, as seen from now; nothing where it wasn't."""
    if at is None:
        return ""
    seconds = (now - at).total_seconds()
    return f"{length(seconds)} ago" if seconds >= 0 else f"in {length(-seconds)}"


def number(count: int, bound: int = COUNTED) -> str:
    """Write a number that was counted up to one more than the bound."""
    return f"{count:,}" if count <= bound else f"{bound:,}+"


def size(count: float) -> str:
    """Write a number of bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 10_000:  # noqa: PLR2004 - four digits are read at a glance
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.0f} TB"


def tasks(count: int, bound: int = 10**9) -> str:
    """Write how many tasks."""
    return "1 task" if count == 1 else f"{number(count, bound)} tasks"


def clean(text: Any) -> str:
    """Write somebody's text on a line, with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "�" for c in str(text))
