"""Until when a worker's claims in one schema are its own."""

from __future__ import annotations

import math
import time


class Lease:
    """Renewed by each heartbeat. If that fails, it ends here before other workers may take the tasks."""

    def __init__(self, seconds: float, grace: float) -> None:
        self._seconds = seconds
        self._grace = grace
        self._renewed_at = -math.inf
        self._stretch = 1.0
        self.ends_at = -math.inf
        """By time.monotonic()."""

    @property
    def is_held(self) -> bool:
        """Whether tasks may begin, and be completed with ``task.session``."""
        return time.monotonic() < self.ends_at

    def renew(self, asked_at: float, stretch: float = 1.0) -> None:
        """Hold it from when that was asked for, by time.monotonic(), for `stretch` times its usual length."""
        self._renewed_at, self._stretch = asked_at, stretch
        self.ends_at = asked_at + self._seconds * stretch

    def shorten(self) -> None:
        """Note that the connection is gone and that the server knows: others wait for the grace only."""
        self.ends_at = min(self.ends_at, self._renewed_at + self._grace * self._stretch)
