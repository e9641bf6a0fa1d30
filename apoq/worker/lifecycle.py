"""A worker from its entry into the database to its leaving."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import Connection, Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, defer
from sqlalchemy.orm.attributes import set_committed_value

from apoq.client.queue import Queue
from apoq.core.registry import Registry
from apoq.core.states import COMPLETED
from apoq.errors import SchemaMismatch
from apoq.events import Events, WorkerStarted, WorkerStopped, WorkerStopping
from apoq.migrations.prepare import check
from apoq.postgres.connections import ANSWER_TIMEOUT_SECONDS, is_away
from apoq.postgres.watchdog import watch
from apoq.schema import preflight
from apoq.schema.models import Task, detached
from apoq.worker.execution.executor import released
from apoq.worker.execution.runner import AttemptResult
from apoq.worker.execution.running_task import KNOWN, RunningTask
from apoq.worker.loop import Loop
from apoq.worker.options import WorkerOptions
from apoq.worker.runtime import SETTLE_ON_STOP_SECONDS, STOP_OVERTIME_SECONDS, Runtime, left_until
from apoq.worker.settling.counters import Counter, WorkerStats
from apoq.worker.threads import THREAD_RETRY_SECONDS

logger = logging.getLogger(__name__)

TOLERATED_FAILURE_SECONDS: Final = 5.0
"""Seconds for which claims or settlements may fail before the worker isn't healthy any more."""


