"""What works tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.client.queue import Queue
from apoq.client.typed_task import TypedTask
from apoq.core.registry import Middleware, Processor, Registry, make_processor
from apoq.core.retry import DEFAULT_RETRY_LIMIT, RetryDelay, exponential_backoff, seconds
from apoq.errors import InvalidProcessor
from apoq.events import Events, ThreadDied
from apoq.postgres.urls import check_engine, check_untranslated, sync_side
from apoq.schema.models import Task
from apoq.worker import logs
from apoq.worker.lifecycle import Lifecycle
from apoq.worker.options import WorkerOptions
from apoq.worker.process import PROCESS
from apoq.worker.settling.counters import WorkerStats
from apoq.worker.signals import STARTED, caught, wait

STOP_TIMEOUT: Final = timedelta(seconds=25)
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
        middleware: Middleware | Iterable[Middleware] = (),
    ) -> None:
        """Prepare to work these queues (none given: the default one) in the database of `engine`.

        The engine serves the sessions of processors, so its pool should have `concurrency` connections;
        the worker's own few are apart from it. `concurrency` is how many tasks run at once, plain functions
        and coroutine functions together. `poll_interval` is how often an idle worker looks if no notification
        wakes it, and `lease` how long after its death its tasks are taken over by others. Completed tasks are
        deleted `keep_completed` after their completion, failed and cancelled ones after `keep_failed`; None
        keeps them for ever, and with zero a task is deleted instead of being marked as completed. A kept task
        takes about 1 KB: at 800 a second, a day of them is up to 80 GB, so keep them for a shorter time then.
        `listen_url` leads to the same database past a pooler in transaction mode, through which notifications
        don't arrive; only the connection that listens is opened there. `middleware` is a function, or a list
        of them, the outermost first: each takes a running task and returns a context manager, such as an
        application's context, in which the processor is called. The completion is written after it. What the
        context manager raises fails the attempt.
        """
        if not isinstance(engine, Engine | AsyncEngine):
            # Its type only: a URL holds a password.
            raise TypeError(f"a worker takes an Engine or an AsyncEngine, not {type(engine).__qualname__}")
        check_engine(engine)
        queues = queues or (Queue(),)
        for queue in queues:
            if not isinstance(queue, Queue):
                raise TypeError(
                    f"a worker takes queues after its engine, such as Queue('emails'), not {queue!r}"
                )
            check_untranslated(engine.get_execution_options(), queue.schema)
        self._engine = engine
        self._options = WorkerOptions(
            concurrency=concurrency,
            poll_interval=poll_interval,
            lease=lease,
            keep_completed=keep_completed,
            keep_failed=keep_failed,
            listen_url=listen_url,
        )
        self.events = Events()
        logs.listen(self.events)
        self._on_thread_died: Callable[[ThreadDied], object] = lambda _: None
        self.events.on(ThreadDied, self._thread_died)
        # Two that are equal are one, whose typed tasks were said in two places.
        self._queues = tuple(dict.fromkeys(queues))
        self._registry = Registry(middleware)
        for queue in queues:
            queue.register_in(self._registry)
        self._lifecycle = self._new_life()
        PROCESS.enter(self, Worker._begin_anew)

    def __repr__(self) -> str:
        return f"<Worker of {', '.join(map(repr, self._queues))} concurrency={self._options.concurrency}>"

    @property
    def queues(self) -> tuple[Queue, ...]:
        """The queues that it works."""
        return self._queues

    @property
    def options(self) -> WorkerOptions:
        """What it was told beside its engine and its queues."""
        return self._options

    @property
    def types(self) -> list[str]:
        """The types of tasks that it works."""
        return sorted({type_ for queue in self._queues for type_ in self.processors(queue)})

    def processors(self, queue: Queue) -> Mapping[str, Processor]:
        """Answer the processors of one of its queues, by the types of tasks that they work."""
        return self._registry.of(queue)

    def _adjust(self, *, queues: Iterable[str] | None = None, concurrency: int | None = None) -> None:
        """Change what it was made for, before it starts: what the command line's options do.

        It works only those of its queues that have one of these names, or another number of tasks at once.
        """
        if self._lifecycle.is_in_use:
            raise RuntimeError("adjust a worker before it starts")
        if queues is not None:
            names, known = set(queues), dict.fromkeys(queue.name for queue in self._queues)
            if not names or not names.issubset(known):
                raise ValueError(
                    f"this worker's queues are {', '.join(known)}, not {', '.join(names - {*known})}"
                )
            self._queues = tuple(queue for queue in self._queues if queue.name in names)
        if concurrency is not None:
            self._options = replace(self._options, concurrency=concurrency)
        self._lifecycle = self._new_life()

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
        `task.should_stop` turns true and the attempt has failed, so that the retry may begin, here or
        elsewhere. What the function still answers is refused, and what it wrote to `task.session` undone;
        but it goes on, and its slot stays taken until it returns. So let it look at `task.should_stop`, or
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
        self._lifecycle.runtime.look_for_tasks()

    def work(self) -> Task | None:
        """Claim, run and settle one due task on this thread; answer it, or None where nothing is due.

        It answers the task whether it completed or failed, as it then stands in the database.
        Raises `SchemaMismatch` where apoq's tables are missing or at another version.
        """
        return self._lifecycle.work()

    def start(self, *, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Work in the background, on threads, until `stop`; return at once.

        Coroutine processors run on `loop`, the application's, or else on one of the worker's own. Touches no
        signals. Starting twice is harmless. Where the database is away, work begins when it is there. Raises
        `SchemaMismatch` where apoq's tables are missing or at another version, and RuntimeError if the system
        allows no more threads.
        """
        self._start(loop, self._lifecycle.stops)

    def stop(self, timeout: float | timedelta | None = None) -> None:
        """Claim no more, give back what has not begun, and wait for running tasks to end.

        From here on, `task.should_stop` is true for those that run. After `timeout` (seconds or a timedelta;
        None waits for ever) those that still do are given back too, with no attempt used up: coroutines are
        cancelled, and what a thread still does is not settled. Stopping twice, or before starting, is
        harmless.
        """
        patience = None if timeout is None else seconds(timeout, "a timeout")
        if self._lifecycle.stop(patience):
            PROCESS.forget(self)

    def run(
        self,
        *,
        timeout: float | timedelta = STOP_TIMEOUT,
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
        with caught() as signals:
            self._run_until(signals, timeout, on_start=on_start)

    def is_healthy(self) -> bool:
        """Tell whether the worker is at work: started, with all its threads, and heard by the database.

        What a health check asks. It is false while the database is away, or every claim or settlement fails,
        for longer than a few seconds, and while a thread can't be started; and true again by itself when that
        is over.
        """
        return self._lifecycle.is_healthy()

    def stats(self) -> WorkerStats:
        """Answer how many tasks run now, and what became of those that have ended since it was made."""
        return self._lifecycle.stats()

    @property
    def last_heartbeat_at(self) -> datetime | None:
        """When the database last answered the worker's heartbeat, by this machine's clock."""
        return self._lifecycle.runtime.heartbeat.last_heartbeat_at

    def _run_until(
        self,
        orders: SimpleQueue[int],
        timeout: float,
        *,
        on_start: Callable[[Callable[[], None]], object] | None,
        on_stop: Callable[[], object] = lambda: None,
    ) -> None:
        """Start, and stop as soon as there is anything in `orders`; `on_stop` is called before it stops."""
        errors: list[BaseException] = []

        def die(event: ThreadDied) -> None:
            errors.append(
                RuntimeError(f"the worker's thread {event.thread} died, and so the worker has stopped")
            )
            orders.put(0)

        def begin() -> None:
            try:
                start()
            except BaseException as error:  # noqa: BLE001 - it is raised by the main thread
                errors.append(error)
            orders.put(STARTED)

        self._on_thread_died = die
        # On a thread, for it may wait for the database, and this one is to notice a signal meanwhile.
        start = partial(self._start, None, self._lifecycle.stops)
        starting = threading.Thread(target=begin, name="apoq-starter", daemon=True)
        try:
            starting.start()
            order = wait(orders)
            if order == STARTED and not errors:
                if on_start is not None:
                    on_start(lambda: orders.put(0))
                wait(orders)
            elif not errors:
                logs.stopped_before_start(self)
        finally:
            on_stop()
            self.stop(timeout)
        if errors:
            raise errors[0]

    def _thread_died(self, event: ThreadDied) -> None:
        self._on_thread_died(event)

    def _start(self, loop: asyncio.AbstractEventLoop | None, stops: int) -> None:
        PROCESS.get_ready()
        if self._lifecycle.start(loop, stops):
            PROCESS.watch(self)

    def _new_life(self) -> Lifecycle:
        return Lifecycle(self._engine, self._queues, self._registry, self.events, self._options, repr(self))

    def _begin_anew(self) -> None:
        """Be a worker that hasn't started, in a child that was forked.

        The threads and the sockets are the parent's. So are the connections in the pool of the caller's
        engine, on which the parent's processors may be writing just now: it gets another here, as
        SQLAlchemy advises.
        """
        engine = sync_side(self._engine)
        PROCESS.keep(self._lifecycle, engine.pool)
        engine.dispose(close=False)
        self._lifecycle = self._new_life()
