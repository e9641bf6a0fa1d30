"""Counts the tasks of a worker for its metrics."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final

from apoq.core.outcomes import ParentFailed
from apoq.events import Events, TaskCancelled, TaskLost, TaskSnoozed, TasksRescued
from apoq.metrics.histogram import Histogram
from apoq.schema.statements.claim import PROCESS_AT, QUEUE, TYPE

Series = tuple[str, str]
"""A queue and a type."""

OTHER: Final = "other"
"""The queue or the type of tasks that the worker knows nothing more of."""

COMPLETED, FAILED, RETRIED, CANCELLED = "completed", "failed", "retried", "cancelled"
SNOOZED, LOST, RESCUED = "snoozed", "lost", "rescued"

OUTCOMES: Final = (COMPLETED, FAILED, RETRIED, CANCELLED, SNOOZED, LOST)
"""The outcomes of attempts. *Rescued* is apart from them, because these tasks were another worker's."""

_series_of: Final = itemgetter(QUEUE, TYPE)
_queue_of: Final = itemgetter(QUEUE)
_type_of: Final = itemgetter(TYPE)


class Runs:
    """The attempts of one queue and type that ran on one thread."""

    __slots__ = ("seconds", "wait_seconds")

    def __init__(self) -> None:
        self.seconds = Histogram()
        self.wait_seconds = Histogram()


class Tally:
    """The numbers of one worker, since it was created.

    The threads that run tasks add to histograms of their own, so they need no lock.
    """

    def __init__(self, *, has_one_queue: bool) -> None:
        """`has_one_queue`: all tasks are of the same queue, which makes them faster to count."""
        self._has_one_queue = has_one_queue
        self.reset()

    def reset(self) -> None:
        """Begin at zero, in a forked child, where another thread may have held the lock at the fork."""
        self._lock = threading.Lock()
        self._outcomes: Counter[tuple[str, Series]] = Counter()
        self._mine = threading.local()
        self._runs: list[dict[Series, Runs]] = []
        self.claims = Histogram()

    def listen(self, events: Events) -> None:
        """Count the outcomes that are rare enough for events."""
        events.on(TaskSnoozed, lambda event: self._add(SNOOZED, (event.queue, event.type)))
        events.on(TaskLost, lambda event: self._add(LOST, (event.queue, event.type)))
        events.on(TaskCancelled, self._cancelled)
        events.on(TasksRescued, lambda event: self._add(RESCUED, (OTHER, OTHER), event.count))

    def ran(self, row: Sequence[Any], seconds: float, number: int) -> None:
        """Count an attempt that has just ended, after so many seconds, as if it were so many."""
        try:
            mine = self._mine.runs
        except AttributeError:
            mine = self._mine.runs = {}
            with self._lock:
                self._runs.append(mine)
        series = row[QUEUE], row[TYPE]
        runs = mine.get(series)
        if runs is None:
            runs = mine[series] = Runs()
        runs.seconds.add(seconds, number)
        runs.wait_seconds.add(max(0.0, time.time() - seconds - row[PROCESS_AT]), number)

    def settled(self, outcome: str, rows: Sequence[Sequence[Any]]) -> None:
        """Count attempts whose outcome is committed."""
        counts = self._counted(rows)
        with self._lock:
            for series, count in counts.items():
                self._outcomes[outcome, series] += count

    def claimed(self, seconds: float) -> None:
        """Count a claim that took so many seconds."""
        self.claims.add(seconds)

    def outcomes(self) -> dict[tuple[str, Series], int]:
        """Return how many attempts had which outcome."""
        with self._lock:
            return dict(self._outcomes)

    def runs(self) -> Iterator[tuple[Series, Runs]]:
        """Yield the attempts of each thread, by queue and type."""
        with self._lock:
            threads = list(self._runs)
        for runs in threads:
            yield from list(runs.items())

    def _cancelled(self, event: TaskCancelled) -> None:
        """Count a task that was cancelled with its parent; those that a worker has claimed are `settled`."""
        if isinstance(event.error, ParentFailed):
            self._add(CANCELLED, (event.queue, event.type))

    def _add(self, outcome: str, series: Series, count: int = 1) -> None:
        with self._lock:
            self._outcomes[outcome, series] += count

    def _counted(self, rows: Sequence[Sequence[Any]]) -> Mapping[Series, int]:
        """Return how many rows there are of each series; in a tenth of the time if there is only one."""
        queue, type_ = series = _series_of(rows[0])
        number = len(rows)
        has_one_type = list(map(_type_of, rows)).count(type_) == number
        if has_one_type and (self._has_one_queue or list(map(_queue_of, rows)).count(queue) == number):
            return {series: number}
        return Counter(map(_series_of, rows))
