"""The parts of a worker, and what they tell each other."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import PoolProxiedConnection

from apoq.client.queue import Queue
from apoq.core.registry import Registry
from apoq.events import Events, LeaseLost, TasksRescued
from apoq.postgres.connections import own_engine
from apoq.postgres.urls import sync_side
from apoq.postgres.watchdog import CHECK_INTERVAL_SECONDS, watch
from apoq.schema.statements.claim import CLAIM, ID, TYPE
from apoq.schema.statements.notify import has_tasks
from apoq.schema.statements.settle import LOCK_TIMEOUT
from apoq.worker.claim_log import ClaimLog
from apoq.worker.claiming.claimer import Claimer
from apoq.worker.claiming.cursor import ClaimCursor
from apoq.worker.claiming.listener import Listener, listen_engine
from apoq.worker.claiming.scanner import QueueScanner
from apoq.worker.execution.attempt import (
    AnyAttempt,
    AsyncAttempt,
    Attempt,
    Claimed,
    StopSignal,
)
from apoq.worker.execution.completion import Completion
from apoq.worker.execution.deadlines import Deadlines
from apoq.worker.execution.event_loop import EventLoopThread
from apoq.worker.execution.executor import Executor, released
from apoq.worker.execution.runner import AttemptResult, ended, overdue, run, run_coroutine
from apoq.worker.execution.task_sessions import TaskSessions
from apoq.worker.failures import Outage
from apoq.worker.liveness.heartbeat import GRACE_HEARTBEATS, HEARTBEATS_PER_LEASE, Heartbeat
from apoq.worker.liveness.lost_tasks import LostTaskMonitor
from apoq.worker.loop import Loop
from apoq.worker.maintenance.pruner import Pruner
from apoq.worker.maintenance.sweep import Sweep
from apoq.worker.options import WorkerOptions
from apoq.worker.settling.counters import Counter
from apoq.worker.settling.settler import Settler
from apoq.worker.threads import MissingThreads

logger = logging.getLogger(__name__)

RESURVEY_SECONDS: Final = 0.05
"""Seconds after a claim in which the scanner looks whether that was all."""

SETTLE_ON_STOP_SECONDS: Final = 5.0
"""Seconds in which what has ended is settled, at the end."""

STOP_OVERTIME_SECONDS: Final = 1.5
"""Seconds after the time to stop in which that must be done."""

CANCEL_ON_STOP_SECONDS: Final = 1.0
"""Those of them in which cancelled coroutines may end."""

CUT_THREAD_SECONDS: Final = 0.25
"""Seconds after which a thread has ended whose connection was cut."""

BUSY_RESURVEY_SECONDS: Final = 0.25
"""The same, where there is more: in which a priority that is new and higher is found."""


class Runtime:
    """Claimer, slots, settler and the others, joined: a task goes from one to the next.

    .. code-block:: text

        listener ─notification─▶ claimer ─rows─▶ executor ─ends─▶ settler
        scanner ───────▶    ▲               │ room
        heartbeat ─────▶    └───────────────┘

    None of them knows another one but through what is passed to it here.
    """

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        queues: tuple[Queue, ...],
        registry: Registry,
        events: Events,
        options: WorkerOptions,
        counter: Counter,
    ) -> None:
        self._events = events
        self.outage = Outage(on_away=self._give_back_line, report=events.report)
        self.engine = own_engine(sync_side(engine), lock_timeout=LOCK_TIMEOUT)
        listening = self.engine if options.listen_url is None else listen_engine(options.listen_url)
        self._listening_engine = listening
        self._schemas = tuple(dict.fromkeys(queue.schema for queue in queues))
        self._signals = {schema: StopSignal() for schema in self._schemas}
        self._by = math.inf
        self._beside: set[AnyAttempt] = set()  # what runs in no slot, but on the thread of `work`
        self.event_loop = EventLoopThread()
        self.sessions = TaskSessions(engine, self.event_loop)
        self.claim_log = ClaimLog()
        self.heartbeat = Heartbeat(
            sync_side(engine),
            queues,
            self.outage,
            self.claim_log,
            concurrency=options.concurrency,
            lease=options.lease,
            on_rescued=self._rescued,
            on_unknown=self._doubt,
            on_lapse=self._lapsed,
        )
        self._completion = Completion(events, keep=options.keeps_completed)
        self._counter = counter
        self.settler = Settler(
            self.engine,
            events,
            self._completion,
            counter,
            self._schemas,
            self.outage,
            self.claim_log,
            on_pending=self._look,
        )
        self.missing = MissingThreads(self.outage)
        self.deadlines = Deadlines(self._put_overdue, self.outage, self.missing)
        self.executor = Executor(
            options.concurrency,
            self.event_loop,
            self._completion,
            self.deadlines,
            self.missing,
            make=self._make,
            on_ended=self._put_ended,
            on_low=self._wake_claimer,
        )
        positions = {queue: ClaimCursor() for queue in queues}
        self.scanner = QueueScanner(
            self.engine,
            positions,
            registry,
            self.heartbeat.leases,
            self.outage,
            poll_interval=options.poll_interval.total_seconds(),
            on_due=self.look_for_tasks,
        )
        self.claimer = Claimer(
            self.engine,
            queues,
            registry,
            self.executor,
            self.claim_log,
            self.outage,
            events,
            positions=positions,
            leases=self.heartbeat.leases,
            signals=self._signals,
            on_claim=self._claimed,
            make=self._make,
            put_ended=self._put_ended,
        )
        self.listener = Listener(
            self.engine,
            listening,
            frozenset(has_tasks(queue.schema, queue.name) for queue in queues),
            on_notification=self._notified,
            on_cancelled=self._cancelled,
            on_listening=self._listens,
        )
        self.lost_task_monitor = LostTaskMonitor(
            self.engine,
            self._schemas,
            self.outage,
            self.claim_log,
            running=lambda: [*self.executor.running(), *self._beside],
            interval=options.lease.total_seconds() / HEARTBEATS_PER_LEASE,
            on_lost=self._lost,
        )
        pruner = Pruner(
            self.engine,
            queues,
            self.heartbeat.leases,
            self.outage,
            keep_completed=options.keep_completed,
            keep_failed=options.keep_failed,
        )
        sweep = Sweep(
            self.engine,
            self.heartbeat.leases,
            self.outage,
            grace=options.lease.total_seconds() / HEARTBEATS_PER_LEASE * GRACE_HEARTBEATS,
            on_rescued=self._rescued,
        )
        self.on_death: Callable[[], None] = lambda: None
        """Called when a thread of the worker's has ended that shouldn't."""
        self.settling = self.loop("apoq-settler", self.settler.turn, self._flush)
        self.claiming = self.loop("apoq-claimer", self.claimer.turn)
        self.scanning = self.loop("apoq-scanner", self.scanner.turn)
        self.monitoring = self.loop("apoq-lost-tasks", self.lost_task_monitor.turn)
        self.listening = self.loop("apoq-listener", self.listener.turn)
        self.pruning = self.loop("apoq-pruner", pruner.turn)
        self.sweeping = self.loop("apoq-sweep", sweep.turn)
        # The claimer is last: if one of them can't be started, nothing has been claimed.
        self.loops = (
            self.settling,
            self.listening,
            self.scanning,
            self.pruning,
            self.sweeping,
            self.claiming,
        )
        """Those that run from a start to a stop."""

    def loop(
        self, name: str, turn: Callable[[], float | None], on_stop: Callable[[], None] = lambda: None
    ) -> Loop:
        """Make a loop of this worker's."""
        return Loop(name, turn, self.outage, on_death=self._died, on_stop=on_stop)

    def open(self) -> None:
        """Make ready to start."""
        self.executor.open()
        self.listener.open()
        self.claimer.look_again()

    def start(self) -> None:
        """Claim, run and settle from now on, each on its thread; RuntimeError if one can't be started."""
        for loop in self.loops:
            loop.start()

    def retry_threads(self) -> None:
        """Try again to start the threads that could not be started."""
        self.missing.retry()
        self.executor.put(())  # what waits for them

    def run_beside(self, attempt: AnyAttempt) -> AttemptResult:
        """Run an attempt on the caller's thread, beside those in the slots."""
        self._beside.add(attempt)
        try:
            if isinstance(attempt, AsyncAttempt):
                end: AttemptResult = self.event_loop.run(
                    run_coroutine(attempt, self._completion, self.deadlines)
                )
                return end
            return run(attempt, self._completion, self.deadlines)
        finally:
            self._beside.discard(attempt)

    def is_current(self) -> bool:
        """Tell whether the caller is a processor or a listener of this worker's, on a thread of its own."""
        return self.executor.is_current() or self.settling.is_current()

    def look_for_tasks(self) -> None:
        """Look for due tasks now."""
        self.claimer.look_again()
        self.claiming.wake()

    def stop(self, patience: float | None) -> float:
        """Claim no more, give back what has not begun, and wait so many seconds for what runs.

        Return when all else must be done as well, by time.monotonic(): from then on no statement is sent, and
        the connections are cut on which an answer is awaited.
        """
        ends_at = math.inf if patience is None else time.monotonic() + patience
        for signal in self._signals.values():
            signal.is_given = True
        self.executor.close()
        claiming = (self.scanning, self.claiming, self.pruning, self.sweeping)
        for loop in claiming:
            loop.end()
        self._give_back_line()
        is_idle = self.executor.wait_until_idle(patience)
        by = min(time.monotonic() + SETTLE_ON_STOP_SECONDS, ends_at + STOP_OVERTIME_SECONDS)
        self._by = by
        self.limit(by)
        if not is_idle:
            left = self.deadlines.withdraw(self.executor.abandon())
            logger.warning("%d tasks still ran when the time to stop was up, and are given back", len(left))
            self._give_back(left)
            self.event_loop.cancel(CANCEL_ON_STOP_SECONDS)
            if self.event_loop.is_closed:
                # They never end, and their transactions may hold the tasks' rows.
                for attempt in left:
                    if isinstance(attempt, AsyncAttempt):
                        attempt.cut_off()
        for loop in claiming:
            self.end(loop, by)
        if not self.settling.is_alive:
            self._flush()  # its thread has ended, or could not be started
        elif not self.end(self.settling, by):
            logger.warning("what has ended could not be settled in time; others will run these tasks again")
        self.executor.stop()
        self.missing.clear()
        self.listener.stop()
        self.end(self.listening, by)
        self.listener.close()
        # For the next start; those that run on are told to stop still.
        self._signals.update({schema: StopSignal() for schema in self._schemas})
        return by

    def end(self, loop: Loop, by: float) -> bool:
        """Stop a loop, and wait until then for its last turn to end; tell whether it has."""
        if loop.stop(left_until(by)):
            return True
        watch.cut_overdue()
        return loop.stop(left_until(by + CUT_THREAD_SECONDS))

    def limit(self, by: float | None) -> None:
        """Send no statement after this, by time.monotonic(), and cut what waits then; None: no limit."""
        for engine in {self.engine, self.heartbeat.engine, self._listening_engine}:
            watch.limit(engine, by)

    def dispose(self, by: float) -> None:
        """Close what was opened here, by then."""
        if self.event_loop.is_blocked:
            by = 0.0  # nothing more comes of waiting for that loop
        self.sessions.dispose(left_until(by))
        self.event_loop.stop(left_until(by))
        self.heartbeat.dispose()
        self.engine.dispose()

    def _died(self) -> None:
        self.on_death()

    def _make(self, row: Claimed) -> AnyAttempt:
        processor = row[CLAIM].processors[row[TYPE]]
        if processor.is_coroutine:
            return AsyncAttempt(row, processor, self.sessions.open_async)
        return Attempt(row, processor, self.sessions.open)

    def _put_ended(self, end: AttemptResult) -> None:
        if end.row is not None and end.outcome is None and not self._is_followed(end):
            self._counter.count(None)
            self.claim_log.settled([end.attempt.row])  # it is written already, and nobody is to be told
            return
        self.settler.put(end)
        self.settling.wake()

    def _is_followed(self, end: AttemptResult) -> bool:
        return self._completion.is_heard or end.seconds is not None

    def _put_overdue(self, attempt: AnyAttempt, thread_id: int) -> None:
        self._put_ended(ended(attempt, overdue(attempt.timeout or 0.0, thread_id)))
        if not self.settling.is_alive:
            self.settler.turn()  # nobody else takes turns beside `work`

    def _lapsed(self, schemas: list[str | None]) -> None:
        self._events.report(LeaseLost(tuple(schemas), is_everywhere=len(schemas) == len(self._schemas)))
        for schema in schemas:
            self._signals[schema].is_given = True
            self._signals[schema] = StopSignal()  # for what is claimed when it is renewed
        self._give_back(self.executor.take_back(schemas))
        for attempt in self.executor.running():
            if attempt.from_queue.schema in schemas:
                attempt.cut_off()
        if not any(lease.is_held for lease in self.heartbeat.leases.values()):
            # It isn't one schema, it is the connection. Else the others would find out one by one.
            watch.cut_all(self.engine)
            self.listener.renew()
            self.sessions.renew()

    def _doubt(self) -> None:
        self.claimer.doubt()
        self.look_for_tasks()

    def _notified(self, connection: PoolProxiedConnection | None) -> None:
        self.claimer.look_again()
        # On the connection that has just heard: its session is awake, where another has to wake up first.
        self.claiming.take_turn(partial(self.claimer.turn, connection))

    def _cancelled(self, ids: set[int]) -> None:
        if self.lost_task_monitor.look_for(ids):
            self.monitoring.wake()

    def _lost(self, tasks: list[Claimed]) -> None:
        self.claim_log.settled(self.executor.recall(tasks))
        for attempt in list(self._beside):
            if any(attempt.row is row for row in tasks):
                attempt.recall()

    def _listens(self) -> None:
        self.listening.recovered()
        # What was cancelled before has notified nobody.
        self._cancelled({row[ID] for row in self.claim_log.held()})

    def _rescued(self, event: TasksRescued) -> None:
        self._events.report(event)
        self.look_for_tasks()

    def _claimed(self, count: int, wanted: int) -> None:
        # Was that all? Where nothing was found, whoever gave the notification may have meant something else.
        self._look(BUSY_RESURVEY_SECONDS if count == wanted else RESURVEY_SECONDS if count else 0.0)

    def _look(self, seconds: float = 0.0) -> None:
        if self.scanner.look_in(seconds):
            self.scanning.wake()

    def _give_back_line(self) -> None:
        """Give back what has not begun.

        Also if the database is away: each would fail as soon as it used its session, one after the other.
        What is claimed from then on may begin, for a claim that succeeds shows that the database is back.
        """
        self._give_back(self.executor.take_back())

    def _give_back(self, attempts: list[AnyAttempt]) -> None:
        for attempt in attempts:
            self._put_ended(released(attempt))

    def _flush(self) -> None:
        """Settle what has ended; on the settler's thread, for it may have to connect, and that takes long."""
        try:
            self.settler.flush(left_until(self._by - CHECK_INTERVAL_SECONDS))
        except Exception as error:  # noqa: BLE001
            logger.warning("some tasks could not be settled; others will run them again: %s", error)

    def _wake_claimer(self) -> None:
        if self.claimer.waits_for_room:
            self.claiming.wake()


def left_until(by: float) -> float:
    """Return the seconds until this time, by time.monotonic(); zero after it."""
    return max(0.0, by - time.monotonic())
