"""``apoq worker --burst``: run the tasks that are due, and then stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import sqlalchemy as sa

from apoq.cli.exits import Failure, explained
from apoq.monitor.formatting import length, tasks
from apoq.postgres.connections import own_engine
from apoq.postgres.urls import sync_side
from apoq.schema.statements.held import holds_tasks
from apoq.schema.statements.queues import queue_text, queues_text
from apoq.schema.statements.survey import survey, surveyed
from apoq.worker import Worker
from apoq.worker.claiming.cursor import MAX_LEVELS, ClaimCursor

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.1
REST_FACTOR: Final = 20
"""How many times as long as a look at the queues took it is until the next one."""

STUCK_AFTER_SECONDS: Final = 30.0
"""Seconds after which a worker gives up that runs nothing although tasks are due."""

_SNAPSHOT: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
# Of one moment: otherwise, a task could add another one to a queue that was looked at before, and end.


class Burst:
    """Stops a worker when none of its tasks is due and it runs none."""

    def __init__(self, worker: Worker) -> None:
        """Prepare to watch a worker; fail if its database can't be reached."""
        self._worker = worker
        self._schemas = {queue.schema for queue in worker.queues}
        engine = sync_side(worker._engine)  # noqa: SLF001 - our own
        self._engine = own_engine(engine)
        self._began = time.monotonic()
        self._failure: Failure | None = None
        with explained(engine.url), self._engine.connect():
            pass

    def watch(self, stop: Callable[[], None]) -> None:
        """Call `stop` when the worker is done, from a thread."""
        threading.Thread(target=self._watch, args=(stop,), name="apoq-burst", daemon=True).start()

    def finish(self) -> None:
        """Log what the worker did; fail if it gave up."""
        self._engine.dispose()
        stats = self._worker.stats()
        parts = [f"{tasks(stats.completed)} completed"]
        parts += [
            f"{count:,} {what}"
            for count, what in (
                (stats.retried, "failed and will be tried again"),
                (stats.failed, "failed for good"),
                (stats.cancelled, "cancelled"),
            )
            if count
        ]
        logger.info("done in %s: %s", length(time.monotonic() - self._began), ", ".join(parts))
        if self._failure is not None:
            raise self._failure

    def _watch(self, stop: Callable[[], None]) -> None:
        stats, changed_at, seems_done = self._worker.stats(), time.monotonic(), False
        while True:
            before, stats = stats, self._worker.stats()
            began = time.monotonic()
            if stats != before or stats.running:
                changed_at = began
            was_done, seems_done = seems_done, False
            problem = "tasks are due, but can't be claimed: does another session lock them?"
            if not stats.running:  # a look at the database says nothing new while something runs
                try:
                    seems_done = self._is_done() and stats == before
                except sa.exc.DBAPIError as error:
                    problem = f"the database can't be read: {error.orig}"
            # Twice: for a moment after the end of a task, the next one of its key or chain still waits.
            is_done = seems_done and was_done
            if not is_done and began - changed_at > STUCK_AFTER_SECONDS:
                self._failure = Failure(f"nothing has run for {length(STUCK_AFTER_SECONDS)}: {problem}")
                is_done = True
            if is_done:
                stop()
                return
            time.sleep(max(POLL_SECONDS, REST_FACTOR * (time.monotonic() - began)))

    def _is_done(self) -> bool:
        with self._engine.connect() as connection:
            connection.exec_driver_sql(_SNAPSHOT)
            try:
                return not (
                    self._holds_tasks(connection)
                    or any(self._is_due(connection, schema) for schema in self._schemas)
                )
            finally:
                connection.exec_driver_sql("ROLLBACK")

    def _holds_tasks(self, connection: sa.Connection) -> bool:
        parameters = {"by_worker": self._worker._lifecycle.worker_id}  # noqa: SLF001 - our own
        return any(connection.scalar(holds_tasks(schema), parameters) for schema in self._schemas)

    def _is_due(self, connection: sa.Connection, schema: str | None) -> bool:
        queues = [queue for queue in self._worker.queues if queue.schema == schema]
        texts = [[queue_text(queue.name, self._worker.processors(queue))] for queue in queues]
        parameters = {"queues": queues_text(*texts), "at_most": MAX_LEVELS + 1}
        found = surveyed(connection.execute(survey(schema), parameters))
        return any(ClaimCursor().surveyed(its, found.now) <= 0 for its in found.firsts.values())
