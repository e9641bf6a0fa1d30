"""Writes the limits that a worker's code declares, before its first claims."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import partial

from apoq.client.queue import Queue
from apoq.core.limits import Limit
from apoq.core.registry import Processor, Registry
from apoq.postgres.connections import execute
from apoq.schema.statements.limits import declare
from apoq.worker import logs
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.database import WorkerDatabase

WHOLE = ""
"""Instead of a type: the limit of a whole queue."""


class DeclaredLimits:
    """The limits of typed tasks, of `Worker.use` and of queues, written once for each start of a worker.

    They are never deleted, because another deployment may use the same tables. A limit that a later release
    has declared stays as it is, so that old workers that start during a deployment don't undo it.
    """

    def __init__(self, database: WorkerDatabase, registry: Registry, release: datetime) -> None:
        self._database = database
        self._registry = registry
        self._release = release
        self._version: int | None = None
        """Of the registry, at the last look."""
        self._written: set[tuple[Queue, str, Limit]] = set()
        self._breaker: CircuitBreaker[Queue] = CircuitBreaker(
            lambda queue: f"declaring the limits of {queue!r}", database.outage
        )
        self.unwritten: set[Queue] = set()
        """The queues of which limits could not be written; no task of these may be claimed."""

    def forget(self) -> None:
        """Write all of them again."""
        self._version = None
        self._written.clear()

    def write(self) -> None:
        """Write those that are new."""
        version = self._registry.version
        if self._version == version:
            return
        queues = self._database.queues
        self.unwritten = {
            queue
            for queue in queues
            if not self._breaker.call(queue, queues, partial(self._write_all, queue), otherwise=False)
        }
        if not self.unwritten:
            self._version = version

    def _write_all(self, queue: Queue) -> bool:
        for type_, limit in _limits_of(queue, self._registry.of(queue)):
            if (queue, type_, limit) not in self._written:
                self._write(queue, type_, limit)
                self._written.add((queue, type_, limit))
        return True

    def _write(self, queue: Queue, type_: str, limit: Limit) -> None:
        parameters = {
            "from_queue": queue.name,
            "limited_type": type_,
            "limited_key": "",
            "at_most": limit.at_most,
            "is_of_key": limit.is_of_key,
            "is_strict": limit.order == "strict",
            "holds": limit.after_failure == "hold",
            "limit_release": self._release,
        }
        if not execute(self._database.engine, declare(queue.schema), parameters).fetchall():
            logs.limit_kept(queue.name, type_)


def _limits_of(queue: Queue, processors: Mapping[str, Processor]) -> Iterable[tuple[str, Limit]]:
    if queue.limited_to is not None:
        yield WHOLE, queue.limited_to
    for type_, processor in processors.items():
        if processor.limit is not None:
            yield type_, processor.limit
