"""Rescues running tasks that are in no note of a claim."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from apoq.events import TasksRescued
from apoq.postgres.connections import execute
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.recover import rescue_unnoted
from apoq.schema.statements.unnoted import next_level, unnoted
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.database import WorkerDatabase
from apoq.worker.liveness.heartbeat import REASON
from apoq.worker.service import Service
from apoq.worker.unique_keys import lacking, take_free_keys

STEP_SIZE: Final = 1_000
"""Tasks that one statement looks at, at most."""

TURN_SECONDS: Final = 0.05
"""Seconds that a turn takes, about, before the sweep rests."""

DATABASE_SHARE: Final = 0.02
"""The share of its time that the sweep spends in the database."""

PASS_INTERVAL_SECONDS: Final = 60.0
"""Seconds between two passes that find nothing."""

MAX_SUSPECTS: Final = 1_000
"""Tasks that are remembered from one pass to the next, at most."""

BEFORE_ALL: Final = {"queue": "", "level": 2**16}
START: Final = {"time": "-infinity", "id": -(2**63)}


@dataclass
class _Pass:
    """One walk through the tasks of a schema that have not ended."""

    level: dict[str, Any] | None = None
    """The queue and the level that it has come to; None before the first."""
    behind: dict[str, Any] = field(default_factory=lambda: START)
    suspects: set[tuple[int, int]] = field(default_factory=set)
    """Ids and tokens of the tasks that this pass has found."""
    seen_before: set[tuple[int, int]] = field(default_factory=set)
    """Those that the last pass has found."""


class Sweep(Service):
    """Walks slowly through all tasks that have not ended, and rescues running ones that are in no note.

    Workers find the tasks of a dead worker by the notes of its claims. If these are missing, as after a
    restore or a replication of the task table alone, no other part would find such a task. It is rescued if
    two passes find it, because a live worker would have written the note in between.
    """

    def __init__(
        self,
        database: WorkerDatabase,
        *,
        grace: float,
        on_rescued: Callable[[str | None], None],
    ) -> None:
        """`grace`: seconds between two passes, at least. `on_rescued` is called with a schema."""
        super().__init__("apoq-sweep", database.outage)
        self._database = database
        self._passes = {schema: _Pass() for schema in database.schemas}
        self._breaker: CircuitBreaker[str | None] = CircuitBreaker(_describe, database.outage)
        self._grace = grace
        self._report = database.outage.report
        self._on_rescued = on_rescued
        self._pause = grace
        self._begins_at: float | None = None

    def turn(self) -> float | None:
        """Walk on for a while; return when to go on."""
        began = time.monotonic()
        if self._begins_at is None:
            self._begins_at = began + self._grace  # a worker that starts has other things to do
        if began < self._begins_at:
            return self._begins_at - began
        schemas = self._database.leased_schemas()
        is_over = True
        for schema in schemas:
            is_over &= self._breaker.call(schema, schemas, partial(self._walk, schema), True)
        took = time.monotonic() - began
        if not is_over:
            return max(1.0, took * (1 / DATABASE_SHARE - 1))
        has_suspects = any(each.seen_before for each in self._passes.values())
        self._pause = self._grace if has_suspects else min(PASS_INTERVAL_SECONDS, 4 * self._pause)
        return max(self._grace, self._pause) * random.uniform(1.0, 1.2)  # noqa: S311 - workers needn't walk together

    def _walk(self, schema: str | None) -> bool:
        """Go on with the pass through a schema; return whether it is over."""
        ends_at = time.monotonic() + TURN_SECONDS
        while time.monotonic() < ends_at:
            if not self._step(schema, self._passes[schema]):
                return True
        return False

    def _step(self, schema: str | None, its: _Pass) -> bool:
        """Look at the next tasks; return whether there may be more."""
        if its.level is None:
            its.level = self._level_after(schema, BEFORE_ALL)
        else:
            parameters = {**its.level, **its.behind, "at_most": STEP_SIZE}
            rows = execute(self._database.engine, unnoted(schema), parameters).fetchall()
            found = [(task_id, token) for task_id, token, _, _, is_unnoted in rows if is_unnoted]
            its.suspects.update(found[: MAX_SUSPECTS - len(its.suspects)])
            if again := [task for task in found if task in its.seen_before]:
                self._rescue(schema, again)
            if rows and rows[-1][_NUMBER] == STEP_SIZE:
                its.behind = {"id": rows[-1][_ID], "time": rows[-1][_TIME]}
                return True
            its.level, its.behind = self._level_after(schema, its.level), START
        if its.level is None:
            its.suspects, its.seen_before = set(), its.suspects
        return its.level is not None

    def _level_after(self, schema: str | None, level: dict[str, Any]) -> dict[str, Any] | None:
        rows = execute(self._database.engine, next_level(schema), level).fetchall()
        return dict(zip(("queue", "level"), rows[0], strict=True)) if rows else None

    def _rescue(self, schema: str | None, tasks: list[tuple[int, int]]) -> None:
        ids, tokens = zip(*tasks, strict=True)
        parameters = {"ids": array_text(ids), "tokens": array_text(tokens), "reason": REASON}
        if rescued := execute(self._database.engine, rescue_unnoted(schema), parameters).fetchall():
            if schema not in self._database.sharded:
                take_free_keys(partial(execute, self._database.engine), schema, lacking(rescued))
            self._report(TasksRescued(len(rescued), schema, is_noted=False))
            self._on_rescued(schema)


_ID, _, _TIME, _NUMBER = range(4)
"""Where these are in a row of `unnoted`."""


def _describe(schema: str | None) -> str:
    return "the sweep" if schema is None else f"the sweep of the schema {schema!r}"
