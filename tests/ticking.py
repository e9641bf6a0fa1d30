"""Ticks of schedules at times that a test chooses, without a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from apoq import Schedule
from apoq.worker.maintenance.ticks import Ticked, tick


def tick_at(
    connection: sa.Connection,
    now: datetime,
    *,
    queues: Sequence[str] = ("default",),
    at_most: int = 100,
    before_each: Callable[[], Any] = lambda: None,
) -> Ticked:
    """Tick what is due at a time, in this connection's transaction."""
    ticked = Ticked()

    def execute(statement: sa.Executable, parameters: Any) -> Any:
        before_each()
        return connection.execute(statement, parameters)

    tick(execute, None, queues, at_most=at_most, ticked=ticked, now=now)
    return ticked


def start_at(connection: sa.Connection, at: datetime, **columns: Any) -> None:
    """Let all schedules be due next at a time."""
    connection.execute(sa.update(Schedule).values(next_at=at, **columns))
