"""Databases that tests take, made while the ones before them run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from sqlalchemy import URL

AHEAD: Final = 2
"""So many stand ready: one is made in less time than most tests take."""


class Clones:
    """Clones of one database, made ahead and dropped afterwards, both on a thread beside the tests."""

    def __init__(self, create: Callable[[], URL], drop: Callable[[URL], None]) -> None:
        self._create, self._drop = create, drop
        self._beside = ThreadPoolExecutor(1)
        self._ready = deque(self._beside.submit(create) for _ in range(AHEAD))
        self._dropped: list[Future[None]] = []

    def take(self) -> URL:
        """Answer one that nobody has used."""
        self._ready.append(self._beside.submit(self._create))
        return self._ready.popleft().result()

    def give_back(self, url: URL) -> None:
        """Drop one that was taken."""
        self._dropped.append(self._beside.submit(self._drop, url))

    def close(self) -> None:
        """Drop those that nobody has taken; raise what the others could not be dropped for."""
        for ready in self._ready:
            self.give_back(ready.result())
        self._beside.shutdown()
        for dropped in self._dropped:
            dropped.result()
