"""The interface of the contenders: they create their tables, add tasks, run them, and count them by SQL."""

from __future__ import annotations

import asyncio
import operator
import threading
import time
from array import array
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Self

PADDING = "x" * 80
TYPE = "bench"
"""The type, entrypoint or task name of all tasks that workers run."""


def document(number: int) -> dict[str, Any]:
    """Return a task's data: about 100 bytes, with the number by which the task is counted."""
    return {"n": number, "padding": PADDING}


class WorkerStats:
    """The handled tasks and their times, in memory that is allocated at the start; thread-safe."""

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
            slot = next(slots)  # atomic, like an append
            started[slot] = monotonic()
            numbers[slot] = number
            return slot

        return record


@dataclass
class Work:
    """The work of a worker until `stop` is set."""

    stats: WorkerStats
    stop: threading.Event
    concurrency: int = 4
    kind: str = "plain"
    """plain, coroutine, or session (which inserts a row through the task's session)"""
    seconds: float = 0.0
    """The time that a task sleeps."""
    prunes: bool = True
    """Whether finished tasks are deleted after their retention, if the contender has that option."""

    def handle(self, number: int) -> None:
        slot = self.stats.record(number)
        if self.seconds:
            time.sleep(self.seconds)
            self.stats.took[slot] = time.monotonic() - self.stats.started[slot]

    async def handle_async(self, number: int) -> None:
        slot = self.stats.record(number)
        if self.seconds:
            await asyncio.sleep(self.seconds)
            self.stats.took[slot] = time.monotonic() - self.stats.started[slot]


class Contender:
    """A contender. Its methods run in their own process; its SQL is executed by the process that checks."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Modules that it needs; without them, it is skipped."""
    share: ClassVar[float] = 1.0
    """Its share of the others' tasks: a much slower contender gets fewer, because only rates are compared."""
    table: ClassVar[str] = ""
    unfinished: ClassVar[str] = ""
    """SQL that returns whether there is an unfinished task."""
    finished: ClassVar[str] = ""
    """SQL that returns how many tasks succeeded in their first attempt."""
    worker_program: ClassVar[tuple[str, ...]] = ()
    """The command of its worker, if that isn't written in Python; it speaks the protocol of `child.work`."""
    fills: ClassVar[dict[str, str]] = {}
    """SQL that inserts `count` rows of a kind: due, others, future, finished."""

    def __init__(self, url: str, *, notify: bool = False) -> None:
        self.url = url
        self.notify = notify

    @classmethod
    def missing(cls) -> list[str]:
        """Return what it needs and isn't installed."""
        return [module for module in cls.needs if find_spec(module) is None]

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run on the event loop that its documentation recommends."""
        return asyncio.run(coroutine)

    def prepare(self) -> None:
        """Create its tables, in an empty database."""

    async def connect(self) -> None:
        """Connect as one that adds tasks."""

    async def another(self) -> Self:
        """Return a connected contender for another thread of the same process."""
        other = type(self)(self.url, notify=self.notify)
        await other.connect()
        return other

    async def add(self, number: int) -> None:
        """Add one task in its own transaction, which is committed when this returns."""
        raise NotImplementedError

    async def add_many(self, numbers: Iterable[int]) -> None:
        """Add many tasks in one transaction, in the fastest documented way."""
        raise NotImplementedError

    async def close(self) -> None:
        """Close the connections of `connect`."""

    def work(self, work: Work) -> None:
        """Run tasks until `work.stop` is set."""
        raise NotImplementedError
