"""The parts of a worker, and how a task goes from one to the next."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.client.queue import Queue
from apoq.core.registry import Registry
from apoq.events import Events, LeaseLost
from apoq.postgres.connections import own_engine
from apoq.postgres.urls import sync_side
from apoq.postgres.watchdog import CHECK_INTERVAL_SECONDS, watch
from apoq.tracing import Tracer
from apoq.worker import logs
from apoq.worker.claim_log import ClaimLog
from apoq.worker.claiming.claimable_queue import ClaimableQueue
from apoq.worker.claiming.claimer import Claimer
from apoq.worker.claiming.cursor import ClaimCursor
from apoq.worker.claiming.declared_limits import DeclaredLimits
from apoq.worker.claiming.hand_over import HandOver
from apoq.worker.claiming.intake import Intake
from apoq.worker.claiming.listener import Listener, listen_engine
from apoq.worker.claiming.scanner import QueueScanner
from apoq.worker.claiming.strays import Strays
from apoq.worker.database import WorkerDatabase
from apoq.worker.execution.attempt import AnyAttempt, AsyncAttempt, IsolatedAttempt, StopSignal
from apoq.worker.execution.completion import Completion
from apoq.worker.execution.deadlines import Deadlines
from apoq.worker.execution.event_loop import EventLoopThread
from apoq.worker.execution.executor import Executor, released
from apoq.worker.execution.runners import make_runner
from apoq.worker.execution.task_sessions import TaskSessions
from apoq.worker.failures import Outage
from apoq.worker.isolation.runner import IsolatedRunner
from apoq.worker.liveness.heartbeat import GRACE_HEARTBEATS, HEARTBEATS_PER_LEASE, Heartbeat
from apoq.worker.liveness.lost_tasks import LostTaskMonitor
from apoq.worker.liveness.registration import Registration
from apoq.worker.maintenance.place_sweep import PlaceSweep
from apoq.worker.maintenance.pruner import Pruner
from apoq.worker.maintenance.sweep import Sweep
from apoq.worker.maintenance.ticker import Ticker
from apoq.worker.observer import Observer
from apoq.worker.options import WorkerOptions
from apoq.worker.places import Places
from apoq.worker.progress import ProgressWriter
from apoq.worker.recycling import LimitWatch
from apoq.worker.service import Service, left_until
from apoq.worker.settling.counters import Counter
from apoq.worker.settling.settler import Settler
from apoq.worker.settling.settlers import Settlers
from apoq.worker.settling.unblocking import Unblocker
from apoq.worker.threads import MissingThreads

LOCK_TIMEOUT: Final = "500ms"
"""The time that a worker's connections wait for a lock: less than `deadlock_timeout`, which is one second.

