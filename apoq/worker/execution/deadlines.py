"""Ends attempts that can't be stopped when their time is up."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable

from apoq.worker.execution.attempt import AnyAttempt
from apoq.worker.failures import Outage
from apoq.worker.loop import Loop
from apoq.worker.threads import MissingThreads


class Deadlines:
    """Watches the tasks that run with a timeout, and nothing else: a thread of its own begins with the first.

    Each of them is ended once: by whoever takes it from `_until`, which is one operation, and so needs no
    lock where tasks begin and end.
    """

    def __init__(
        self, on_over: Callable[[AnyAttempt, int], None], outage: Outage, missing: MissingThreads
    ) -> None:
        """`on_over` is called with each attempt whose time is up, and the id of the thread that it is on."""
        self._on_over = on_over
        self._until: dict[AnyAttempt, tuple[float, int]] = {}
        self._over: set[AnyAttempt] = set()
        self._wakes_at = math.inf
        self._loop = Loop("apoq-deadlines", self.turn, outage)
        self._missing = missing
        self._starting = threading.Lock()
        self._lock = threading.Lock()

    def watch(self, attempt: AnyAttempt, limit: float, grace: float = 0.0) -> None:
        """Let an attempt stop in `limit` seconds, and end it if it is still there `grace` seconds later."""
        attempt.ends_at = time.monotonic() + limit
        until = attempt.ends_at + grace
        self._until[attempt] = until, threading.get_ident()
        if until < self._wakes_at:
            try:
                self._start()
            except RuntimeError as error:
                # The attempt goes on; its limit holds as soon as a thread can be started.
                self._missing.add(self._start, error)
            self._loop.wake()

    def forget(self, attempt: AnyAttempt) -> bool:
        """Stop watching an attempt that has ended; return False if its timeout had ended it before."""
        if self._until.pop(attempt, None) is not None:
            return True
        with self._lock:  # until whoever ended it is done with it
            self._over.discard(attempt)
        return False

    def withdraw(self, attempts: Iterable[AnyAttempt]) -> list[AnyAttempt]:
        """Watch these no longer, for they are given back; answer them without those whose time was up."""
        with self._lock:
            return [
                attempt
                for attempt in attempts
                if self._until.pop(attempt, None) is not None or attempt not in self._over
            ]

    def turn(self) -> float | None:
        """End those whose time is up; answer when the next one's will be."""
        # Before looking, so that what begins meanwhile leads to another turn.
        self._wakes_at = math.inf
        watched = self._until.copy()
        now = time.monotonic()
        for attempt, (until, _) in watched.items():
            if until <= now:
                self._end(attempt)
        self._wakes_at = earliest = min(
            (until for until, _ in watched.values() if until > now), default=math.inf
        )
        return None if earliest == math.inf else earliest - time.monotonic()

    def stop(self, timeout: float) -> None:
        """Watch nothing more, and wait so many seconds for what is being ended."""
        self._loop.stop(timeout)
        self._until.clear()
        self._wakes_at = math.inf

    def _start(self) -> None:
        with self._starting:
            self._loop.start()

    def _end(self, attempt: AnyAttempt) -> None:
        with self._lock:
            if found := self._until.pop(attempt, None):
                self._over.add(attempt)
                self._on_over(attempt, found[1])
