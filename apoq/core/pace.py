"""How often to send statements that are sent again and again."""

from __future__ import annotations

import math
from typing import Final

MAX_INTERVAL_SECONDS: Final = 0.02
"""Seconds between two statements, at most, and so the longest delay that this causes."""

FORGETTING: Final = 1.001
"""By what the usual time grows with each statement, so that it isn't the shortest time for ever."""


class Pace:
    """Rests after a statement for as long as it took longer than usual.

    While the machine has time to spare, the server responds as fast as it can, and the next statement is sent
    immediately. If statements wait for each other, or for a processor, fewer and larger ones do more. The
    usual time is the shortest one of late. Congestion control in networks infers a queue from delays in the
    same way: Brakmo and Peterson, "TCP Vegas", 1995.
    """

    def __init__(self) -> None:
        self._usual = math.inf

    def interval(self, took: float) -> float:
        """Return the seconds from the start of a statement that took so long to the start of the next one."""
        self._usual = min(took, self._usual * FORGETTING)
        return min(MAX_INTERVAL_SECONDS, 2 * took - self._usual)
