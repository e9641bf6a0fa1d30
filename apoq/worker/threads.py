"""Threads that a worker needs, and that could not be started."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from apoq.worker.failures import Failures, Outage

THREAD_RETRY_SECONDS: Final = 2.0
"""Seconds after which it is tried again to start a thread."""


class MissingThreads:
    """Threads that could not be started, for example because the system allows no more.

    That is logged once, and tried again until it succeeds.
    """

    def __init__(self, outage: Outage) -> None:
        self._lock = threading.Lock()
        self._failures = Failures("starting a thread", outage)
        self._starts: set[Callable[[], None]] = set()

    def __bool__(self) -> bool:
        return bool(self._starts)

    def add(self, start: Callable[[], None], error: Exception) -> None:
        """Note that `start` raised this error: `retry` calls it again."""
        with self._lock:
            self._starts.add(start)
            self._failures.failed(error)

    def retry(self) -> None:
        """Try to start what is missing."""
        for start in list(self._starts):
            try:
                start()
            except Exception as error:  # noqa: BLE001 - it is tried again
                self.add(start, error)
            else:
                with self._lock:
                    self._starts.discard(start)
                    if not self._starts:
                        self._failures.recovered()

    def clear(self) -> None:
        """Forget what is missing: the worker has stopped."""
        with self._lock:
            self._starts.clear()
            self._failures.forget()
