"""The worker's row: added before its first claim, renewed by heartbeats, deleted at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection

from apoq.errors import SchemaMismatch
from apoq.migrations.prepare import check
from apoq.postgres.connections import ANSWER_TIMEOUT_SECONDS
from apoq.postgres.watchdog import watch
from apoq.schema import preflight
from apoq.schema.citus import placement
from apoq.tracing import untraced
from apoq.worker import logs
from apoq.worker.claiming.scanner import QueueScanner
from apoq.worker.claiming.strays import Strays
from apoq.worker.database import WorkerDatabase
from apoq.worker.liveness.heartbeat import Heartbeat
from apoq.worker.service import Service
from apoq.worker.threads import THREAD_RETRY_SECONDS, MissingThreads


class Registration(Service):
    """Registers the worker in each of its schemas, sends its heartbeats, and deletes its row at the end."""

    def __init__(
        self,
        database: WorkerDatabase,
        heartbeat: Heartbeat,
        scanner: QueueScanner,
        strays: Strays,
        missing: MissingThreads,
    ) -> None:
        super().__init__("apoq-heartbeat", database.outage)
        self._database = database
        self._heartbeat = heartbeat
        self._scanner = scanner
        self._strays = strays
        self._missing = missing
        self.is_done = False
        """Whether the worker is registered and may claim."""
        self._has_row = False
        self._checked: set[str | None] = set()
        """The schemas in which the log has what is in the worker's way."""
        self._lock = threading.Lock()
        self._deferred: Callable[[], None] | None = None

    def begin(self) -> None:
        """Start with a new identity, so that nothing that an earlier start left behind looks alive."""
        self._strays.worker_id = self._heartbeat.worker_id = uuid4()
        self.is_done = self._has_row = False
        self._checked.clear()
        self._database.sharded.clear()

    def register(self) -> None:
        """Check the schemas, and add the worker's row.

        Raises `SchemaMismatch` if all schemas have apoq's tables at another version or not at all, and
        `UnsupportedDatabase` if no worker may work in one of them.
        """
        refused = [error for schema in self._database.schemas if (error := self._refused(schema)) is not None]
        if len(refused) == len(self._database.schemas):
            raise refused[0]
        for error in refused:
            logs.schema_left_out(error)  # a tenant's schema may have been dropped
        self._heartbeat.enter()
        self._has_row = True
        # Before the first claim, which otherwise would know of no priorities.
        self._scanner.survey()
        self.is_done = True

    def when_done(self, start: Callable[[], None]) -> None:
        """Call this now, or as soon as the worker is registered."""
        with self._lock:
            if not self.is_done:
                self._deferred = start
                return
        start()

    def forget_start(self) -> None:
        """Don't call what `when_done` was given any more."""
        with self._lock:
            self._deferred = None

    def turn(self) -> float | None:
        """Register if that has not succeeded yet, beat, and start what could not be started before."""
        if not self.is_done:
            self.register()
        pause = self._heartbeat.turn()
        with self._lock:
            if self._deferred is not None:
                self._deferred()
                self._deferred = None
        self._missing.retry()
        return min(pause, THREAD_RETRY_SECONDS) if self._missing else pause

    def after_last_turn(self) -> None:
        """Delete the worker's row."""
        try:
            if self._has_row:
                self._heartbeat.leave()
        except Exception as error:  # noqa: BLE001 - the lease ends by itself
            logs.row_left_behind(error)

    def _refused(self, schema: str | None) -> SchemaMismatch | None:
        """Log what is in a worker's way in a schema; return the error if the tables there can't be used."""
        with (
            untraced(),
            self._database.engine.connect() as connection,
            self._watched(connection),
            connection.begin(),
        ):
            if schema not in self._checked:  # the database may go away several times before this succeeds
                preflight.check(connection, schema)
                if placement(connection, schema) is not None:
                    self._database.sharded.add(schema)
                self._checked.add(schema)
            try:
                check(connection, schema)
            except SchemaMismatch as error:
                return error
        return None

    def _watched(self, connection: Connection) -> AbstractContextManager[None]:
        driver: Any = connection.connection.dbapi_connection
        return watch.awaiting(driver, ANSWER_TIMEOUT_SECONDS, self._database.engine)
