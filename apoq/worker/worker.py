"""The worker: ties together what claims, runs, settles, beats and listens."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import URL, Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from apoq.connections import is_away, own_engine
from apoq.databases import check_dialect
from apoq.errors import InvalidProcessor
from apoq.events import Events
from apoq.migrations.prepare import check
from apoq.model import Task, detached
from apoq.queue import Queue
from apoq.registry import Around, Registry, make_processor
from apoq.retry import DEFAULT_RETRY_LIMIT, RetryDelay, exponential_backoff, seconds
from apoq.statements.hint import payload
from apoq.states import COMPLETED
from apoq.typed import TypedTask
from apoq.watch import watch
from apoq.worker.attempts import Ended, ended, overdue, run, run_coroutine
from apoq.worker.claimer import Claimer
from apoq.worker.completion import Completion
from apoq.worker.coroutines import Coroutines
from apoq.worker.deadlines import Deadlines
from apoq.worker.heartbeat import BEATS, Heartbeat
from apoq.worker.listener import Listener, listen_engine
from apoq.worker.loop import Loop, Outage
from apoq.worker.position import Position
from apoq.worker.process import PROCESS
from apoq.worker.pruner import Pruner
from apoq.worker.recaller import Recaller
from apoq.worker.running import KNOWN, AnyRunningTask, AsyncRunningTask, Batch, Claimed, Notice, RunningTask
from apoq.worker.scout import Scout
from apoq.worker.settler import Settler
from apoq.worker.slots import Slots, released
from apoq.worker.tally import Counter, Tally
from apoq.worker.task_sessions import TaskSessions

logger = logging.getLogger(__name__)

AFTERMATH: Final = 0.05
"""Seconds after a claim in which the scout looks whether that was all."""

BUSY: Final = 0.25
"""The same, where there is more: in which a priority that is new and higher is found."""

GRACE: Final = timedelta(seconds=25)
"""What `run` gives running tasks to end after a signal: a little less than Kubernetes' 30 s."""


