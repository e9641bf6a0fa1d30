"""Counters of ended attempts."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from apoq.core import states
from apoq.core.outcomes import Settlement
from apoq.worker.execution.attempt import Claimed
from apoq.worker.observer import Observer


class WorkerStats(NamedTuple):
    """The numbers of a worker's tasks and attempts, from `Worker.stats`.

    Attributes:
        running: Number of tasks that are running now.
        completed: Number of completed tasks since the worker was created.
        retried: Number of failed attempts that are followed by another one.
        failed: Number of tasks that have failed, and are not retried.
        cancelled: Number of tasks that their processor has cancelled, by raising `Cancel`.
    """

    running: int = 0
    completed: int = 0
    retried: int = 0
    failed: int = 0
    cancelled: int = 0


class Counter:
    """Counts committed results. Thread-safe."""

    def __init__(self, observer: Observer | None = None) -> None:
        self._lock = threading.Lock()
        self._observer = observer
        self._counts = dict.fromkeys(WorkerStats._fields, 0)
        self.ended = 0
        """How many attempts have ended."""
        self._calls_at = math.inf
        self._call: Callable[[], object] = lambda: None

    def call_at(self, ended: int, call: Callable[[], object]) -> None:
        """Call this once, when so many attempts have ended."""
        with self._lock:
            self._calls_at, self._call = ended, call

    def count(self, settlement: Settlement | None, rows: Sequence[Claimed]) -> None:
        """Count the attempts of these rows, which have this result; None is a completion."""
        match settlement:
            case None:
                name = "completed"
            case Settlement(state=states.FAILED):
                name = "failed"
            case Settlement(state=states.CANCELLED):
                name = "cancelled"
            case Settlement(state=states.PENDING, error=dict()):
                name = "retried"
            case _:
                return
        with self._lock:
            self._counts[name] += len(rows)
            self.ended += len(rows)
            is_called = self.ended >= self._calls_at
            if is_called:
                self._calls_at = math.inf
        if is_called:
            self._call()
        if self._observer is not None and rows:
            self._observer.settled(name, rows)

    def stats(self, running: int) -> WorkerStats:
        """Return the numbers until now."""
        with self._lock:
            return WorkerStats(**self._counts | {"running": running})
