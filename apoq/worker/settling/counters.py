"""How many attempts have ended, and how."""

from __future__ import annotations

import threading
from typing import NamedTuple

from apoq.core import states
from apoq.core.outcomes import Settlement


class WorkerStats(NamedTuple):
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
        self._counts = dict.fromkeys(WorkerStats._fields, 0)

    def count(self, settlement: Settlement | None, number: int = 1) -> None:
        """Count attempts that ended so; None is a completion."""
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
            self._counts[name] += number

    def stats(self, running: int) -> WorkerStats:
        """Answer the counts until now."""
        with self._lock:
            return WorkerStats(**self._counts | {"running": running})