class Lifecycle:
    """Enters a worker while it has started or `work` is called, and shows that it lives as long as that."""

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        queues: tuple[Queue, ...],
        registry: Registry,
        events: Events,
        options: WorkerOptions,
        name: str,
    ) -> None:
        """`name` is what people call the worker."""
        self._events = events
        self._name = name
        self._counter = Counter()
        self._make_runtime = partial(Runtime, engine, queues, registry, events, options, self._counter)
        self.runtime = self._make_runtime()
        self._schemas = {queue.schema for queue in queues}
        self._lock = threading.RLock()
        self._enlisted = 0
        self._is_started = False
        self._has_entered = False
        self._is_registered = False
        """Whether its row is there: it is, before it has entered."""
        self._begins_later = False
        """Whether the heartbeat's thread starts the others: when the database, and each thread, is there."""
        self._beginning = threading.Lock()
        self._is_entering = False
        self.stops = 0
        """How often it was told to stop: what was to start before that doesn't."""
        self._is_spent = False
        """Whether a thread hasn't ended with its stop, such as one that waits for a connection to be made."""
        self._looked_at: set[str | None] = set()
        """The schemas of which the log has what is in a worker's way there."""
        self._beating = self._make_beating()

    @property
    def is_enlisted(self) -> bool:
        """Tell whether it has begun."""
        return self._enlisted > 0

    def is_healthy(self) -> bool:
        """Tell whether it has started, with all its threads, holds a lease, and claims and settles."""
        runtime = self.runtime
        loops = (self._beating, runtime.monitoring, *runtime.loops)
        return (
            self._is_started
            and any(lease.is_held for lease in runtime.heartbeat.leases.values())
            and all(loop.is_alive for loop in loops)
            and not runtime.missing
            and not runtime.event_loop.is_closed
            and not runtime.claiming.is_failing_for(TOLERATED_FAILURE_SECONDS)
            and not runtime.settling.is_failing_for(TOLERATED_FAILURE_SECONDS)
        )

    def stats(self) -> WorkerStats:
        """Answer how many tasks run now, and what became of those that have ended."""
        return self._counter.stats(len(self.runtime.executor.running()))

    def work(self) -> Task | None:
        """Claim, run and settle one due task on the caller's thread."""
        self.enlist()
        runtime = self.runtime
        try:
            attempt = runtime.claimer.claim_one()
            if attempt is None and runtime.scanner.survey() <= 0:
                attempt = runtime.claimer.claim_one()
            if not self._is_started:
                runtime.settler.turn()
            if attempt is None:
                return None
            try:
                end = runtime.run_beside(attempt)
            except Exception:  # such as that no thread can be started for the loop of a coroutine
                runtime.settler.put(released(attempt))
                runtime.settler.flush(SETTLE_ON_STOP_SECONDS)
                raise
            runtime.settler.put(end)
            runtime.settler.flush(SETTLE_ON_STOP_SECONDS)
            if isinstance(end.outcome, KeyboardInterrupt):
                raise end.outcome  # meant for the program, not for the task that happened to run
            return self._load(end)
        finally:
            self.discharge()

    def start(self, loop: asyncio.AbstractEventLoop | None, stops: int) -> bool:
        """Start the threads; tell whether they hadn't started before.

        Not if it was told to stop since `stops` was read, be it while this waits for the database.
        """
        if self.runtime.is_current():
            return False  # it runs, or the caller wouldn't; and a stop may be waiting for the caller
        with self._lock:
            if self._is_started or self.stops != stops:
                return False
            self._replace_spent()
            runtime = self.runtime
            runtime.event_loop.use(loop)
            runtime.open()
            self._is_started = True
            try:
                self.enlist(wait=False)
            except BaseException:
                self._is_started = False
                runtime.listener.close()
                raise
            try:
                if self.stops != stops:
                    self._end(0.0)
                    return False
                if not self._begins_later:
                    runtime.start()
            except BaseException:
                self._end(0.0)  # nothing stays half started
                raise
        self._events.report(WorkerStarted(self._name))
        return True

    def stop(self, patience: float | None) -> bool:
        """Stop the threads; tell whether they had started, and have been stopped."""
        if self._is_started:
            # Before the lock is taken, for another thread that stops holds it while it waits for this one.
            self._refuse_to_wait_for_itself()
        self.stops += 1
        timeout = -1.0 if patience is None else min(patience + STOP_OVERTIME_SECONDS, threading.TIMEOUT_MAX)
        if self._is_started and self._is_entering:
            # A start waits for the database, with the lock. It finds that it isn't wanted any more.
            self.runtime.limit(time.monotonic())
            timeout = STOP_OVERTIME_SECONDS
        if not self._lock.acquire(timeout=timeout):
            return False
        try:
            if not self._is_started:
                return False
            self._refuse_to_wait_for_itself()
            self._events.report(WorkerStopping(self._name))
            self._end(patience)
        finally:
            self._lock.release()
        self._events.report(WorkerStopped(self._name))
        return True

    def enlist(self, *, wait: bool = True) -> None:
        """Show that this worker lives, before it claims anything; in its own time, unless told to `wait`."""
        with self._lock:
            self._replace_spent()
            runtime = self.runtime
            self._enlisted += 1
            if self._enlisted > 1:
                return
            # Fresh each time, so that nothing an earlier life of this worker left behind looks alive.
            runtime.claimer.worker_id = runtime.heartbeat.worker_id = uuid4()
            self._has_entered = self._is_registered = False
            self._looked_at.clear()
            try:
                try:
                    self._is_entering = True
                    self._enter()
                except BaseException as error:
                    if wait or not is_away(error):
                        raise
                finally:
                    self._is_entering = False
                self._begins_later = not self._has_entered
                self._beating.start()
                runtime.monitoring.start()
            except BaseException:
                self.discharge()
                raise

    def discharge(self, by: float | None = None) -> None:
        """Undo one `enlist`; with the last of them the worker's row and its connections go, by then."""
        runtime = self.runtime
        with self._lock:
            self._enlisted -= 1
            if self._enlisted == 0:
                if by is None:
                    runtime.limit(by := time.monotonic() + SETTLE_ON_STOP_SECONDS)
                runtime.deadlines.stop(left_until(by))
                runtime.end(runtime.monitoring, by)
                if not self._beating.is_alive:
                    self._leave(runtime)  # no thread could be started that would do so
                runtime.end(self._beating, by)
                runtime.dispose(by)
                loops = (self._beating, runtime.monitoring, *runtime.loops)
                self._is_spent = any(loop.is_alive for loop in loops)
            if not self._is_spent:
                runtime.limit(None)

    def _make_beating(self) -> Loop:
        runtime = self.runtime
        return runtime.loop("apoq-heartbeat", partial(self._beat, runtime), partial(self._leave, runtime))

    def _leave(self, runtime: Runtime) -> None:
        """Remove the worker's row; the last thing that its heartbeat does."""
        try:
            if self._is_registered:
                runtime.heartbeat.leave()
        except Exception as error:  # noqa: BLE001 - the lease ends by itself
            logger.warning("this worker's row could not be removed, and will be: %s", error)

    def _enter(self) -> None:
        refused = [error for schema in self._schemas if (error := self._refused(schema)) is not None]
        if len(refused) == len(self._schemas):
            raise refused[0]
        for error in refused:
            # A tenant's schema may have been dropped.
            logger.error("%s; until then, this worker does without the queues there", error)
        self.runtime.heartbeat.enter()
        self._is_registered = True
        # Before the first claim, which wouldn't know of priorities otherwise.
        self.runtime.scanner.survey()
        self._has_entered = True

    def _refused(self, schema: str | None) -> SchemaMismatch | None:
        """Log what is in a worker's way in a schema; return the error if its tables aren't this library's.

        Raises `UnsupportedDatabase` if no worker may work on them.
        """
        engine = self.runtime.engine
        with engine.connect() as connection, _watched(connection, engine), connection.begin():
            if schema not in self._looked_at:  # the database may be away for several of these
                preflight.check(connection, schema)
                self._looked_at.add(schema)
            try:
                check(connection, schema)
            except SchemaMismatch as error:
                return error
        return None

    def _end(self, patience: float | None) -> None:
        with self._beginning:
            self._begins_later = False
        by = self.runtime.stop(patience)
        self._is_started = False
        # Last: until here, what runs is this worker's.
        self.discharge(by)

    def _replace_spent(self) -> None:
        """Have another runtime if a thread of this one hasn't ended, whatever that still does."""
        if self._is_spent and not self._enlisted:
            on_death = self.runtime.on_death
            self.runtime = self._make_runtime()
            self.runtime.on_death = on_death
            self._beating = self._make_beating()
            self._is_spent = False

    def _beat(self, runtime: Runtime) -> float | None:
        if not self._has_entered:
            self._enter()
        pause = runtime.heartbeat.turn()
        with self._beginning:
            if self._begins_later and runtime is self.runtime:
                runtime.start()
                self._begins_later = False
        if runtime.missing:
            runtime.retry_threads()
            pause = min(pause, THREAD_RETRY_SECONDS)
        return pause

    def _refuse_to_wait_for_itself(self) -> None:
        if self.runtime.event_loop.is_current():
            raise RuntimeError(
                "stop would block the event loop on which this worker's coroutines run: "
                "`await asyncio.to_thread(worker.stop)`"
            )
        if self.runtime.is_current():
            raise RuntimeError(
                "stop waits for the processors and listeners that run, and this is one of them: set a "
                "threading.Event here, and call stop where you wait for it"
            )

    def _load(self, end: AttemptResult) -> Task:
        mapped = end.attempt.from_queue.task_class
        # Its data is known, or was too large.
        its_row = select(mapped).where(mapped.id == end.attempt.id).options(defer(mapped.data))
        with Session(self.runtime.engine, expire_on_commit=False) as session, session.begin():
            found = session.scalar(its_row)
            if found is not None:
                set_committed_value(found, "data", end.attempt.known_data())
        # A completed task that isn't kept is gone: then it is returned as far as it is known here.
        task = RunningTask(end.attempt)
        known = {name: getattr(task, name) for name in KNOWN}
        return found or detached(end.attempt.from_queue.schema, known | {"state": COMPLETED})


def _watched(connection: Connection, engine: Engine) -> AbstractContextManager[None]:
    driver: Any = connection.connection.dbapi_connection
    return watch.awaiting(driver, ANSWER_TIMEOUT_SECONDS, engine)
