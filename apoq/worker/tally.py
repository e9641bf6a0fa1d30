"""How many attempts have ended, and how."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NamedTuple

from apoq.states import CANCELLED, FAILED, PENDING
from apoq.worker.attempts import Ended


class Tally(NamedTuple):
    """What a worker is doing, and has done since it was made."""

    running: int = 0
    completed: int = 0
    retried: int = 0
    """Failed attempts whose task is tried again."""
    failed: int = 0
    """Tasks that have failed for good."""
    cancelled: int = 0


class Counter:
    """Counts what has been written, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Tally()

    def count(self, ends: Iterable[Ended]) -> None:
        """Count these."""
        completed = retried = failed = cancelled = 0
        for end in ends:
            if end.settlement is None:
                completed += 1
            elif end.settlement.state == FAILED:
                failed += 1
            elif end.settlement.state == CANCELLED:
                cancelled += 1
            elif end.settlement.state == PENDING and end.settlement.error is not None:
                retried += 1
        with self._lock:
            counts = self._counts
            self._counts = Tally(
                0,
                counts.completed + completed,
                counts.retried + retried,
                counts.failed + failed,
                counts.cancelled + cancelled,
            )

    def tally(self, running: int) -> Tally:
        """Answer the counts until now."""
        return self._counts._replace(running=running)
