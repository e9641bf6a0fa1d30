"""The ticks of schedules in the transaction of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, CursorResult, Executable, func, select

from apoq.client.queue import Queue
from apoq.testing.clock import Clock
from apoq.worker.maintenance.declarations import Declarations
from apoq.worker.maintenance.ticks import Ticked, tick

BATCH_SIZE: Final = 100

Execute = Callable[[Queue, Executable, Mapping[str, Any]], CursorResult[Any]]
"""Executes a statement about the tables of a queue."""


def time_before_travel(connection: Connection, clock: Clock) -> datetime:
    """Return the time from which a test has travelled: schedules of the code begin there."""
    now: datetime = clock.at or connection.execute(select(func.clock_timestamp())).scalar_one()
    return now


def tick_schedules(execute: Execute, queues: Iterable[Queue], since: datetime) -> None:
    """Declare the schedules of the queues' typed tasks as of a time, and tick what is due by now."""
    for queue in queues:
        run = partial(execute, queue)
        Declarations(queue.schema, [queue], since).write(run, since)
        has_more = True
        while has_more:
            ticked = Ticked()
            tick(run, queue.schema, [queue.name], at_most=BATCH_SIZE, ticked=ticked)
            for error in ticked.unreadable.values():
                raise error
            has_more = bool(ticked.locked)
