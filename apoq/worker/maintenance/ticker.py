"""Turns the ticks of schedules into tasks."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Final

from psycopg import DatabaseError
from sqlalchemy import Engine

from apoq.client.queue import Queue
from apoq.postgres.connections import execute, is_caused_by_a_row, transaction
from apoq.postgres.loaders import read_time
from apoq.schema.statements.notify import arrays, has_tasks, notify
from apoq.schema.statements.ticks import next_ticks
from apoq.worker import logs
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.claiming.look_times import JITTER, POLLS_PER_SECOND
from apoq.worker.database import WorkerDatabase
from apoq.worker.maintenance.declarations import Declarations
from apoq.worker.maintenance.ticks import Key, Ticked, passed_over, tick
from apoq.worker.service import Service

BATCH_SIZE: Final = 25
"""Schedules that one transaction ticks, at most: so few that tasks begin meanwhile."""

REST_FACTOR: Final = 3
"""After a batch, the ticker rests this many times as long as it took, so that claims don't wait for it."""

PASSED_OVER_SECONDS: Final = 60.0
"""Seconds after which a schedule is tried again that could not be ticked."""

MAX_NAMED: Final = 3
"""How many of many schedules a line of the log names."""


class Ticker(Service):
    """Adds the tasks of the schedules of a worker's queues when they are due.

    Every worker does this, without a leader: a schedule is locked while it is ticked, its task is added in
    the same transaction as its next tick is written, and other workers skip it meanwhile. It sleeps until the
    next tick, but looks every poll interval whether there are new schedules.
    """

    def __init__(
        self,
        database: WorkerDatabase,
        *,
        poll_interval: float,
        release: datetime,
        on_due: Callable[[list[Queue]], None],
    ) -> None:
        """`release` is that of the worker's code; `on_due` is called with the queues that have got tasks."""
        super().__init__("apoq-ticker", database.outage)
        self._database = database
        self._on_due = on_due
        self._schemas = {
            schema: _Schedules(database.engine, schema, database.queues_of(schema), release)
            for schema in database.schemas
        }
        self._interval = max(poll_interval, len(self._schemas) / POLLS_PER_SECOND)
        """Seconds between two looks into a schema in which nothing is due."""
        self._breaker: CircuitBreaker[str | None] = CircuitBreaker(_describe, database.outage)

    def start(self) -> None:
        """Start ticking, and declare the schedules of the code again."""
        if not self.is_alive:
            for schedules in self._schemas.values():
                schedules.declarations.forget()
                schedules.looks_at = 0.0
        super().start()

    def turn(self) -> float | None:
        """Tick what is due, once in each schema; return when to look again."""
        began = time.monotonic()
        for schema in (schemas := self._database.leased_schemas()):
            its = self._schemas[schema]
            if its.looks_at <= began:
                pause = self._interval * random.uniform(1 - JITTER, 1.0)  # noqa: S311
                pause = min(pause, self._breaker.call(schema, schemas, partial(self._turn_in, its), pause))
                its.looks_at = time.monotonic() + pause
        looks = [self._schemas[schema].looks_at for schema in schemas]
        return max(0.0, min(looks) - time.monotonic()) if looks else self._interval

    def _turn_in(self, schedules: _Schedules) -> float:
        """Tick what is due in a schema; return the seconds until the next tick."""
        began = time.monotonic()
        later_in = 0.0
        if not schedules.has_more:
            due_in, later_in = schedules.look()
            if due_in > 0:
                return due_in
        ticked = schedules.tick()
        if ticked.queues:
            self._on_due([queue for queue in schedules.queues if queue.name in ticked.queues])
            its = arrays(has_tasks(schedules.schema, name) for name in ticked.queues)
            execute(self._database.engine, notify(), its)
        # If there was none, another session has locked those that are due.
        return (time.monotonic() - began) * REST_FACTOR if ticked.locked else later_in


class _Schedules:
    """The schedules of a worker's queues in one schema."""

    def __init__(self, engine: Engine, schema: str | None, queues: list[Queue], release: datetime) -> None:
        self.schema = schema
        self.queues = queues
        self.declarations = Declarations(schema, queues, release)
        self._engine = engine
        self._names = [queue.name for queue in queues]
        self.looks_at = 0.0
        """When to look next, by time.monotonic()."""
        self.looks = 0
        """How often it has looked."""
        self.has_more = False
        """Whether the last batch was as large as it could be, so that more schedules may be due."""
        self._at_most = BATCH_SIZE
        self._passed: dict[Key, float] = {}
        """Schedules that could not be ticked, and until when they are left out, by time.monotonic()."""
        self._reported: set[Key] = set()
        """Those that were logged."""
        self._missed = 0
        """How many schedules have missed ticks that were not logged yet."""
        self._named: list[str] = []
        """The names of the first of these."""

    def look(self) -> tuple[float, float]:
        """Return the seconds until the next tick, and until the next one that isn't due yet."""
        self._passed = {key: until for key, until in self._passed.items() if time.monotonic() < until}
        parameters = {"queues": self._names, **passed_over(self._passed)}
        ((now, earliest, later),) = execute(self._engine, next_ticks(self.schema), parameters)
        if self.declarations.write(partial(execute, self._engine), read_time(now)):
            return 0.0, 0.0
        self.looks += 1
        due_in, later_in = (math.inf if at is None else max(0.0, at - now) for at in (earliest, later))
        if due_in > 0:
            self._log_missed()
        return due_in, later_in

    def tick(self) -> Ticked:
        """Tick a batch of schedules in one transaction."""
        ticked = Ticked()
        self.has_more = False
        try:
            with transaction(self._engine) as send:
                tick(
                    send,
                    self.schema,
                    self._names,
                    at_most=self._at_most,
                    ticked=ticked,
                    passed=self._passed,
                )
        except DatabaseError as error:
            if not is_caused_by_a_row(error):
                raise
            ticked.queues.clear()  # nothing was added
            self._refused(ticked, error)
            return ticked
        self.has_more = len(ticked.locked) == self._at_most
        self._at_most = min(BATCH_SIZE, self._at_most * 2)
        for key, problem in ticked.unreadable.items():
            self._pass_over(key, problem)
        self._missed += len(ticked.missed)
        self._named += [key.name for key in ticked.missed[: MAX_NAMED - len(self._named)]]
        return ticked

    def _log_missed(self) -> None:
        """Log the ticks that were missed: once after an outage, however many schedules there are."""
        if self._missed:
            logs.ticks_missed(self._missed, self._named)
            self._missed = 0
            self._named = []

    def _refused(self, ticked: Ticked, error: DatabaseError) -> None:
        """Go on with single schedules, until the bad one is found and passed over."""
        if self._at_most == 1:
            for key in ticked.locked:
                self._pass_over(key, error)
        self._at_most = 1

    def _pass_over(self, key: Key, error: Exception) -> None:
        self._passed[key] = time.monotonic() + PASSED_OVER_SECONDS
        if key not in self._reported:
            self._reported.add(key)
            logs.schedule_passed_over(*key, PASSED_OVER_SECONDS, error)


def _describe(schema: str | None) -> str:
    return "the ticker" if schema is None else f"the ticker of the schema {schema!r}"
