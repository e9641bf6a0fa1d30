"""A worker from its first `start` or `work` to its last `stop`."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial
from typing import Final
from uuid import UUID

from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, defer
from sqlalchemy.orm.attributes import set_committed_value

from apoq.client.queue import Queue
from apoq.core.registry import Registry
from apoq.core.states import COMPLETED
from apoq.events import Events, WorkerStarted, WorkerStopped, WorkerStopping
from apoq.postgres.connections import is_away
from apoq.schema.models import Task
from apoq.schema.objects import detached
from apoq.tracing import Tracer, untraced
from apoq.worker import logs
from apoq.worker.execution.executor import released
from apoq.worker.execution.runner import AttemptResult
from apoq.worker.execution.running_task import KNOWN, RunningTask
from apoq.worker.observer import Observer
from apoq.worker.options import WorkerOptions
from apoq.worker.process import PROCESS
from apoq.worker.runtime import SETTLE_ON_STOP_SECONDS, STOP_OVERTIME_SECONDS, Runtime
from apoq.worker.service import left_until
from apoq.worker.settling.counters import Counter, WorkerStats

TOLERATED_FAILURE_SECONDS: Final = 5.0
"""Seconds for which claims or settlements may fail before the worker is unhealthy."""


class Lifecycle:
    """Registers a worker while it has started or `work` is called, and starts and stops its services."""

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        queues: tuple[Queue, ...],
        registry: Registry,
        events: Events,
        options: WorkerOptions,
        name: str,
        observer: Observer | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`name` is what people call the worker."""
        self._events = events
        self._name = name
        self._counter = Counter(observer)
        self._make_runtime = partial(
            Runtime, engine, queues, registry, events, options, name, self._counter, observer, tracer
        )
        self.runtime = self._make_runtime()
        self._lock = threading.RLock()
        self._users = 0
        """How many calls of `start` and `work` need the worker to be registered."""
        self._is_started = False
        self._is_registering = False
        self._is_draining = False
        self.stops = 0
        """How often `stop` was called: a start that was asked for before that does nothing."""
        self._is_spent = False
        """Whether a thread has outlived a stop, such as one that waits for a connection to be made."""

    @property
    def is_in_use(self) -> bool:
        """Whether the worker has started, or `work` is running."""
        return self._users > 0

    @property
    def worker_id(self) -> UUID:
        """The id of the worker's row."""
        return self.runtime.heartbeat.worker_id

    def is_healthy(self) -> bool:
        """Return whether it has started, with all its threads, holds a lease, and claims and settles."""
        runtime = self.runtime
        return (
            self._is_started
            and not self._is_draining
            and any(lease.is_held for lease in runtime.heartbeat.leases.values())
            and all(service.is_alive for service in runtime.services)
            and not runtime.missing
            and not runtime.event_loop.is_closed
            and not any(its.is_failing_for(TOLERATED_FAILURE_SECONDS) for its in runtime.essential)
        )

    def is_connected(self) -> bool:
        """Return whether it has started, holds a lease, and finds the database."""
        runtime = self.runtime
        is_held = any(lease.is_held for lease in runtime.heartbeat.leases.values())
        return self._is_started and is_held and not runtime.outage.is_on

    def busy(self) -> int:
        """Return how many slots have a task."""
        executor = self.runtime.executor
        return executor.concurrency - executor.free

    def stats(self) -> WorkerStats:
        """Return how many tasks run now, and how many have ended in which way."""
        return self._counter.stats(len(self.runtime.executor.running()))

    def work(self) -> Task | None:
        """Claim, run and settle one due task on the caller's thread."""
        self.acquire()
        runtime = self.runtime
        try:
            attempt = runtime.claimer.claim_one()
            if attempt is None and (runtime.unblock() or runtime.scanner.survey() <= 0):
                attempt = runtime.claimer.claim_one()
            if not self._is_started:
                runtime.settlers.turn()
                if attempt is None and runtime.unblocker.look_now():
                    attempt = runtime.claimer.claim_one()
            if attempt is None:
                return None
            try:
                end = runtime.executor.run(attempt)
            except Exception:  # such as that no thread can be started for the loop of a coroutine
                runtime.settlers.put(released(attempt))
                runtime.settlers.flush(SETTLE_ON_STOP_SECONDS)
                raise
            runtime.settlers.put(end)
            runtime.settlers.flush(SETTLE_ON_STOP_SECONDS)
            runtime.progress.finish()
            if not self._is_started:
                runtime.unblocker.turn()
                runtime.hand_over.unblock()  # other workers may claim the next tasks
            if isinstance(end.outcome, KeyboardInterrupt):
                raise end.outcome  # meant for the program, not for the task that happened to run
            return self._load(end)
        finally:
            self.release()

    def start(self, loop: asyncio.AbstractEventLoop | None, stops: int) -> bool:
        """Start the services; return whether they had not started before.

        Does nothing if `stop` was called after `stops` was read, even while this waits for the database.
        """
        if self.runtime.is_current():
            return False  # it has started, or the caller would not run; and a stop may wait for the caller
        with self._lock:
            if self._is_started or self.stops != stops:
                return False
            self._replace_spent()
            runtime = self.runtime
            runtime.event_loop.use(loop)
            runtime.executor.open()
            runtime.claimer.look_for_tasks()
            self._is_started = True
            try:
                self.acquire(wait=False)
            except BaseException:
                self._is_started = False
                raise
            try:
                if self.stops != stops:
                    self._end(0.0)
                    return False
                runtime.registration.when_done(runtime.start)
            except BaseException:
                self._end(0.0)  # nothing stays half started
                raise
        self._events.report(WorkerStarted(self._name))
        return True

    def drain(self) -> None:
        """Claim no more tasks, and release those that have not begun; return without waiting for the others.

        Running tasks go on, without a limit of time and without a signal to stop, until `stop` is called.
        """
        with self._lock:
            if self._is_started:
                self._is_draining = True
                self.runtime.drain()
                logs.draining(self._name, len(self.runtime.executor.running()))

    def has_drained(self) -> bool:
        """Return whether the worker holds no more tasks: each has ended, and its result is written."""
        return not self.runtime.claim_log.held()

    def stop(self, patience: float | None) -> bool:
        """Stop the services; return whether they had started, and have been stopped."""
        if self._is_started:
            # Before the lock is taken: another thread that stops holds it while it waits for this one.
            self._refuse_to_wait_for_itself()
        self.stops += 1
        timeout = -1.0 if patience is None else min(patience + STOP_OVERTIME_SECONDS, threading.TIMEOUT_MAX)
        if self._is_started and self._is_registering:
            # A start holds the lock while it waits for the database. It notices this stop then.
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

    def acquire(self, *, wait: bool = True) -> None:
        """Register the worker before it claims anything.

        If the database is away, raise that error, or else, without `wait`, register when it is back.
        """
        PROCESS.refuse_workers()
        with self._lock:
            self._replace_spent()
            runtime = self.runtime
            runtime.isolated.check()
            self._users += 1
            if self._users > 1:
                return
            runtime.isolated.pool.open()
            registration = runtime.registration
            registration.begin()
            try:
                try:
                    self._is_registering = True
                    registration.register()
                except BaseException as error:
                    if wait or not is_away(error):
                        raise
                finally:
                    self._is_registering = False
                registration.start()
                runtime.lost_task_monitor.start()
            except BaseException:
                self.release()
                raise

    def release(self, by: float | None = None) -> None:
        """Undo one `acquire`; the last one deletes the worker's row and closes its connections, by then."""
        runtime = self.runtime
        registration = runtime.registration
        with self._lock:
            self._users -= 1
            if self._users == 0:
                if by is None:
                    runtime.limit(by := time.monotonic() + SETTLE_ON_STOP_SECONDS)
                runtime.deadlines.stop(left_until(by))
                runtime.end(runtime.lost_task_monitor, by)
                if not registration.is_alive:
                    registration.after_last_turn()  # no thread could be started that would do so
                runtime.end(registration, by)
                runtime.dispose(by)
                self._is_spent = any(service.is_alive for service in runtime.services)
            if not self._is_spent:
                runtime.limit(None)

    def _end(self, patience: float | None) -> None:
        self.runtime.registration.forget_start()
        by = self.runtime.stop(patience)
        self._is_started = self._is_draining = False
        # Last: until here, running tasks belong to this worker.
        self.release(by)

    def _replace_spent(self) -> None:
        """Make another runtime if a thread of this one has not ended."""
        if self._is_spent and not self._users:
            self.runtime = self._make_runtime()
            self._is_spent = False

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
        # Its data is known, or was too large to be read.
        its_row = select(mapped).where(mapped.id == end.attempt.id).options(defer(mapped.data))
        with untraced(), Session(self.runtime.engine, expire_on_commit=False) as session, session.begin():
            found = session.scalar(its_row)
            if found is not None:
                set_committed_value(found, "data", end.attempt.known_data())
        # A completed task that isn't kept is gone: then it is returned as far as it is known here.
        task = RunningTask(end.attempt)
        known = {name: getattr(task, name) for name in KNOWN}
        return found or detached(end.attempt.from_queue.schema, known | {"state": COMPLETED})
