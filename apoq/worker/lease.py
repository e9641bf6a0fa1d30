"""Until when what a worker has claimed is its own."""

from __future__ import annotations

import math
import time


class Lease:
    """Renewed by each heartbeat. Where that can't be, it ends here before others may take the tasks."""

    def __init__(self, seconds: float, grace: float) -> None:
        self._seconds = seconds
        self._grace = grace
        self._renewed_at = -math.inf
        self.ends_at = -math.inf
        """By time.monotonic()."""
        self._is_steady_from = math.inf

    @property
    def is_held(self) -> bool:
        """Tell whether tasks may begin, and be completed with ``task.session``."""
        return time.monotonic() < self.ends_at

    @property
    def is_steady(self) -> bool:
        """Tell whether others have had the time to come back, too, after an outage."""
        return time.monotonic() >= self._is_steady_from

    def renew(self, asked_at: float) -> None:
        """Hold it for its whole length from when that was asked for, by time.monotonic()."""
        self._renewed_at = asked_at
        self.ends_at = asked_at + self._seconds
        self._is_steady_from = min(self._is_steady_from, asked_at + self._grace)

    def shorten(self) -> None:
        """Note that the connection is gone, and that the server knows: others wait for the grace only."""
        self.ends_at = min(self.ends_at, self._renewed_at + self._grace)
        self._is_steady_from = math.inf