class Worker:
    """Works the tasks of one or more queues.

    Each task is claimed in a short transaction of its own, run outside any, and settled with others. Any
    number of workers, in any number of processes, share the work. A worker that dies is noticed by the
    others within its `lease`, and its tasks are run again.

    In an application, `start` and `stop` may be called from any thread, any number of times. A program that
    ends and hasn't stopped its worker is held up by it for a second at most, in which short tasks end and
    all others are given back.

    After a fork, a worker that was started goes on in the parent. In the child it hasn't started: it keeps
    its processors, listeners and options, and `start` or `work` there begin a life of their own, on
    connections of their own. So that the two don't speak on the same ones, the engine has a new pool in the
    child, as by ``engine.dispose(close=False)``. Other engines and open sessions are the application's care.
    """

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        *queues: Queue,
        concurrency: int = 4,
        poll_interval: timedelta = timedelta(seconds=2),
        lease: timedelta = timedelta(seconds=15),
        keep_completed: timedelta | None = timedelta(days=1),
        keep_failed: timedelta | None = timedelta(days=7),
        listen_url: str | URL | None = None,
        around: Around | None = None,
    ) -> None:
        """Prepare to work these queues (none given: the default one) in the database of `engine`.

        The engine serves the sessions of processors, so its pool should have `concurrency` connections;
        the worker's own few are apart from it. `concurrency` is how many tasks run at once, plain functions
        and coroutine functions together. `poll_interval` is how often an idle worker looks where no hint
        wakes it, and `lease` how long after its death its tasks are taken over by others. Completed tasks are
        deleted `keep_completed` after their completion, failed and cancelled ones after `keep_failed`; None
        keeps them for ever, and with zero a task is deleted instead of being marked as completed.
        `listen_url` leads to the same database past a pooler in transaction mode, through which no hint could
        arrive; only the connection that listens is opened there. `around` answers a context manager for a
        running task, such as an application's context: its processor is called in it, and the completion is
        written after it. What the context manager raises fails the attempt.
        """
        if not isinstance(engine, Engine | AsyncEngine):
            # Its type only: a URL holds a password.
            raise TypeError(f"a worker takes an Engine or an AsyncEngine, not {type(engine).__qualname__}")
        check_dialect(engine.dialect)
        for queue in queues:
            if not isinstance(queue, Queue):
                raise TypeError(
                    f"a worker takes queues after its engine, such as Queue('emails'), not {queue!r}"
                )
        _check_concurrency(concurrency)
        for name, value in (("poll_interval", poll_interval), ("lease", lease)):
            if not isinstance(value, timedelta) or value <= timedelta():
                raise ValueError(f"{name} is a timedelta longer than nothing, not {value!r}")
        for name, keep in (("keep_completed", keep_completed), ("keep_failed", keep_failed)):
            if keep is not None and (not isinstance(keep, timedelta) or keep < timedelta()):
                raise ValueError(f"{name} is a timedelta, or None for ever, not {keep!r}")
        self.events = Events()
        # Two that are equal are one, whose typed tasks were said in two places.
        self._queues = tuple(dict.fromkeys(queues or (Queue(),)))
        self._registry = Registry(around)
        for queue in queues:
            queue.register_in(self._registry)
        self._assemble = partial(
            self._put_together,
            engine,
            concurrency=concurrency,
            poll_interval=poll_interval,
            lease=lease,
            keep_completed=keep_completed,
            keep_failed=keep_failed,
            listen_url=listen_url,
        )
        self._given_engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        self._assemble()
        self._on_death: Callable[[], None] = lambda: None
        PROCESS.enter(self, Worker._begin_anew)

    def _put_together(
        self,
        engine: Engine | AsyncEngine,
        *,
        concurrency: int,
        poll_interval: timedelta,
        lease: timedelta,
        keep_completed: timedelta | None,
        keep_failed: timedelta | None,
        listen_url: str | URL | None,
    ) -> None:
        """Make the parts: those of a worker that hasn't started."""
        self._own_engine = own_engine(self._given_engine)
        listening = self._own_engine if listen_url is None else listen_engine(listen_url)
        self._lock = threading.RLock()
        self._enlisted = 0
        self._is_started = False
        self._has_entered = False
        self._beside: set[AnyRunningTask] = set()  # what `work` runs
        self._notice = Notice()
        outage = Outage()
        self._coroutines = Coroutines()
        self._sessions = TaskSessions(engine, self._coroutines)
        self._heartbeat = Heartbeat(
            self._given_engine,
            self._queues,
            concurrency=concurrency,
            lease=lease,
            on_rescued=self._hint,
            on_lapse=self._lapsed,
        )
        lease_ = self._heartbeat.lease
        self._completion = Completion(self.events, lease_, keep=keep_completed != timedelta())
        self._counter = Counter()
        self._settler = Settler(
            self._own_engine,
            self.events,
            self._completion,
            self._counter,
            on_settled=self._settled,
            on_pending=self._look,
        )
        self._deadlines = Deadlines(self._put_overdue, outage)
        self._slots = Slots(
            concurrency,
            self._coroutines,
            self._completion,
            lease_,
            self._deadlines,
            make=self._make,
            on_ended=self._put_ended,
            on_low=self._wake_claimer,
        )
        positions = {queue: Position() for queue in self._queues}
        self._scout = Scout(
            self._own_engine,
            positions,
            self._registry,
            poll_interval=poll_interval.total_seconds(),
            on_due=self._hint,
        )
        self._claimer = Claimer(
            self._own_engine,
            self._queues,
            self._registry,
            self._slots,
            positions=positions,
            lease=lease_,
            on_claim=self._claimed,
            make=self._make,
            put_ended=self._put_ended,
        )
        payloads = frozenset(payload(queue.schema, queue.name) for queue in self._queues)
        self._listener = Listener(
            self._own_engine,
            listening,
            payloads,
            on_hint=self._hint,
            on_cancelled=self._cancelled,
            on_listening=self._listens,
        )
        self._recaller = Recaller(
            self._own_engine,
            lambda: list(self._claimer.held.values()),
            interval=lease.total_seconds() / BEATS,
            on_lost=self._lost,
        )
        self._pruner = Pruner(
            self._own_engine, self._queues, keep_completed=keep_completed, keep_failed=keep_failed
        )
        loop = partial(Loop, outage=outage, on_death=self._maimed)
        self._settling = loop("apoq-settler", self._settler.turn)
        self._claiming = loop("apoq-claimer", self._claimer.turn, on_failure=self._claimer.doubt)
        self._scouting = loop("apoq-scout", self._scout.turn)
        self._beating = loop("apoq-heartbeat", self._beat)
        self._recalling = loop("apoq-recaller", self._recaller.turn)
        self._listening = loop("apoq-listener", self._listener.turn)
        self._pruning = loop("apoq-pruner", self._pruner.turn)
        self._loops = (self._settling, self._listening, self._scouting, self._claiming, self._pruning)

    def _begin_anew(self) -> None:
        """Be a worker that hasn't started, in a child that was forked.

        The threads and the sockets are the parent's. So are the connections in the pool of the caller's
        engine, on which the parent's processors may be writing just now: it gets another here, as
        SQLAlchemy advises.
        """
        PROCESS.keep(vars(self).copy(), self._given_engine.pool)
        self._given_engine.dispose(close=False)
        self._assemble()

    def __repr__(self) -> str:
        return f"<Worker of {', '.join(map(repr, self._queues))} concurrency={self._slots.concurrency}>"

    def adjust(self, *, queues: Iterable[str] | None = None, concurrency: int | None = None) -> None:
        """Change what it was made for, before it starts: what the command line's options do.

        It works only those of its queues that have one of these names, or another number of tasks at once.
        """
        if self._enlisted:
            raise RuntimeError("adjust a worker before it starts")
        if queues is not None:
            names, known = set(queues), [queue.name for queue in self._queues]
            if not names or not names.issubset(known):
                raise ValueError(
                    f"this worker's queues are {', '.join(known)}, not {', '.join(names - {*known})}"
                )
            self._queues = tuple(queue for queue in self._queues if queue.name in names)
        if concurrency is not None:
            _check_concurrency(concurrency)
            self._assemble = partial(self._assemble, concurrency=concurrency)
        self._assemble()

    def use(
        self,
        type: str,
        processor: Callable[[Any], Any],
        *,
        retry_limit: int = DEFAULT_RETRY_LIMIT,
        retry_delay: RetryDelay = exponential_backoff,
        timeout: float | timedelta | None = None,
    ) -> None:
        """Work tasks of this type with `processor`, a plain or a coroutine function of the running task.

        Returning completes the task, whatever the value; raising fails the attempt, which is tried again up
        to `retry_limit` times, after the seconds (or the timedelta) that `retry_delay` answers for the
        number of failures so far. By raising `Retry`, `Cancel` or `Snooze` it chooses itself what becomes of
        the task.

        An attempt that runs longer than `timeout` (seconds or a timedelta; None: no limit) fails with a
        `TimeoutError`. A coroutine is cancelled for it. A plain function can't be stopped: at its limit
        `task.stopping` turns true and the attempt has failed, so that the retry may begin, here or
        elsewhere. What the function still answers is refused, and what it wrote to `task.session` undone;
        but it goes on, and its slot stays taken until it returns. So let it look at `task.stopping`, or
        give what it waits for a timeout of its own.

        It is worked so in all queues of this worker. Raises `InvalidProcessor` where the type has a processor
        already, be it by a typed task of one of them, or where an option makes no sense.
        """
        if isinstance(processor, TypedTask):
            raise InvalidProcessor(
                f"{processor!r} is a typed task, which a worker of its queue knows: Worker(engine, queue)"
            )
        made = make_processor(
            type, processor, retry_limit=retry_limit, retry_delay=retry_delay, timeout=timeout
        )
        self._registry.use(type, made)
        self._hint()

    def work(self) -> Task | None:
        """Claim, run and settle one due task on this thread; answer it, or None where nothing is due.

        It answers the task whether it completed or failed, as it then stands in the database.
        Raises `NotPrepared` where apoq's tables are missing or at another version.
        """
        self._enlist()
        try:
            task = self._claimer.claim_one()
            if task is None and self._scout.survey() <= 0:
                task = self._claimer.claim_one()
            if not self._is_started:
                self._settler.turn()
            if task is None:
                return None
            end = self._run(task)
            self._settler.settle(end)
            if isinstance(end.outcome, KeyboardInterrupt):
                raise end.outcome  # meant for the program, not for the task that happened to run
            return self._load(end)
        finally:
            self._discharge()

    def start(self, *, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Work in the background, on threads, until `stop`; return at once.

        Coroutine processors run on `loop`, the application's, or else on one of the worker's own. Touches no
        signals. Starting twice is harmless. Where the database is away, work begins when it is there. Raises
        `NotPrepared` where apoq's tables are missing or at another version.
        """
        if self._slots.is_current() or self._settling.is_current():
            return  # it runs, or the caller wouldn't; and a stop may be waiting for the caller
        with self._lock:
            if self._is_started:
                return
            self._coroutines.use(loop)
            self._claimer.hint()
            self._listener.open()
            self._is_started = True
            try:
                self._enlist(wait=False)
            except BaseException:
                self._is_started = False
                self._listener.close()
                raise
            if self._has_entered:
                self._start_loops()
            PROCESS.watch()
        logger.info("%r has started", self)

    def healthy(self) -> bool:
        """Tell whether the worker is at work: started, with all its threads, and heard by the database.

        What a health check asks. It is false while the database is away for longer than a few seconds, and
        true again by itself when that is over.
        """
        loops = (self._beating, self._recalling, *self._loops)
        return self._is_started and self._heartbeat.lease.is_held and all(loop.is_alive for loop in loops)

    @property
    def types(self) -> list[str]:
        """The types of tasks that it works."""
        return sorted({type_ for queue in self._queues for type_ in self._registry.of(queue)})

    def tally(self) -> Tally:
        """Answer how many tasks run now, and what became of those that have ended since it was made."""
        return self._counter.tally(len(self._slots.running()))

    @property
    def seen_at(self) -> datetime | None:
        """When the database last answered the worker's heartbeat, by this machine's clock."""
        return self._heartbeat.seen_at

    def stop(self, timeout: float | timedelta | None = None) -> None:
        """Claim no more, give back what has not begun, and wait for running tasks to end.

        From here on, `task.stopping` is true for those that run. After `timeout` (seconds or a timedelta;
        None waits for ever) those that still do are given back too, with no attempt used up: coroutines are
        cancelled, and what a thread still does is not settled. Stopping twice, or before starting, is
        harmless.
        """
        patience = None if timeout is None else seconds(timeout, "a timeout")
        if self._is_started:
            # Before the lock is taken, for another thread that stops holds it while it waits for this one.
            self._refuse_to_wait_for_itself()
        with self._lock:
            if not self._is_started:
                return
            self._refuse_to_wait_for_itself()
            self._notice.is_given = True
            if not self._has_entered:
                self._beating.stop()  # or else it might begin to work just now
            self._scouting.stop()
            self._claiming.stop()
            self._pruning.stop()
            self._give_back(self._slots.take_back())
            if not self._slots.wait_until_idle(patience):
                left = self._deadlines.withdraw(self._slots.abandon())
                logger.warning(
                    "%d tasks still ran when the time to stop was up, and are given back", len(left)
                )
                self._give_back(left)
                self._coroutines.cancel()
            self._finish_settling()
            self._slots.stop()
            self._listener.stop()
            self._listening.stop()
            self._listener.close()
            self._is_started = False
            self._notice = Notice()  # for the next start: those that heard of this stop are to stop still
            # Last: until here, what runs is this worker's.
            self._discharge()
        logger.info("%r has stopped", self)

    def run(
        self,
        *,
        timeout: float | timedelta = GRACE,
        on_start: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        """Start, wait for SIGINT or SIGTERM, and stop; from the main thread of a program of its own.

        A second signal ends the program at once. Should one of the worker's threads end, it stops as well,
        and this raises, so that whoever watches over the program starts another. `on_start` is called when it
        has started, with a function that stops it, from any thread; a signal after that is the first one
        still.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "run handles signals, which only the main thread can: elsewhere, call start and stop"
            )
        timeout = seconds(timeout, "a timeout")
        # Not an Event: a handler that sets it while the main thread begins to wait for it blocks for ever.
        signalled: SimpleQueue[int] = SimpleQueue()
        is_maimed = threading.Event()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

        def die() -> None:
            is_maimed.set()
            signalled.put(0)

        def first(number: int, _frame: object) -> None:
            restore()  # here, so that the second one does what it did before, even while this worker starts
            signalled.put(number)

        for number in before:
            signal.signal(number, first)
        self._on_death = die
        try:
            self.start()
            if on_start is not None:
                on_start(lambda: signalled.put(0))
            signalled.get()
        finally:
            try:
                self.stop(timeout)
            finally:
                restore()
        if is_maimed.is_set():
            raise RuntimeError("a thread of this worker has ended, as the log says, and so has the worker")

    def _maimed(self) -> None:
        self._on_death()

    def _refuse_to_wait_for_itself(self) -> None:
        if self._coroutines.is_current():
            raise RuntimeError(
                "stop would block the event loop on which this worker's coroutines run: "
                "`await asyncio.to_thread(worker.stop)`"
            )
        if self._slots.is_current() or self._settling.is_current():
            raise RuntimeError(
                "stop waits for the processors and listeners that run, and this is one of them: set a "
                "threading.Event here, and call stop where you wait for it"
            )

    def _enlist(self, *, wait: bool = True) -> None:
        """Show that this worker lives, before it claims anything; in its own time, unless told to `wait`."""
        with self._lock:
            if self._enlisted == 0:
                # Fresh each time, so that nothing an earlier life of this worker left behind looks alive.
                self._claimer.worker_id = self._heartbeat.worker_id = uuid4()
                self._has_entered = False
                try:
                    self._enter()
                except BaseException as error:
                    if wait or not is_away(error):
                        self._heartbeat.dispose()
                        self._own_engine.dispose()
                        raise
                self._beating.start()
                self._recalling.start()
            self._enlisted += 1

    def _beat(self) -> float | None:
        if not self._has_entered:
            self._enter()
            self._start_loops()
        return self._heartbeat.turn()

    def _start_loops(self) -> None:
        for loop in self._loops:
            loop.start()

    def _enter(self) -> None:
        with self._own_engine.begin() as connection:
            for schema in {queue.schema for queue in self._queues}:
                check(connection, schema)
        self._heartbeat.enter()
        # Before the first claim, which wouldn't know of priorities otherwise.
        self._scout.survey()
        self._has_entered = True

    def _discharge(self) -> None:
        with self._lock:
            self._enlisted -= 1
            if self._enlisted == 0:
                self._deadlines.stop()
                self._recalling.stop()
                self._beating.stop()
                try:
                    if self._has_entered:
                        self._heartbeat.leave()
                except Exception as error:  # noqa: BLE001 - the lease ends by itself
                    logger.warning("this worker's row could not be removed, and will be: %s", error)
                self._sessions.dispose()
                self._coroutines.stop()
                self._heartbeat.dispose()
                self._own_engine.dispose()

    def _run(self, task: AnyRunningTask) -> Ended:
        self._beside.add(task)
        try:
            if isinstance(task, AsyncRunningTask):
                end: Ended = self._coroutines.run(run_coroutine(task, self._completion, self._deadlines))
                return end
            return run(task, self._completion, self._deadlines)
        finally:
            self._beside.discard(task)

    def _load(self, end: Ended) -> Task:
        mapped = end.task.from_queue.task_class
        with Session(self._own_engine, expire_on_commit=False) as session, session.begin():
            found = session.scalar(select(mapped).where(mapped.id == end.task.id))
        # A completed task that isn't kept is gone: then it is answered as far as it is known here.
        known = {name: getattr(end.task, name) for name in KNOWN}
        return found or detached(end.task.from_queue.schema, known | {"state": COMPLETED})

    def _make(self, row: Claimed) -> AnyRunningTask:
        batch: Batch = row[-1]
        processor = batch.processors[row[1]]
        if processor.is_coroutine:
            return AsyncRunningTask(row, processor, self._sessions.open_async, self._notice)
        return RunningTask(row, processor, self._sessions.open, self._notice)

    def _put_ended(self, end: Ended) -> None:
        if end.row is not None and end.outcome is None and not self._completion.is_heard:
            self._counter.count(None)
            self._claimer.settled([end.task.row])  # it is written already, and nobody is to be told
            return
        self._settler.put(end)
        self._settling.wake()

    def _put_overdue(self, task: AnyRunningTask, thread_id: int) -> None:
        self._put_ended(ended(task, overdue(task.timeout or 0.0, thread_id)))
        if not self._is_started:
            self._settler.turn()  # nobody else takes turns beside `work`

    def _settled(self, tasks: list[Claimed]) -> None:
        self._claimer.settled(tasks)

    def _lapsed(self) -> None:
        logger.warning(
            "the lease could not be renewed in time: what has not begun is given back, and what runs in "
            "task.session is undone, for others may run it now"
        )
        self._notice.is_given = True
        self._notice = Notice()  # for what is claimed when it is renewed
        self._give_back(self._slots.take_back())
        for task in self._slots.running():
            task.cut_off()
        # Else they would find out one by one.
        watch.cut_all(self._own_engine)
        self._listener.renew()
        self._sessions.renew()

    def _cancelled(self, ids: set[int]) -> None:
        if self._recaller.hint(ids):
            self._recalling.wake()

    def _lost(self, tasks: list[Claimed]) -> None:
        self._claimer.settled(self._slots.recall(tasks))
        for task in list(self._beside):
            if any(task.row is row for row in tasks):
                task.recall()

    def _listens(self) -> None:
        self._listening.recovered()

    def _claimed(self, count: int, wanted: int) -> None:
        # Was that all? Where nothing was found, whoever gave the hint may have meant something else.
        self._look(BUSY if count == wanted else AFTERMATH if count else 0.0)

    def _look(self, seconds: float = 0.0) -> None:
        if self._scout.look_in(seconds):
            self._scouting.wake()

    def _give_back(self, tasks: list[AnyRunningTask]) -> None:
        for task in tasks:
            self._put_ended(released(task))

    def _finish_settling(self) -> None:
        self._settling.stop(timeout=5)
        try:
            self._settler.turn()
        except Exception as error:  # noqa: BLE001
            logger.warning("some tasks could not be settled; others will run them again: %s", error)

    def _hint(self) -> None:
        self._claimer.hint()
        self._claiming.wake()

    def _wake_claimer(self) -> None:
        if self._claimer.waits_for_room:
            self._claiming.wake()


def _check_concurrency(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"concurrency is the number of tasks that run at once, 1 or more, not {value!r}")
