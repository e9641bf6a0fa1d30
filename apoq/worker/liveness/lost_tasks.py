"""Stops tasks that the worker no longer owns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, TypeVar

from apoq.postgres.connections import execute
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.begin import begin
from apoq.schema.statements.claim import CLAIM, CLAIM_TOKEN, ID
from apoq.schema.statements.lost import lost
from apoq.worker import logs
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.claim_log import ClaimLog
from apoq.worker.database import WorkerDatabase
from apoq.worker.execution.attempt import Claimed
from apoq.worker.execution.executor import Executor
from apoq.worker.places import Places
from apoq.worker.service import Service

T = TypeVar("T")

MIN_INTERVAL_SECONDS: Final = 0.05
"""Seconds from one look to the next, at least: any role can send notifications, as often as it likes."""


class LostTaskMonitor(Service):
    """Stops tasks that the worker no longer owns, because they were cancelled, deleted or rescued.

    No guarantee depends on it, because the results of such tasks are refused by their claim tokens. Tasks
    that have been here for longer than `interval` seconds are looked up that often, and immediately if a
    notification says that they were cancelled. The signal to stop is repeated, because the first may come
    just before the task begins.
    """

    def __init__(
        self,
        database: WorkerDatabase,
        claim_log: ClaimLog,
        executor: Executor,
        places: Places,
        *,
        interval: float,
    ) -> None:
        super().__init__("apoq-lost-tasks", database.outage)
        self._database = database
        self._breaker: CircuitBreaker[str | None] = CircuitBreaker(_describe, database.outage)
        self._claim_log = claim_log
        self._executor = executor
        self._places = places
        self._interval = interval
        self._lock = threading.Lock()
        self._wanted: set[int] = set()
        self._rested_at = 0.0
        self._logged: set[tuple[str | None, int, int]] = set()
        self._begun: set[tuple[str | None, int, int]] = set()

    def look_for(self, ids: Iterable[int] | None) -> None:
        """Look at these tasks now, as far as the worker has them; None: at all that it has."""
        mine = {row[ID] for row in self._claim_log.held()}
        if ids is not None:
            mine.intersection_update(ids)
        with self._lock:
            self._wanted |= mine
        if mine:
            self.wake()

    def turn(self) -> float | None:
        """Look up the tasks, and stop those that are lost."""
        if (pause := self._rested_at - time.monotonic()) > 0:
            return pause
        with self._lock:
            wanted, self._wanted = self._wanted, set()
        claimed_before = time.monotonic() - self._interval
        held = self._claim_log.held()
        self._logged &= {_key(row) for row in held}
        parts: dict[str | None, dict[tuple[int, int], Claimed]] = {}
        for row in held:
            batch = row[CLAIM]
            if batch.claimed_at < claimed_before or row[ID] in wanted:
                parts.setdefault(batch.from_queue.schema, {})[row[ID], row[CLAIM_TOKEN]] = row
        try:
            self._for_each(parts, self._look)
            self._note_begun()
        except BaseException:
            with self._lock:
                self._wanted |= wanted
            raise
        if parts:
            self._rested_at = time.monotonic() + MIN_INTERVAL_SECONDS
        return self._interval

    def _note_begun(self) -> None:
        """Write down which prefetched tasks have begun.

        Otherwise their attempts would not count if this worker died now.
        """
        begun = {_key(attempt.row) for attempt in self._executor.running() if attempt.row[CLAIM].is_ahead}
        self._begun &= begun
        parts: dict[str | None, list[tuple[int, int]]] = {}
        for schema, id_, token in begun - self._begun:
            parts.setdefault(schema, []).append((id_, token))
        self._for_each(parts, self._note)

    def _for_each(self, parts: dict[str | None, T], function: Callable[[str | None, T], None]) -> None:
        for schema, part in parts.items():
            self._breaker.call(schema, self._database.schemas, partial(function, schema, part), None)

    def _note(self, schema: str | None, tasks: list[tuple[int, int]]) -> None:
        ids, tokens = zip(*tasks, strict=True)
        execute(self._database.engine, begin(schema), {"ids": array_text(ids), "tokens": array_text(tokens)})
        self._begun.update((schema, *task) for task in tasks)

    def _look(self, schema: str | None, rows: dict[tuple[int, int], Claimed]) -> None:
        parameters = {
            "ids": array_text([id_ for id_, _ in rows]),
            "tokens": array_text([token for _, token in rows]),
        }
        found = execute(self._database.engine, lost(schema), parameters).fetchall()
        # A task that has ended meanwhile isn't lost: this worker has written its result, or is about to.
        unfinished = self._executor.unfinished() if found else set()
        gone = [row for key in found if id(row := rows[key]) in unfinished]
        if new := [row for row in gone if _key(row) not in self._logged]:
            logs.tasks_lost(row[ID] for row in new)
            self._logged.update(map(_key, new))
        self._stop(gone)

    def _stop(self, tasks: list[Claimed]) -> None:
        # Their processors may run on for a while, but their places are free.
        self._places.settled(tasks)
        self._claim_log.settled(self._executor.recall(tasks))


def _describe(schema: str | None) -> str:
    return "the look at running tasks" + ("" if schema is None else f" in the schema {schema!r}")


def _key(row: Claimed) -> tuple[str | None, int, int]:
    batch = row[CLAIM]
    return batch.from_queue.schema, row[ID], row[CLAIM_TOKEN]
