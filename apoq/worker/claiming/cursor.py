"""How far into a queue a worker has claimed."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final

from apoq.schema.statements.claim import ID, PRIORITY, PROCESS_AT
from apoq.schema.statements.levels import is_keyed, level_of
from apoq.schema.statements.queues import Levels, levels_text
from apoq.schema.statements.survey import First

START: Final = (-math.inf, 0)

COMMIT_SLACK_SECONDS: Final = 0.5
"""Seconds by which a task may be committed later than one that is due after it, and claims still find it."""

MAX_LEVELS: Final = 64
"""Levels that a claim looks at one by one; if there are more, it looks at the others together."""

FIRST_PASS, LONGEST_PASS = 15.0, 600.0
"""Seconds for which a task is passed over that the server refused to claim: at first, and at most."""

MAX_PASSED_OVER: Final = 1_000
"""Tasks that are passed over at once, at most."""

_LOWEST_TIME: Final = -210_866_803_200.0
"""The first moment of PostgreSQL's calendar, in seconds since 1970; only -infinity is before it."""

_LOWEST_ID: Final = -(2**63)


class ClaimCursor:
    """For each level, the `process_at` and id behind which the next claim looks.

    A level is a priority, of tasks with or without concurrency keys; see `statements.levels`.

    While a transaction is open for long, anywhere in the database, every task that was claimed since it began
    is still in the index, and a claim from the start would walk through all of them. A task that appears
    before the cursor, because it was committed late or released, is found by the next survey, which moves the
    cursor back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_careful = False
        """Whether the first due task was rescued from a dead worker; it must not be prefetched."""
        self.is_limited = False
        """Whether the queue has a limit, or types with one, at the last survey."""
        self.first_due: tuple[First, ...] = ()
        """The tasks with and without keys that were the first to be due at the last survey."""
        self.lower_than: int | None = None
        """If there are more than `MAX_LEVELS`: the lowest one of them, below which a claim looks as well."""
        self._passed_over: dict[int, tuple[float, float]] = {}
        self._be_at({level_of(0, is_keyed=False): START})

    def text(self, *, is_keyed: bool) -> str:
        """Return the positions of tasks with or without keys, as a claim is given them."""
        return self._texts[is_keyed]

    @property
    def levels(self) -> str:
        """All positions, as a survey is given them."""
        return levels_text(self._levels, self.lower_than)

    @property
    def has_keyed(self) -> bool:
        """Whether a survey has found tasks with concurrency keys."""
        return self._has_keyed

    def passed_over(self) -> list[int]:
        """Return the ids of the tasks that are passed over, because the server refused to claim them."""
        if not self._passed_over:
            return []
        now = time.monotonic()
        return [id_ for id_, (until, _) in list(self._passed_over.items()) if until > now]

    def pass_over(self, task_id: int) -> float:
        """Pass over a task for some time, each time longer; return for how many seconds."""
        with self._lock:
            _, before = self._passed_over.pop(task_id, (0.0, FIRST_PASS / 2))
            seconds = min(2 * before, LONGEST_PASS)
            if len(self._passed_over) >= MAX_PASSED_OVER:
                longest_ago = next(iter(self._passed_over))
                del self._passed_over[longest_ago]
            self._passed_over[task_id] = time.monotonic() + seconds, seconds
        return seconds

    def claimed(self, tasks: Sequence[Sequence[Any]], *, is_all: bool) -> None:
        """Move behind the tasks of a claim, which are in order; `is_all`: there were no others."""
        last = dict(zip(map(itemgetter(PRIORITY), tasks), tasks, strict=True))
        ends = {
            level_of(priority, is_keyed=False): (task[PROCESS_AT], task[ID])
            for priority, task in last.items()
        }
        self.move_to(ends, is_all=is_all)

    def move_to(self, ends: Levels, *, is_all: bool) -> None:
        """Move behind these positions, by level; `is_all`: there were no other due tasks."""
        with self._lock:
            moved = dict(self._levels)
            for level, (at, id_) in ends.items():
                if self.lower_than is not None and level < self.lower_than:
                    continue
                end = (_within(at - COMMIT_SLACK_SECONDS), 0) if is_all else (at, id_)
                moved[level] = max(end, moved.get(level, START))
            self._be_at(moved)

    def surveyed(self, firsts: Sequence[First], now: float, *, known: bool = False) -> float:
        """Move to the result of a survey, the highest level first; return the seconds until a task is due.

        `known`: only known levels were surveyed. Otherwise, up to one more than `MAX_LEVELS` were.
        """
        found: dict[int, tuple[float, int]] = {}
        due = [first for first in firsts if first.process_at <= now]
        due_in = min((first.process_at - now for first in firsts), default=math.inf)
        for first in firsts:
            is_due = first.process_at <= now
            found[first.level] = (
                _before(first.process_at, first.id) if is_due else (now - COMMIT_SLACK_SECONDS, 0)
            )
        with self._lock:
            lower_than = self.lower_than if known else None
            if not known and len(found) > MAX_LEVELS:
                *_, lower_than, _last = found
                del found[_last]
            # A level that has no task now may get one at any time, and the next claim must see it.
            for level in self._levels:
                if len(found) < MAX_LEVELS and (lower_than is None or level >= lower_than):
                    found.setdefault(level, (now - COMMIT_SLACK_SECONDS, 0))
            self.lower_than = lower_than
            self._be_at(found)
            self.is_careful = bool(due) and due[0].is_rescued
            self.first_due = tuple({is_keyed(first.level): first for first in reversed(due)}.values())
        # It isn't known which tasks are due in the lower levels.
        return due_in if lower_than is None else min(due_in, 0.0)

    def _be_at(self, levels: dict[int, tuple[float, int]]) -> None:
        self._levels = levels
        # As text now, and not for each claim: at that time, a task waits.
        self._has_keyed = any(map(is_keyed, levels))
        self._texts = {keyed: self._text_of(keyed=keyed) for keyed in (False, True)}

    def _text_of(self, *, keyed: bool) -> str:
        levels = {level: position for level, position in self._levels.items() if is_keyed(level) == keyed}
        return levels_text(levels, self.lower_than)


_MICROSECOND = 1e-6 / 2


def _before(at: float, id_: int) -> tuple[float, int]:
    """Return a position just before this task."""
    # Far from today, a float can't tell microseconds apart. And no id is lower than the lowest.
    if not math.isinf(at) and (math.ulp(at) >= _MICROSECOND or id_ == _LOWEST_ID):
        return _within(at - max(math.ulp(at), 1e-6)), 0
    return _within(at), max(id_ - 1, _LOWEST_ID)


def _within(at: float) -> float:
    """Return a time that the server can read: -infinity if it is before the server's calendar."""
    return at if at >= _LOWEST_TIME else -math.inf
