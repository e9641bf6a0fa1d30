"""The places that the worker's tasks hold, and those that have become free."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from apoq.client.queue import Queue
from apoq.core.places import Share
from apoq.schema.statements.claim import CLAIM, ID
from apoq.worker.execution.attempt import Claimed

MAX_LOOKED_FOR: Final = 100
"""Tasks of each key or pool that are looked for at once, at most."""

MAX_HANDED_OVER: Final = 256
"""Keys and pools whose places one transaction hands over, at most.

As many as those of a claim: otherwise tasks would be blocked faster than they get places, if several workers
run tasks of the same keys.
"""

Freed = Mapping[Share, int]
"""How many tasks to look for that wait for each key or pool."""


class Places:
    """Remembers which places are free, so that `HandOver` can give them to the next tasks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[int, int], tuple[Queue, tuple[Share, ...]]] = {}
        """By the number of the claim and the id of the task."""
        self._freed: dict[Queue, dict[Share, int]] = {}
        self.met: set[Queue] = set()
        """The queues of which tasks hold places, or wait for some."""
        self.conflicts = 0
        """How often a transaction was repeated because another one had just given away the same place."""
        self.on_free: Callable[[], object] = lambda: None
        """Called when places have become free."""

    def __bool__(self) -> bool:
        """Return whether there are free places to hand over."""
        return bool(self._freed)

    def count(self) -> int:
        """Return of how many keys and pools places may be free."""
        with self._lock:
            return sum(map(len, self._freed.values()))

    def hold(self, number: int, queue: Queue, shares: Mapping[int, tuple[Share, ...]]) -> None:
        """Remember the places of the tasks of a claim."""
        with self._lock:
            for task_id, its in shares.items():
                if its:
                    self._held[number, task_id] = queue, its

    def settled(self, tasks: Iterable[Claimed]) -> None:
        """Note that these tasks have ended, or are no longer the worker's: their places are free."""
        if not self._held:
            return
        found = False
        with self._lock:
            for row in tasks:
                held = self._held.pop((row[CLAIM].number, row[ID]), None)
                if held is not None:
                    found = True
                    queue, shares = held
                    self._add(queue, dict.fromkeys(shares, 1))
        if found:
            self.on_free()

    def expect(self, queue: Queue, shares: Freed) -> None:
        """Note that places of these keys and pools may be free."""
        if shares:
            with self._lock:
                self._add(queue, shares)

    def take(self) -> dict[Queue, dict[Share, int]]:
        """Return the places to hand over now, up to `MAX_HANDED_OVER` of each queue, and forget them."""
        taken: dict[Queue, dict[Share, int]] = {}
        with self._lock:
            for queue, shares in list(self._freed.items()):
                taken[queue] = {share: shares.pop(share) for share in list(shares)[:MAX_HANDED_OVER]}
                if not shares:
                    del self._freed[queue]
        return taken

    def _add(self, queue: Queue, shares: Freed) -> None:
        self.met.add(queue)
        of_queue = self._freed.setdefault(queue, {})
        for share, count in shares.items():
            of_queue[share] = min(MAX_LOOKED_FOR, of_queue.get(share, 0) + count)