Without it, a caller who cancels one of the tasks and doesn't commit would block all others. And if a caller
and a worker lock the same rows in a different order, the worker's statement must fail, not the caller's. But
`lock_timeout` has no effect on tables that Citus shards: there, statements skip locked rows.
"""

SETTLE_ON_STOP_SECONDS: Final = 5.0
"""Seconds for which a worker that stops tries to write the results of its tasks."""

STOP_OVERTIME_SECONDS: Final = 1.5
"""Seconds for which it may do so after its time to stop is up."""

CANCEL_ON_STOP_SECONDS: Final = 1.0
"""Seconds within which cancelled coroutines should end then."""

CUT_THREAD_SECONDS: Final = 0.25
"""Seconds within which a thread ends whose connection was cut."""


class Runtime:
    """Connects the services of a worker: claimed tasks go to the executor, and their results to the settler.

    .. code-block:: text

        listener ─notification─▶ claimer ──tasks──▶ executor ─results─▶ settler
        scanner ──────due──────▶    ▲                ▲    │
        heartbeat ───rescued───▶    └───free slots───┼────┤
        ticker ───────due──────▶                     │    ▼
                                                 hand-over ◀─free places─ place settler
    """

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        queues: tuple[Queue, ...],
        registry: Registry,
        events: Events,
        options: WorkerOptions,
        name: str,
        counter: Counter,
        observer: Observer | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`name` is what people call the worker."""
        self._queues = queues
        self._events = events
        self.outage = outage = Outage(on_away=self._release_line, report=events.report)
        self.engine = own_engine(sync_side(engine), lock_timeout=LOCK_TIMEOUT)
        self._listening_engine = (
            self.engine if options.listen_url is None else listen_engine(options.listen_url)
        )
        cursors = {queue: ClaimCursor() for queue in queues}
        heartbeat_seconds = options.lease.total_seconds() / HEARTBEATS_PER_LEASE
        poll_seconds = options.poll_interval.total_seconds()
        self._signals = {queue.schema: StopSignal() for queue in queues}
        self.places = places = Places()
        self.claim_log = ClaimLog(places)
        sharded: set[str | None] = set()
        self.missing = MissingThreads(outage)
        self.heartbeat = Heartbeat(
            sync_side(engine),
            queues,
            outage,
            self.claim_log,
            sharded,
            concurrency=options.concurrency,
            lease=options.lease,
            release=options.release,
            on_rescued=self._rescued,
            on_unknown=self._look_for_strays,
            on_lapse=self._lapsed,
        )
        leases = self.heartbeat.leases
        database = WorkerDatabase(self.engine, queues, leases, outage, sharded)
        self.strays = Strays(database, self.claim_log)
        self.scanner = QueueScanner(
            database, cursors, registry, poll_interval=poll_seconds, on_due=self.look_for_tasks
        )
        self.unblocker = Unblocker(database, events, poll_interval=poll_seconds, on_unblocked=self._unblocked)
        completion = Completion(events, keep=options.keeps_completed)
        self.settlers = Settlers(
            lambda name: Settler(
                name,
                database,
                events,
                completion,
                counter,
                self.claim_log,
                on_pending=self.scanner.look_into,
                on_followed=self._followed,
            )
        )
        self.event_loop = EventLoopThread()
        self.sessions = TaskSessions(engine, self.event_loop)
        self.deadlines = Deadlines(self.settlers.put_overdue, outage, self.missing)
        self.isolated = IsolatedRunner(engine, self.engine, queues, registry, options.isolated_engine, outage)
        self.executor = Executor(
            options.concurrency,
            self.event_loop,
            self.sessions,
            make_runner(tracer, self.isolated.run),
            completion,
            self.deadlines,
            self.missing,
            on_ended=self.settlers.put,
            on_low=self._slot_is_free,
            observer=observer,
        )
        self.progress = ProgressWriter(
            database, self.missing, self.claim_log, keeps_completed=options.keeps_completed
        )
        self.intake = Intake(
            self.engine,
            self.executor,
            self.claim_log,
            events,
            signals=self._signals,
            on_ended=self.settlers.put,
            on_progress=self.progress.put,
        )
        unkeyed, keyed = (
            [
                ClaimableQueue(queue, cursors[queue], leases[queue.schema], registry, is_keyed=is_keyed)
                for queue in queues
            ]
            for is_keyed in (False, True)
        )
        self.hand_over = HandOver(
            database,
            keyed,
            self.intake,
            self.executor,
            self.claim_log,
            self.strays,
            places,
            on_unblocked=self._has_unblocked,
            on_room=self._slot_is_free,
        )
        self.claimer = Claimer(
            database,
            unkeyed,
            keyed,
            self.executor,
            self.intake,
            self.hand_over,
            self.claim_log,
            self.scanner,
            self.strays,
            places,
            DeclaredLimits(database, registry, options.release),
            observer=observer,
        )
        self.lost_task_monitor = LostTaskMonitor(
            database, self.claim_log, self.executor, places, interval=heartbeat_seconds
        )
        self.listener = Listener(
            database,
            self._listening_engine,
            self.claimer,
            on_cancelled=self.lost_task_monitor.look_for,
            on_paused=self.intake.queue_is_paused,
            on_limited=self._limit_changed,
            on_linked=self.unblocker.check,
        )
        self._pruner = Pruner(
            database, keep_completed=options.keep_completed, keep_failed=options.keep_failed
        )
        self.ticker = Ticker(
            database, poll_interval=poll_seconds, release=options.release, on_due=self.look_for_tasks
        )
        self.sweep = Sweep(
            database, grace=heartbeat_seconds * GRACE_HEARTBEATS, on_rescued=self._look_in_schema
        )
        self.place_sweep = PlaceSweep(database, places, self.hand_over)
        self.registration = Registration(database, self.heartbeat, self.scanner, self.strays, self.missing)
        limits = options.limits
        self._limit_watch = (LimitWatch(limits, counter, outage, name),) if limits else ()
        # The claimer is last: if another one can't be started, nothing has been claimed.
        self._working = (
            *self._limit_watch,
            *self.settlers,
            self.hand_over,
            self.unblocker,
            self.listener,
            self.scanner,
            self._pruner,
            self.sweep,
            self.place_sweep,
            self.ticker,
            self.claimer,
        )
        """The services that run from a start to a stop."""
        self.essential = self.claimer, *self.settlers, self.hand_over
        """The services without which tasks don't go on."""
        self.services: tuple[Service, ...] = (self.registration, self.lost_task_monitor, *self._working)

    def start(self) -> None:
        """Claim, run and settle tasks from now on; raise RuntimeError if a thread can't be started."""
        self.progress.open()
        for service in self._working:
            service.start()

    def is_current(self) -> bool:
        """Return whether the caller is a processor or a listener that this worker called."""
        # A notification lets the listener's thread claim.
        services = (*self.settlers, self.unblocker, self.claimer, self.hand_over, self.listener)
        return self.executor.is_current() or any(service.is_current() for service in services)

    def look_for_tasks(self, queues: Iterable[Queue] | None = None) -> None:
        """Look for due tasks in these queues now, or in all."""
        self.claimer.look_for_tasks(queues)

    def unblock(self) -> bool:
        """Let waiting tasks be claimed for which places are free; return whether any were waiting."""
        self.place_sweep.look()
        has_any = bool(self.places)
        self.hand_over.unblock()
        return has_any

    def drain(self) -> None:
        """Claim no more tasks, and release those that have not begun; running ones go on, and are settled."""
        self.claimer.drain()
        self.hand_over.drain()
        self.executor.close()
        self.scanner.end()
        self._release_line()

    def stop(self, patience: float | None) -> float:
        """Stop claiming, release tasks that have not begun, and wait `patience` seconds for running ones.

        Returns when everything else must be done, by time.monotonic(): after that, no statement is sent, and
        connections are cut that still wait for the server.
        """
        ends_at = math.inf if patience is None else time.monotonic() + patience
        for signal in self._signals.values():
            signal.is_given = True
        self.executor.close()
        self.hand_over.drain()
        looking = (
            *(self.scanner, self.claimer, self._pruner, self.sweep, self.place_sweep, self.ticker),
            *self._limit_watch,
        )
        for service in looking:
            service.end()
        self._release_line()
        is_idle = self.executor.wait_until_idle(patience)
        by = min(time.monotonic() + SETTLE_ON_STOP_SECONDS, ends_at + STOP_OVERTIME_SECONDS)
        self.limit(by)
        if not is_idle:
            self._release_running()
        for service in looking:
            self.end(service, by)
        # Before the settlers, which write what it releases.
        self.end(self.hand_over, by)
        self._settle_last(by)
        self.end(self.unblocker, by)
        self.progress.close()
        if self.progress.is_alive:
            self.end(self.progress, by)
        else:
            self.progress.finish()  # no thread could be started that would do so
        # If this fails, the sweep of another worker finds the tasks that wait.
        with suppress(Exception):
            self.hand_over.unblock_all(by)
        self.executor.stop()
        self.missing.clear()
        self.end(self.listener, by)
        # For the next start; tasks that still run keep the old ones.
        self._signals.update({schema: StopSignal() for schema in self._signals})
        return by

    def _settle_last(self, by: float) -> None:
        """Write all results that are left, until then."""
        for settler in self.settlers:
            settler.ends_at = by - CHECK_INTERVAL_SECONDS
            if not settler.is_alive:
                settler.after_last_turn()  # its thread has died, or could not be started
            elif not self.end(settler, by):
                logs.results_late()

    def end(self, service: Service, by: float) -> bool:
        """Stop a service, and wait until then for its last turn; return whether that has ended."""
        if service.stop(left_until(by)):
            return True
        watch.cut_overdue()
        return service.stop(left_until(by + CUT_THREAD_SECONDS))

    def limit(self, by: float | None) -> None:
        """Send no statement after this, by time.monotonic(), and cut what waits then; None: no limit."""
        for engine in {self.engine, self.heartbeat.engine, self._listening_engine}:
            watch.limit(engine, by)

    def dispose(self, by: float) -> None:
        """Close the worker's own connections and event loop, by then."""
        if self.event_loop.is_blocked:
            by = 0.0  # waiting for it would not help
        self.isolated.pool.close()
        self.sessions.dispose(left_until(by))
        self.event_loop.stop(left_until(by))
        self.heartbeat.dispose()
        self.engine.dispose()

    def _lapsed(self, schemas: list[str | None]) -> None:
        """Give up the tasks of these schemas, because other workers may take them now."""
        self._events.report(LeaseLost(tuple(schemas), is_everywhere=len(schemas) == len(self._signals)))
        for schema in schemas:
            self._signals[schema].is_given = True
            self._signals[schema] = StopSignal()  # for tasks that are claimed when the lease is renewed
        self._release(self.executor.take_back([queue for queue in self._queues if queue.schema in schemas]))
        for attempt in self.executor.running():
            if attempt.from_queue.schema in schemas:
                attempt.cut_off()
        if not any(lease.is_held for lease in self.heartbeat.leases.values()):
            # The connection is at fault, not one schema: others would notice one after the other.
            watch.cut_all(self.engine)
            self.listener.renew()
            self.sessions.renew()

    def _rescued(self, schema: str | None) -> None:
        self._look_in_schema(schema)
        self.unblocker.hurry(schema)

    def _look_in_schema(self, schema: str | None) -> None:
        self.place_sweep.look_into(schema)  # the places of tasks that were rescued are free
        self.claimer.look_for_tasks([queue for queue in self._queues if queue.schema == schema])

    def _followed(self, schema: str | None, completed: list[int], failed: list[int]) -> None:
        self.unblocker.put(schema, completed=completed, failed=failed)

    def _unblocked(self, schema: str | None, due_in: dict[str, float]) -> None:
        """Look for tasks that have just become pending in these queues."""
        for queue in self._queues:
            seconds = due_in.get(queue.name) if queue.schema == schema else None
            if seconds is not None and seconds <= 0:
                self.claimer.look_for_tasks([queue])
            elif seconds is not None:
                self.scanner.look_into(queue, seconds)

    def _has_unblocked(self, queue: Queue) -> None:
        """Look for tasks that may begin again."""
        self.look_for_tasks([queue])
        self.scanner.look_into(queue)

    def _limit_changed(self, queue: Queue) -> None:
        """Look at the tasks of a queue that may begin, or must not begin, because of another limit."""
        self.place_sweep.look_into(queue.schema)
        self.scanner.look_into(queue)
        self.look_for_tasks([queue])

    def _look_for_strays(self) -> None:
        self.claimer.look_for_strays()

    def _slot_is_free(self) -> None:
        self.claimer.slot_is_free()

    def _release_running(self) -> None:
        left = self.deadlines.withdraw(self.executor.abandon())
        if left:
            logs.tasks_released_at_stop(len(left))
        for attempt in left:
            if isinstance(attempt, IsolatedAttempt):
                attempt.cut_off()  # first, because other workers begin them as soon as they are released
        self._release(left)
        self.event_loop.cancel(CANCEL_ON_STOP_SECONDS)
        if self.event_loop.is_closed:
            # These coroutines never end, and their transactions may hold the tasks' rows.
            for attempt in left:
                if isinstance(attempt, AsyncAttempt):
                    attempt.cut_off()

    def _release_line(self) -> None:
        """Release tasks that have not begun.

        Also when the database goes away: otherwise each would fail as soon as it used its session. Tasks that
        are claimed after that may begin, because a claim that succeeds shows that the database is back.
        """
        self.intake.release_line()

    def _release(self, attempts: list[AnyAttempt]) -> None:
        for attempt in attempts:
            self.settlers.put(released(attempt))
