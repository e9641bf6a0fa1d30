"""How far into a queue a worker has claimed."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final

from apoq.statements.arrays import array_text

START: Final = (-math.inf, 0)

SLACK: Final = 0.5
"""Seconds by which a task may be committed later than one that is due after it, and still be seen at once."""

MOST_LEVELS: Final = 64
"""Priorities that are remembered, at most."""


class Position:
    """For each priority, the `process_at` and id behind which the next claim looks.

    Under a transaction that is open for long, anywhere in the database, every task that was ever taken since
    is still in the index, and a claim from the start would walk through all of them. What is behind the
    position, such as a task that was committed late or given back, is found by the next survey, which
    puts the position back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_careful = False
        """Whether the first task that is due was taken from a dead worker, and so is to begin at once."""
        self._be_at({0: START})

    def parameters(self) -> dict[str, str]:
        """Answer the position as `claim` takes it, the highest priority first."""
        return self._written

    def claimed(self, rows: Sequence[Sequence[Any]], *, is_all: bool) -> None:
        """Move behind the rows of a claim, which are in order; `is_all`: it found no more than these."""
        ends = {row[_PRIORITY]: (row[_PROCESS_AT], row[_ID]) for row in rows}
        with self._lock:
            moved = dict(self._levels)
            for priority, (time, id_) in ends.items():
                end = (time - SLACK, 0) if is_all else (time, id_)
                moved[priority] = max(end, moved.get(priority, START))
            self._be_at(moved)

    def surveyed(self, rows: Iterable[Sequence[Any]]) -> float:
        """Take over what a survey has found; answer the seconds until the first task of these is due."""
        found: dict[int, tuple[float, int]] = {}
        due_in = math.inf
        is_careful = False
        for priority, time, id_, now, is_rescued in rows:
            if priority is None:
                # Nothing is pending in those which it doesn't name.
                found = dict.fromkeys(self._levels, (now - SLACK, 0)) | found
                continue
            if time is not None:
                due_in = min(due_in, time - now)
            is_careful |= bool(is_rescued) and time <= now
            if time is None or time > now:
                found[priority] = (now - SLACK, 0)
            else:
                found[priority] = (_not_after(time), id_ - 1)
        with self._lock:
            known = self._levels if len(self._levels) <= MOST_LEVELS else {0: START}
            self._be_at(known | found)
            self.is_careful = is_careful
        return due_in

    def _be_at(self, levels: dict[int, tuple[float, int]]) -> None:
        self._levels = levels
        # Written now, and not when it is asked for: then, a task waits.
        priorities, ends = zip(*sorted(levels.items(), reverse=True), strict=True)
        times, ids = zip(*ends, strict=True)
        self._written = {
            "priorities": array_text(priorities),
            "behind_times": array_text(times),
            "behind_ids": array_text(ids),
        }


_ID, _PRIORITY, _PROCESS_AT = 0, 3, 5
"""Where these are in a row that `claim` answers."""

_MICROSECOND = 1e-6 / 2


def _not_after(time: float) -> float:
    # Far from now, a float doesn't tell microseconds apart.
    return time if math.isinf(time) or math.ulp(time) < _MICROSECOND else math.nextafter(time, -math.inf)
