"""Waits for the end of a task, from outside of transactions."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine, Iterator
from datetime import timedelta
from typing import Any, Final, cast

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.client.results import ANY, Kind, Result, result
from apoq.client.session_adapters import SESSION_CLASSES, Caller, through
from apoq.client.task_ids import AnyQueue
from apoq.core.plain import plain_number
from apoq.core.processing import refuse_in_processor
from apoq.core.states import COMPLETED
from apoq.errors import TaskGone, WaitTimeout, glimpse
from apoq.postgres.urls import check_engine

FIRST_PAUSE_SECONDS: Final = 0.05
LONGEST_PAUSE_SECONDS: Final = 1.0
GROWTH: Final = 1.5
"""The first and the longest pause between two looks, and the factor by which a pause exceeds the last one."""

_AUTOCOMMIT: Final = {"isolation_level": "AUTOCOMMIT"}


def wait(
    engine: Engine | AsyncEngine,
    queue: AnyQueue,
    task_id: int,
    timeout: float | timedelta,
    kind: Kind = ANY,
) -> Result[Any] | Coroutine[Any, Any, Result[Any]]:
    """Wait until a task has ended, and return its result; an awaitable of it for an AsyncEngine.

    Each look is a statement in autocommit mode. In between, no connection is held.
    """
    refuse_in_processor(
        "wait",
        "it would hold a slot of the worker until another task ends, which may need that slot. Do the rest "
        "in a task that runs after the other one, or look with queue.result and raise Snooze(…) if it "
        "hasn't ended",
    )
    _check_engine(engine)
    looks = _Looks(queue, task_id, _seconds(timeout), kind)
    return looks.wait_async(engine) if isinstance(engine, AsyncEngine) else looks.wait(engine)


class _Looks:
    """The looks at one task."""

    def __init__(self, queue: AnyQueue, task_id: int, seconds: float, kind: Kind) -> None:
        self._queue = queue
        self._task_id = task_id
        self._seconds = seconds
        self._kind = kind
        self._last: Result[Any] | None = None

    def wait(self, engine: Engine) -> Result[Any]:
        """Look until the task has ended, on the caller's thread."""
        for pause in self._pauses():
            time.sleep(pause)
            with engine.connect() as connection:
                connection.execution_options(**_AUTOCOMMIT)
                found = cast("Result[Any] | None", through(connection, self._look))
            if (ended := self._ended(found)) is not None:
                return ended
        raise self._timed_out()

    async def wait_async(self, engine: AsyncEngine) -> Result[Any]:
        """Look until the task has ended, on the caller's event loop."""
        for pause in self._pauses():
            await asyncio.sleep(pause)
            async with engine.connect() as connection:
                await connection.execution_options(**_AUTOCOMMIT)
                found = await cast("Coroutine[Any, Any, Result[Any] | None]", through(connection, self._look))
            if (ended := self._ended(found)) is not None:
                return ended
        raise self._timed_out()

    def _pauses(self) -> Iterator[float]:
        """Yield how long to sleep before each look; the last one is at the end of the timeout."""
        ends_at = time.monotonic() + self._seconds
        yield 0.0
        pause = FIRST_PAUSE_SECONDS
        while (left := ends_at - time.monotonic()) > 0:
            yield min(pause, left)
            pause = min(pause * GROWTH, LONGEST_PAUSE_SECONDS)

    def _look(self, caller: Caller) -> Result[Any] | None:
        parameters = {"task_id": self._task_id, "from_queue": self._queue.name}
        return result(caller, self._queue.schema, parameters, self._kind)

    def _ended(self, found: Result[Any] | None) -> Result[Any] | None:
        """Return the task's result if it has ended; raise `TaskGone` if it never was there."""
        last, self._last = self._last, found
        if found is not None:
            return found if found.has_ended else None
        if last is None:
            raise TaskGone(self._task_id, self._queue)
        # Workers delete tasks on their completion if they have keep_completed=0.
        return Result(self._task_id, COMPLETED)

    def _timed_out(self) -> WaitTimeout:
        assert self._last is not None
        return WaitTimeout(self._task_id, self._last.state, self._seconds)


def _check_engine(engine: object) -> None:
    if isinstance(engine, SESSION_CLASSES):
        raise TypeError(
            f"wait must be given an Engine or an AsyncEngine, got a {type(engine).__qualname__}: a session "
            "would hold its connection and its transaction all the time, and might never see that the task "
            "has ended. Commit, and pass the engine; to look once, call queue.result(session, task)"
        )
    if not isinstance(engine, Engine | AsyncEngine):
        raise TypeError(f"wait must be given an Engine or an AsyncEngine, got {glimpse(engine)}")
    check_engine(engine)


def _seconds(timeout: float | timedelta) -> float:
    number = plain_number(timeout.total_seconds() if isinstance(timeout, timedelta) else timeout)
    if number is None:
        raise TypeError(f"timeout must be a number of seconds or a timedelta, got {glimpse(timeout)}")
    if not 0 < number <= sys.float_info.max:  # also rejects NaN
        raise ValueError(f"timeout must be positive and finite, got {glimpse(timeout)}")
    return float(number)
