"""Checks the progress that a processor reports."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from apoq.core.payload import text_fault
from apoq.core.plain import plain_number
from apoq.errors import glimpse

MAX_NOTE_LENGTH: Final = 500
"""Maximum number of characters of a note."""


class Report(NamedTuple):
    """A progress that was reported."""

    done: float
    total: float | None
    note: str


def report(done: object, total: object, note: object) -> Report:
    """Return a checked report; TypeError or ValueError if a value is invalid."""
    return Report(_amount(done, "done"), None if total is None else _amount(total, "total"), _note(note))


def _amount(value: object, name: str) -> float:
    number = plain_number(value)
    if number is None:
        raise TypeError(f"{name} must be a number, got {glimpse(value)}")
    try:
        amount = float(number)
    except OverflowError:
        amount = math.inf
    if not 0 <= amount < math.inf:  # also rejects NaN
        raise ValueError(f"{name} must be a finite number, zero or more, got {glimpse(value)}")
    return amount


def _note(note: object) -> str:
    if not isinstance(note, str):
        raise TypeError(f"note must be a string, got {glimpse(note)}")
    if len(note) > MAX_NOTE_LENGTH:
        raise ValueError(f"note must have at most {MAX_NOTE_LENGTH} characters, got {len(note):,}")
    if fault := text_fault(note):
        raise ValueError(f"note can't hold {fault}: {glimpse(note)}")
    return note
