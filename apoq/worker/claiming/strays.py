"""Claims that committed although their results were lost, and notes that are no longer needed."""

from __future__ import annotations

import time
from functools import partial
from typing import Final
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.pool import PoolProxiedConnection

from apoq.postgres.connections import execute
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import CLAIM, ID
from apoq.schema.statements.notes import forget_settled
from apoq.schema.statements.recover import forget_unknown, give_back
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.claim_log import ClaimLog
from apoq.worker.database import WorkerDatabase
from apoq.worker.unique_keys import take_free_keys

POLL_SECONDS: Final = 1.0
"""Seconds between two looks for stray tasks, while there may be any."""


class Strays:
    """Releases stray tasks: the worker has claimed them, and never received the result of the claim.

    A claim may commit at any time until the server ends it, so this looks until that time is over.
    """

    def __init__(
        self,
        database: WorkerDatabase,
        claim_log: ClaimLog,
    ) -> None:
        self._database = database
        self._claim_log = claim_log
        self._breaker: CircuitBreaker[str | None] = CircuitBreaker(_describe, database.outage)
        self.worker_id = UUID(int=0)
        self.looked_at = 0.0
        """When it has looked for the last time, by time.monotonic()."""
        self._expected_until: float | None = None

    @property
    def are_expected(self) -> bool:
        """Whether there may be stray tasks."""
        return self._expected_until is not None

    def expect(self, seconds: float = 0.0) -> None:
        """Look for stray tasks now; a claim may commit within so many seconds."""
        self._expected_until = max(self._expected_until or 0.0, time.monotonic() + seconds)

    def release(self) -> None:
        """Release the stray tasks that there are."""
        if self._expected_until is None:
            return
        self.looked_at = time.monotonic()
        schemas = self._database.leased_schemas()
        is_over = bool(schemas) and self.looked_at >= self._expected_until
        for schema in schemas:
            is_over &= self._breaker.call(schema, schemas, partial(self._release_in, schema), True)
        if is_over:
            self._expected_until = None

    def forget_settled(self, connection: PoolProxiedConnection | None = None) -> None:
        """Delete the notes of claims whose tasks are all settled; no task waits for that."""
        schemas = self._database.leased_schemas()
        for schema in schemas:
            if done := self._claim_log.done(schema):
                forget = partial(self._forget, schema, done, connection or self._database.engine)
                self._breaker.call(schema, schemas, forget, None)

    def _release_in(self, schema: str | None) -> bool:
        """Release the stray tasks of a schema; return whether none is left."""
        latest = self._claim_log.latest  # a claim that begins while this looks isn't known, and no stray
        held = [row[ID] for row in self._claim_log.held() if row[CLAIM].from_queue.schema == schema]
        parameters = {
            "by_worker": self.worker_id,
            "known": array_text(self._claim_log.known(schema)),
            "held": array_text(held),
            "latest": latest,
        }
        ((left, without_key),) = execute(self._database.engine, give_back(schema), parameters)
        if schema not in self._database.sharded:
            take_free_keys(partial(execute, self._database.engine), schema, without_key or ())
        execute(self._database.engine, forget_unknown(schema), parameters)
        return not left

    def _forget(self, schema: str | None, done: list[int], where: Engine | PoolProxiedConnection) -> None:
        parameters = {"by_worker": self.worker_id, "done": array_text(done)}
        execute(where, forget_settled(schema), parameters)
        self._claim_log.forgotten(schema, done)


def _describe(schema: str | None) -> str:
    return "tidying up the worker's claims" + ("" if schema is None else f" in the schema {schema!r}")
