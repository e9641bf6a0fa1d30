"""Decides from which queues the next claim takes tasks, and how many from each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from itertools import count
from typing import Final, Generic, TypeVar

MIN_PORTION: Final = 200
"""Tasks that a claim takes from a queue, even if there are many full ones, unless fewer are wanted.

To claim 1,000 tasks from 200 queues would take the server twice as long as from 5.
"""

Q = TypeVar("Q", bound=Hashable)


class QueueRotation(Generic[Q]):
    """The queues that may have due tasks: from `expect` until a claim has found that there are no more.

    The queue into which no claim has looked for the longest time is the first of the next claim. So a queue
    that always has more tasks holds up no other one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Q, None] = {}
        self._full: set[Q] = set()
        """The queues in which the last claim has left tasks."""
        self._looks = count(1)
        self._last_look: dict[Q, int] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def has(self, is_ready: Callable[[Q], bool]) -> bool:
        """Return whether a queue that may have due tasks is ready for a claim."""
        with self._lock:
            return any(map(is_ready, self._waiting))

    def expect(self, queues: Iterable[Q]) -> None:
        """Note that there may be due tasks in these queues."""
        with self._lock:
            for queue in queues:
                self._waiting[queue] = None

    def take(self, wanted: int, is_ready: Callable[[Q], bool]) -> dict[Q, int]:
        """Return how many of the `wanted` tasks to claim from each queue at most, in this order.

        All together, they may be more than are wanted: the last queues then get fewer. Afterwards,
        `looked_into` or `put_back` must be called with each of these queues.
        """
        with self._lock:
            queues = sorted(filter(is_ready, self._waiting), key=lambda queue: self._last_look.get(queue, 0))
            portion = _portion(wanted, len(queues))
            portion_of_full = _portion(wanted, len(self._full.intersection(queues)))
            portions: dict[Q, int] = {}
            left = wanted
            for queue in queues:
                if queue not in self._full:
                    portions[queue] = portion
                elif left > 0:  # otherwise the full queues before it have enough
                    portions[queue] = portion_of_full
                    left -= portion_of_full
            for queue in portions:
                del self._waiting[queue]
        return portions

    def looked_into(self, queue: Q, *, has_more: bool) -> None:
        """Note that a claim has looked into a queue, and whether it has more due tasks."""
        with self._lock:
            self._last_look[queue] = next(self._looks)
            if has_more:
                self._waiting[queue] = None
                self._full.add(queue)
            else:
                self._full.discard(queue)

    def put_back(self, queues: Iterable[Q]) -> None:
        """Note that the claim has not looked into these queues."""
        self.expect(queues)


def _portion(wanted: int, queues: int) -> int:
    return max(1, min(wanted, max(MIN_PORTION, wanted // max(1, queues))))
