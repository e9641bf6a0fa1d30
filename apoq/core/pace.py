"""How long to rest between statements that are sent again and again."""

from __future__ import annotations

import math
from typing import Final

REST_FACTOR: Final = 5
"""A rest takes so many times as long as the statement took longer than usual."""

MAX_REST_SECONDS: Final = 0.02
"""Seconds that a rest takes at most, and so the longest delay that it causes."""

FORGETTING: Final = 1.001
"""By what the usual time grows with each statement, so that it isn't the shortest time for ever."""


class Pace:
    """Rests after a statement in proportion to how much longer than usual it took.

    While the machine has time to spare, the server responds as fast as it can, and the next statement is sent
    immediately. If statements wait for each other, or for a processor, fewer and larger ones do more. The
    usual time is the shortest one of late. Congestion control in networks infers a queue from delays in the
    same way: Brakmo and Peterson, "TCP Vegas", 1995.
    """

    def __init__(self) -> None:
        self._usual = math.inf

    def rest(self, took: float) -> float:
        """Return for how many seconds to rest after a statement that took so many seconds."""
        self._usual = min(took, self._usual * FORGETTING)
        return min(MAX_REST_SECONDS, REST_FACTOR * (took - self._usual))
