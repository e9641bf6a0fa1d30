"""What takes part: how it prepares its tables, adds tasks, works them, and how its counts are read."""

from __future__ import annotations

import asyncio
import operator
import threading
import time
from array import array
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

PADDING = "x" * 80
TYPE = "bench"
"""The type, entrypoint or task name of all tasks that are to be worked."""


def document(number: int) -> dict[str, Any]:
    """Answer a task's data: about 100 bytes, and the number by which it is counted."""
    return {"n": number, "padding": PADDING}


class WorkerStats:
    """Which tasks were handled, and when: in memory that is there from the start, safe between threads."""

    def __init__(self, capacity: int) -> None:
        self.numbers = array("q", bytes(8 * capacity))
        self.started = array("d", bytes(8 * capacity))
        self.took = array("d", bytes(8 * capacity))
        self._capacity = capacity
        self._executor = iter(range(capacity))
        self.record = self._recorder()

    @property
    def count(self) -> int:
        return self._capacity - operator.length_hint(self._executor)

    def _recorder(self) -> Callable[[int], int]:
        numbers, started, slots, monotonic = self.numbers, self.started, self._executor, time.monotonic

        def record(number: int) -> int:
            slot = next(slots)  # atomic, as an append would be
            started[slot] = monotonic()
            numbers[slot] = number
            return slot

        return record


@dataclass
class Work:
    """What a worker is asked to do until `stop` is set."""

    tally: WorkerStats
    stop: threading.Event
    concurrency: int = 4
    kind: str = "plain"
    """plain, coroutine, or session (which inserts a row through the task's session)"""
    seconds: float = 0.0
    """what a task sleeps"""
    prunes: bool = True
    """whether finished tasks are deleted when their time is over, where that is a choice"""

    def handle(self, number: int) -> None:
        slot = self.tally.record(number)
        if self.seconds:
            time.sleep(self.seconds)
            self.tally.took[slot] = time.monotonic() - self.tally.started[slot]

    async def handle_async(self, number: int) -> None:
        slot = self.tally.record(number)
        if self.seconds:
            await asyncio.sleep(self.seconds)
            self.tally.took[slot] = time.monotonic() - self.tally.started[slot]


class Contender:
    """One that takes part. Its methods run in a process of its own; its SQL is for the one that checks."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """The modules without which it is skipped."""
    share: ClassVar[float] = 1.0
    """Of the tasks that others get: one that is slower by orders gets fewer, and a rate is a rate."""
    table: ClassVar[str] = ""
    unfinished: ClassVar[str] = ""
    """SQL: is there a task that is not finished?"""
    finished: ClassVar[str] = ""
    """SQL: how many tasks ended well, at their first attempt."""
    fills: ClassVar[dict[str, str]] = {}
    """SQL that puts `count` rows of a kind into the tables: due, others, future, finished."""

    def __init__(self, url: str, *, notify: bool = False) -> None:
        self.url = url
        self.notify = notify

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run on the event loop that its documentation recommends."""
        return asyncio.run(coroutine)

    def prepare(self) -> None:
        """Create its tables, in an empty database."""

    async def connect(self) -> None:
        """Connect as one that adds tasks."""

    def another(self) -> Self:
        """Answer one for another thread of the same process."""
        return type(self)(self.url, notify=self.notify)

    async def add(self, number: int) -> None:
        """Add one task in a transaction of its own; when this returns, it is committed."""
        raise NotImplementedError

    async def add_many(self, numbers: Iterable[int]) -> None:
        """Add many in one transaction, in the quickest way that is documented."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close what `connect` has opened."""

    def work(self, work: Work) -> None:
        """Work tasks until told to stop."""
        raise NotImplementedError
