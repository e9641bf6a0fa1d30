"""Deletes tasks that ended long ago, and ends those that have expired."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Final, NamedTuple

from psycopg import DatabaseError
from sqlalchemy import Delete, Engine, Select, Update

from apoq.client.queue import Queue
from apoq.core.outcomes import EXPIRED
from apoq.core.payload import encode
from apoq.core.retention import Keep, keep
from apoq.core.states import COMPLETED, FAILED
from apoq.postgres.connections import execute, is_caused_by_a_row
from apoq.schema.statements.expire import expire
from apoq.schema.statements.prune import (
    oldest_kept_completed,
    oldest_kept_failed,
    prune_completed,
    prune_completed_before,
    prune_failed,
    prune_failed_before,
)
from apoq.schema.statements.throttles import prune_windows
from apoq.worker import logs
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.database import WorkerDatabase
from apoq.worker.maintenance.orphans import Orphans
from apoq.worker.narrowing import Narrowing
from apoq.worker.service import Service

BATCH_SIZE: Final = 1_000
"""Rows that one statement deletes at most."""

DATABASE_SHARE: Final = 0.05
"""The share of its time that the pruner spends in the database while there is something to delete."""

PRUNE_TIMEOUT_SECONDS: Final = 60.0
"""Seconds that one such statement may take."""

PRUNE_INTERVAL_SECONDS: Final = 60.0
"""Seconds after which it looks again."""


class Rule:
    """Which rows are deleted or ended, and how many at once."""

    def __init__(self, name: str, statement: Delete | Update, parameters: Mapping[str, Any]) -> None:
        self.deleted = 0
        self._name = name
        self._statement = statement
        self._parameters = dict(parameters)
        self._narrowing = Narrowing(BATCH_SIZE)
        self._has_told = False

    def __str__(self) -> str:
        return self._name

    @property
    def kept(self) -> int:
        """How many the last pass has left, because they can't be deleted."""
        return self._narrowing.kept

    def prune(self, engine: Engine) -> bool:
        """Delete or end a batch; return whether there may be more."""
        try:
            found = execute(
                engine,
                self._statement,
                self._parameters | self._narrowing.parameters,
                timeout=PRUNE_TIMEOUT_SECONDS,
            )
        except DatabaseError as error:
            if not is_caused_by_a_row(error):
                raise
            # Such as a task to which a row of the application's points.
            if self._narrowing.refused() and not self._has_told:
                self._has_told = True
                logs.pruning_refused(error)
            return True
        self.deleted += found.rowcount
        return self._narrowing.written(found.rowcount)


class Excess(Rule):
    """Which of a queue's tasks are deleted because there are more than should be kept."""

    def __init__(
        self, name: str, statement: Delete, boundary: Select[Any], from_queue: str, at_most: int
    ) -> None:
        """`boundary` returns when the oldest task ended that is kept."""
        super().__init__(name, statement, {"from_queue": from_queue})
        self._boundary = boundary
        self._at_most = at_most
        self._has_more = False

    def prune(self, engine: Engine) -> bool:
        """Delete a batch; return whether there may be more."""
        if not self._has_more:
            # Once for all batches of a pass, because it reads as many index entries as tasks are kept. By
            # their time, not their number: other workers delete the same tasks, and no others.
            parameters = {"from_queue": self._parameters["from_queue"], "number": self._at_most}
            found = execute(engine, self._boundary, parameters, timeout=PRUNE_TIMEOUT_SECONDS).fetchall()
            if not found:
                return False
            ((self._parameters["before"],),) = found
        self._has_more = super().prune(engine)
        return self._has_more


def retention(name: str, prune: Delete, from_queue: str, keep: timedelta) -> Rule:
    """Return the rule that deletes a queue's tasks a time after they have ended."""
    return Rule(name, prune, {"from_queue": from_queue, "keep": keep})


def expiry(schema: str | None, queues: Iterable[Queue]) -> Rule:
    """Return the rule that ends the expired tasks of the queues in a schema."""
    names = [queue.name for queue in queues if queue.schema == schema]
    where = "" if schema is None else f" of the schema {schema!r}"
    parameters = {"in_queues": names, "reason": encode(EXPIRED)}
    return Rule(f"ending the expired tasks{where}", expire(schema), parameters)


def windows(schema: str | None) -> Rule:
    """Return the rule that deletes the windows of throttled tasks that are over."""
    where = "" if schema is None else f" of the schema {schema!r}"
    return Rule(f"the pruning of throttles{where}", prune_windows(schema), {})


class Pruner(Service):
    """Deletes the ended tasks of a worker's queues after their retention, in small batches.

    It also ends expired tasks that no worker claims, and deletes the windows of throttled tasks.
    """

    def __init__(
        self,
        database: WorkerDatabase,
        *,
        keep_completed: timedelta | Keep | None,
        keep_failed: timedelta | Keep | None,
    ) -> None:
        super().__init__("apoq-pruner", database.outage)
        self._database = database
        self._breaker: CircuitBreaker[Rule] = CircuitBreaker(str, database.outage)
        self._orphans = Orphans(database.engine)
        self._orphans_breaker: CircuitBreaker[str | None] = CircuitBreaker(_describe, database.outage)
        self._rules = [
            (database.leases[queue.schema], rule)
            for queue in database.queues
            for rule in (
                *_rules(queue, keep(keep_completed), _OF_COMPLETED),
                *_rules(queue, keep(keep_failed), _OF_FAILED),
            )
        ]
        for schema, lease in database.leases.items():
            self._rules += [(lease, expiry(schema, database.queues)), (lease, windows(schema))]

    def turn(self) -> float | None:
        """Delete a batch of each kind; return when to go on."""
        began = time.monotonic()
        if self.prune():
            return (time.monotonic() - began) * (1 / DATABASE_SHARE - 1)
        self._delete_orphans()
        return PRUNE_INTERVAL_SECONDS * random.uniform(0.9, 1.1)  # noqa: S311 - workers needn't prune together

    def _delete_orphans(self) -> None:
        schemas = self._database.leased_schemas()
        for schema in schemas:
            delete = partial(self._orphans.delete, schema)
            self._orphans_breaker.call(schema, schemas, delete, None)

    def prune(self) -> bool:
        """Delete a batch of each kind; return whether there may be more."""
        more = False
        rules = [rule for lease, rule in self._rules if lease.is_held]
        for rule in rules:
            more |= self._breaker.call(rule, rules, partial(rule.prune, self._database.engine), False)
        return more


class _Statements(NamedTuple):
    state: str
    old: Callable[[str | None], Delete]
    before: Callable[[str | None], Delete]
    boundary: Callable[[str | None], Select[Any]]


_OF_COMPLETED: Final = _Statements(COMPLETED, prune_completed, prune_completed_before, oldest_kept_completed)
_OF_FAILED: Final = _Statements(FAILED, prune_failed, prune_failed_before, oldest_kept_failed)


def _rules(queue: Queue, keep: Keep, statements: _Statements) -> Iterator[Rule]:
    schema = queue.schema
    name = f"the pruning of {statements.state} tasks from {queue!r}"
    if keep.length is not None:
        yield retention(name, statements.old(schema), queue.name, keep.length)
    if keep.at_most is not None:
        before, boundary = statements.before(schema), statements.boundary(schema)
        yield Excess(f"{name}, of which too many are kept,", before, boundary, queue.name, keep.at_most)


def _describe(schema: str | None) -> str:
    where = "" if schema is None else f" of the schema {schema!r}"
    return f"the deletion of progress without tasks{where}"
