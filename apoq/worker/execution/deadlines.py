"""Ends attempts that can't be stopped when their time is up."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable

from apoq.worker.execution.attempt import AnyAttempt
from apoq.worker.failures import Outage
from apoq.worker.service import Service
from apoq.worker.threads import MissingThreads


class Deadlines(Service):
    """Watches the tasks that run with a timeout; its thread is started with the first of them.

    Each of them is ended once, by the thread that takes it from `_until`: that is one operation, so no lock
    is needed when tasks begin and end.
    """

    def __init__(
        self, on_over: Callable[[AnyAttempt, int], None], outage: Outage, missing: MissingThreads
    ) -> None:
        """`on_over` is called with each attempt whose time is up, and the id of the thread that it is on."""
        super().__init__("apoq-deadlines", outage)
        self._on_over = on_over
        self._until: dict[AnyAttempt, tuple[float, int]] = {}
        self._over: set[AnyAttempt] = set()
        self._wakes_at = math.inf
        self._missing = missing
        self._starting = threading.Lock()
        self._lock = threading.Lock()

    def watch(self, attempt: AnyAttempt, limit: float, grace: float = 0.0) -> None:
        """Tell an attempt to stop in `limit` seconds, and end it if it still runs `grace` seconds later."""
        attempt.ends_at = time.monotonic() + limit
        until = attempt.ends_at + grace
        self._until[attempt] = until, threading.get_ident()
        if until < self._wakes_at:
            try:
                self.start()
            except RuntimeError as error:
                # The attempt goes on; its limit holds as soon as a thread can be started.
                self._missing.add(self.start, error)
            self.wake()

    def forget(self, attempt: AnyAttempt) -> bool:
        """Stop watching an attempt that has ended; return False if its timeout had ended it before."""
        if self._until.pop(attempt, None) is not None:
            return True
        with self._lock:  # until `_end` has finished with it
            self._over.discard(attempt)
        return False

    def withdraw(self, attempts: Iterable[AnyAttempt]) -> list[AnyAttempt]:
        """Stop watching these before they are released; return those whose time was not up."""
        with self._lock:
            return [
                attempt
                for attempt in attempts
                if self._until.pop(attempt, None) is not None or attempt not in self._over
            ]

    def turn(self) -> float | None:
        """End those whose time is up; return when the next one's will be."""
        # Before looking, so that an attempt that begins meanwhile leads to another turn.
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

    def start(self) -> None:
        """Start watching; attempts on several threads may call this at the same time."""
        with self._starting:
            super().start()

    def stop(self, timeout: float | None = None) -> bool:
        """Watch nothing more, and wait for attempts that are just being ended."""
        has_ended = super().stop(timeout)
        self._until.clear()
        self._wakes_at = math.inf
        return has_ended

    def _end(self, attempt: AnyAttempt) -> None:
        with self._lock:
            if found := self._until.pop(attempt, None):
                self._over.add(attempt)
                self._on_over(attempt, found[1])
