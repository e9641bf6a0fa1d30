"""The worker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import import_module
from queue import SimpleQueue
from typing import Any, Final

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.client.queue import Queue
from apoq.client.typed_task import TypedTask
from apoq.core.failures import OnFailure
from apoq.core.imported import importable
from apoq.core.limits import Limit
from apoq.core.recycling import StopReason
from apoq.core.registry import Middleware, Processor, Registry, make_processor
from apoq.core.retention import Retention
from apoq.core.retry import DEFAULT_RETRY_LIMIT, RetryDelay, exponential_backoff, seconds
from apoq.core.worker_state import WorkerState
from apoq.errors import InvalidLimit, InvalidProcessor
from apoq.events import Events, LimitReached, ThreadDied
from apoq.postgres.urls import check_engine, check_untranslated, sync_side
from apoq.schema.models import Task
from apoq.tracing import Relation, Tracer
from apoq.worker import logs
from apoq.worker.lifecycle import Lifecycle
from apoq.worker.observer import MetricsRegistry, Observer
from apoq.worker.options import WorkerOptions, check_metrics, make_tracer
from apoq.worker.process import PROCESS
from apoq.worker.settling.counters import WorkerStats
from apoq.worker.signals import DRAIN, STARTED, STOP, caught, wait, wait_for_start, wait_unless

STOP_TIMEOUT: Final = timedelta(seconds=25)
"""The time that `run` waits for running tasks after a signal: less than the 30 s of Kubernetes."""


MAX_SHOWN: Final = 5
"""Queues that the repr of a worker names, at most."""


class Worker:
    """Runs the tasks of one or more queues.

    A worker claims tasks in a short transaction, runs their processors outside of it, and settles several
    tasks in another one. Any number of workers, in any number of processes, can work on the same queues. If a
    worker dies, the others notice within its `lease`, and run its tasks again.

    `start` and `stop` may be called from any thread, any number of times. At the end of a program, a worker
    that wasn't stopped waits up to a second for its running tasks, and releases the others.

    Attributes:
        events (Events): The listeners of this worker; see `apoq.events`.
        metrics (CollectorRegistry | None): The registry with the metrics of this worker; None without them.

    Note:
        After a fork, a started worker continues in the parent. In the child it is not started, but keeps its
        processors, listeners and options. The engine gets a new connection pool in the child, as by
        ``engine.dispose(close=False)``. Other engines and open sessions are not changed.
    """

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        *queues: Queue,
        concurrency: int = 4,
        poll_interval: float | timedelta = timedelta(seconds=2),
        lease: float | timedelta = timedelta(seconds=15),
        keep_completed: Retention = timedelta(days=1),
        keep_failed: Retention = timedelta(days=7),
        listen_url: str | URL | None = None,
        middleware: Middleware | Iterable[Middleware] = (),
        release: datetime | None = None,
        metrics: bool | MetricsRegistry = False,
        tracing: bool | Relation = False,
        max_tasks: int | None = None,
        max_memory: int | str | None = None,
        max_age: float | timedelta | None = None,
        isolated_engine: Callable[[], Engine] | None = None,
    ) -> None:
        """Create a worker. It does nothing until `work`, `start` or `run`.

        Args:
            engine: The engine of the database. Its pool serves ``task.session``, so it should allow
                `concurrency` connections. The worker's own few connections are not taken from this pool.
            *queues: The queues to work on. By default ``Queue()``.
            concurrency: Number of tasks that run at once, plain functions and coroutines together.
            poll_interval: Time between two polls of an idle worker, in seconds or as a timedelta. New tasks
                are usually found earlier, by notifications.
            lease: Time after which other workers take over the tasks of this one if it has died, in seconds
                or as a timedelta.
            keep_completed: Time after which completed tasks are deleted, in seconds or as a timedelta. None
                keeps them for ever; zero deletes them on completion. A `Keep` also limits their number. A
                task takes about 1 KB, so 800 tasks per second are up to 80 GB per day.
            keep_failed: Time after which failed and cancelled tasks are deleted, in seconds or as a
                timedelta, or a `Keep`. None keeps them for ever.
            listen_url: A URL of the same database for the one connection that receives notifications. Use it
                if `engine` connects through a pooler in transaction mode, through which they don't arrive.
            middleware: A function, or a list of functions, the outermost first. Each takes the running task
                and returns a context manager, in which the processor is called. The completion is written
                after its exit. An exception from it fails the attempt.
            release: When this code was deployed, as a datetime with a time zone. A worker doesn't change
                schedules that the code of a later release has declared with ``@queue.task``. By default, the
                time at which the worker is created.
            metrics: Whether to count what the worker does, for Prometheus. True: in a registry of its own,
                `Worker.metrics`. Or the registry to which the metrics are added, such as
                ``prometheus_client.REGISTRY``.
            tracing: Whether to run each attempt in a span of OpenTelemetry. "link", or True: the span begins
                a new trace, with a link to the span in which the task was added. "child": the first attempt,
                if it begins within a minute, is a child of that span; later ones have a link.
            max_tasks: Number of attempts, failed ones included, after which the process should be replaced by
                a new one. `run` and ``apoq worker`` then stop the worker, without a limit of time for its
                running tasks; `start` only emits `LimitReached`. None: no limit. Each process varies this
                limit and the next two by up to 20 %, so that not all end at the same time.
            max_memory: Memory of the process (its resident set) at which it should be replaced, in bytes or
                as a text such as "512M".
            max_age: Time after which it should be replaced, in seconds or as a timedelta.
            isolated_engine: A function at the top level of a module that returns the engine for
                ``task.session`` in the processes of isolated tasks. By default they make one with the
                arguments of `engine`, which is not possible if it has a `creator` or listeners.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If `concurrency`, a duration or a limit is out of range, if the registry has the
                metrics of another worker, or if the memory can't be measured on this system.
            MissingExtra: If `metrics` or `tracing` is given, and prometheus-client or opentelemetry-api is
                not installed.
            UnsupportedDatabase: If the engine is not on PostgreSQL through psycopg 3, or translates apoq's
                schema.
            InvalidURL: If the engine's URL or `listen_url` is invalid.
            InvalidProcessor: If `isolated_engine` is not a function that another process can import.
        """
        if not isinstance(engine, Engine | AsyncEngine):
            # Only its type, because a URL contains a password.
            raise TypeError(f"engine must be an Engine or an AsyncEngine, got {type(engine).__qualname__}")
        check_engine(engine)
        queues = queues or (Queue(),)
        for queue in queues:
            if not isinstance(queue, Queue):
                raise TypeError(f"queues must be Queue objects, such as Queue('emails'), got {queue!r}")
            check_untranslated(engine.get_execution_options(), queue.schema)
        self._engine = engine
        self._options = WorkerOptions(
            concurrency=concurrency,
            poll_interval=poll_interval,  # type: ignore[arg-type]  # seconds are converted, here and below
            lease=lease,  # type: ignore[arg-type]
            keep_completed=keep_completed,  # type: ignore[arg-type]
            keep_failed=keep_failed,  # type: ignore[arg-type]
            release=datetime.now(UTC) if release is None else release,
            listen_url=listen_url,
            max_tasks=max_tasks,
            max_memory=max_memory,  # type: ignore[arg-type]
            max_age=max_age,  # type: ignore[arg-type]
            isolated_engine=None
            if isolated_engine is None
            else importable(isolated_engine, "isolated_engine"),
        )
        self.events = Events()
        logs.listen(self.events)
        self._on_thread_died: Callable[[ThreadDied], object] = lambda _: None
        self.events.on(ThreadDied, self._thread_died)
        self._on_limit_reached: Callable[[LimitReached], object] = lambda _: None
        self.events.on(LimitReached, self._limit_reached)
        self._has_died = False
        self.metrics: MetricsRegistry | None = None
        self._observer: Observer | None = None
        self._queues = tuple(dict.fromkeys(queues))
        self._registry = Registry(middleware, keeps_completed=self._options.keeps_completed)
        for queue in self._queues:
            queue.register_in(self._registry)
        self._tracer = make_tracer(tracing)
        if metrics is not False:
            self._count_into(metrics)
        self._lifecycle = self._new_lifecycle()
        PROCESS.enter(self, Worker._reset_after_fork)

    def __repr__(self) -> str:
        shown = [repr(queue) for queue in self._queues[:MAX_SHOWN]]
        more = len(self._queues) - len(shown)
        queues = ", ".join(shown) + (f" and {more} more" if more else "")
        return f"<Worker of {queues} concurrency={self._options.concurrency}>"

    @property
    def queues(self) -> tuple[Queue, ...]:
        """The queues that the worker works on."""
        return self._queues

    @property
    def options(self) -> WorkerOptions:
        """The worker's options, with durations as timedeltas."""
        return self._options

    @property
    def types(self) -> list[str]:
        """The types of tasks that the worker has a processor for, sorted."""
        return sorted({type_ for queue in self._queues for type_ in self.processors(queue)})

    def processors(self, queue: Queue) -> Mapping[str, Processor]:
        """Return the processors for the tasks of one of the worker's queues, by type."""
        return self._registry.of(queue)

    def _adjust(
        self,
        *,
        queues: Iterable[str] | None = None,
        concurrency: int | None = None,
        has_metrics: bool = False,
        tracing: Relation | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> None:
        """Override the queues, by their names, or other options, before the worker starts.

        The command line does this for its options.
        """
        if self._lifecycle.is_in_use:
            raise RuntimeError("a worker can't be adjusted after it has started")
        if queues is not None:
            names, known = set(queues), dict.fromkeys(queue.name for queue in self._queues)
            if not names or not names.issubset(known):
                raise ValueError(
                    f"queues must be some of this worker's, {', '.join(known)}, got "
                    f"{', '.join(names - {*known}) or 'none'}"
                )
            self._queues = tuple(queue for queue in self._queues if queue.name in names)
        if concurrency is not None:
            self._options = replace(self._options, concurrency=concurrency)
        if limits:
            self._options = replace(self._options, **limits)
        if has_metrics and self.metrics is None:
            self._count_into(metrics=True)
        if tracing is not None:
            self._tracer = Tracer(tracing)
        self._lifecycle = self._new_lifecycle()

    def use(
        self,
        type: str,
        processor: Callable[[Any], Any],
        *,
        retry_limit: int = DEFAULT_RETRY_LIMIT,
        retry_delay: RetryDelay = exponential_backoff,
        timeout: float | timedelta | None = None,
        on_failure: OnFailure | None = None,
        keep_result: bool = False,
        max_result_size: int | None = None,
        limit: Limit | None = None,
        isolated: bool = False,
    ) -> None:
        """Run tasks of this type, in all queues of this worker, with `processor`.

        When the processor returns, the task is completed; the value is ignored, or with `keep_result` stored
        with the task. If it raises an exception,
        the attempt has failed, and the task is retried. It can also raise `Retry`, `Fail`, `Cancel` or
        `Snooze`.

        Args:
            type: The type of the tasks.
            processor: A plain function or a coroutine function that takes the running task: a `RunningTask`,
                or an `AsyncRunningTask` for a coroutine function.
            retry_limit: Number of retries after a failure. With 5, there are up to 6 attempts.
            retry_delay: Time before a retry, in seconds or as a timedelta, or a function that returns it for
                the number of failures so far.
            timeout: Limit of each attempt, in seconds or as a timedelta. An attempt that exceeds it fails
                with a `TimeoutError`. None: no limit.
            on_failure: The type of a task that is added in the transaction that marks a task as failed, after
                its last attempt. It is in the same queue, and its data has the fields of `TaskFailure`. Or a
                typed task whose only argument is a `TaskFailure`.
            keep_result: Whether the value that the processor returns is stored with the task. It must be
                JSON; any other value fails the attempt. Read it with `Queue.result`.
            max_result_size: The limit of a result, in bytes of JSON: 64 KiB by default, 1 MiB at most. A
                larger one fails the attempt.
            limit: How many tasks of this type may run at once, over all workers: a `Limit`. For a limit of
                each key, `Limit(2, key=True)`, because callers give the key with ``add(…, key=…)``.
            isolated: Whether each attempt runs in a process of its own, which the worker kills at the
                timeout, and which may crash without harm to other tasks. The processor must be a plain
                function at the top level of a module.

        Raises:
            InvalidProcessor: If the type already has a processor, such as a typed task, or an argument is
                invalid.
            InvalidLimit: If the limit is invalid, or has a function for the key.

        Note:
            At its timeout a coroutine is cancelled, and an isolated function is interrupted, and killed two
            seconds later. Another plain function can't be stopped: `task.should_stop`
            becomes True, the attempt has failed, and a retry may start. The function's result is discarded
            and its writes to ``task.session`` are rolled back, but it occupies its slot until it returns. So
            check `task.should_stop` in long functions, and set timeouts on what they wait for.
        """
        if isinstance(processor, TypedTask):
            raise InvalidProcessor(
                f"processor must not be a typed task, got {processor!r}: a worker of its queue runs it, "
                "Worker(engine, queue)"
            )
        made = make_processor(
            type,
            processor,
            retry_limit=retry_limit,
            retry_delay=retry_delay,
            timeout=timeout,
            on_failure=on_failure,
            keep_result=keep_result,
            max_result_size=max_result_size,
            limit=limit,
            isolated=isolated,
        )
        if made.limit is not None and callable(made.limit.key):
            raise InvalidLimit(
                "key must be True, because only typed tasks have arguments to make a key from: Limit(…, "
                "key=True), and add(…, key=…)"
            )
        self._registry.use(type, made)
        self._lifecycle.runtime.look_for_tasks()

    def work(self) -> Task | None:
        """Claim, run and settle one due task on this thread.

        Returns:
            The task as it is in the database afterwards, whether it was completed or has failed; None if no
            task is due.

        Raises:
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        return self._lifecycle.work()

    def start(self, *, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Start working in the background, on threads, and return. Do nothing if the worker is started.

        If the database can't be reached, the worker begins as soon as it can.

        Args:
            loop: The running event loop of the application, for coroutine processors. By default the worker
                starts a loop on another thread.

        Raises:
            SchemaMismatch: If apoq's tables are missing or at another version.
            RuntimeError: If the system allows no more threads.

        Note:
            It sets no signal handlers.
        """
        self._start(loop, self._lifecycle.stops)

    def stop(self, timeout: float | timedelta | None = None) -> None:
        """Stop claiming, release tasks that have not started, and wait for the running ones.

        `task.should_stop` becomes True for running tasks. Do nothing if the worker is not started.

        Args:
            timeout: Longest time to wait for running tasks, in seconds or as a timedelta. Those that are
                still running are then released, which doesn't count as an attempt: coroutines are cancelled,
                and the results of functions that still run on threads are discarded. None waits for ever.

        Raises:
            ValueError: If `timeout` is out of range.
            TypeError: If `timeout` is not a number or a timedelta.
        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        if self._lifecycle.stop(limit):
            PROCESS.forget(self)

    def run(
        self,
        *,
        timeout: float | timedelta = STOP_TIMEOUT,
        on_start: Callable[[Callable[[], None]], object] | None = None,
    ) -> StopReason:
        """Start, wait for SIGINT or SIGTERM, and stop. For a program whose only purpose is the worker.

        A second signal ends the program at once. When the worker has reached `max_tasks`, `max_memory` or
        `max_age`, it claims no more tasks, releases those that have not begun, and stops when the running
        ones have ended, however long that takes. A signal then limits the time as usual.

        Args:
            timeout: Longest time to wait for running tasks, in seconds or as a timedelta; see `stop`.
            on_start: A function that is called when the worker has started. Its argument is a function that
                stops the worker, which may be called from any thread.

        Returns:
            Why the worker has stopped. If `StopReason.is_limit`, start the program again.

        Raises:
            RuntimeError: If it is not called from the main thread, if one of the worker's threads died, or if
                the system allows no more threads.
            SchemaMismatch: If apoq's tables are missing or at another version.

        Note:
            It handles SIGINT and SIGTERM while it runs, and restores their handlers afterwards.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "run must be called from the main thread, because it handles signals: elsewhere, call start "
                "and stop"
            )
        timeout = seconds(timeout, "timeout")
        with caught() as signals:
            return self._run_until(signals, timeout, on_start=on_start)

    def is_alive(self) -> bool:
        """Return whether the worker can go on: False if one of its threads has died, so that it must restart.

        For liveness checks. Unlike `is_healthy`, it stays True while the database can't be reached, and
        before the worker is started, because a restart would not help.
        """
        return not self._has_died

    def is_healthy(self) -> bool:
        """Return whether the worker is started, all its threads are alive, and it holds its lease.

        For health checks. It returns False if the database can't be reached or all claims or settlements fail
        for more than a few seconds, or if a thread can't be started. It returns True again after recovery.
        """
        return self._lifecycle.is_healthy()

    def stats(self) -> WorkerStats:
        """Return the number of running tasks, and those of ended attempts since the worker was created."""
        return self._lifecycle.stats()

    @property
    def last_heartbeat_at(self) -> datetime | None:
        """Time of the worker's last successful heartbeat, by this machine's clock; None before the first."""
        return self._lifecycle.runtime.heartbeat.last_heartbeat_at

    def _run_until(
        self,
        orders: SimpleQueue[int],
        timeout: float,
        *,
        on_start: Callable[[Callable[[], None]], object] | None,
        on_stop: Callable[[], object] = lambda: None,
        on_limit: Callable[[LimitReached], object] | None = None,
    ) -> StopReason:
        """Start, and stop when something is put into `orders`; call `on_stop` before stopping.

        When a limit is reached, call `on_limit`, which may order to `DRAIN` later; by default, drain.
        """
        errors: list[BaseException] = []
        limits: list[StopReason] = []

        def die(event: ThreadDied) -> None:
            errors.append(
                RuntimeError(f"the worker stopped because its thread {event.thread} died; see the log")
            )
            orders.put(STOP)

        def reach(event: LimitReached) -> None:
            limits.append(StopReason(event.limit))
            on_limit(event) if on_limit is not None else orders.put(DRAIN)

        def begin() -> None:
            try:
                start()
            except BaseException as error:  # noqa: BLE001 - it is raised by the main thread
                errors.append(error)
            orders.put(STARTED)

        self._on_thread_died, self._on_limit_reached = die, reach
        # On a thread, because it may wait for the database, while this thread must react to signals.
        start = partial(self._start, None, self._lifecycle.stops)
        starting = threading.Thread(target=begin, name="apoq-starter", daemon=True)
        try:
            starting.start()
            order = wait_for_start(orders)
            if order == STARTED and not errors:
                if on_start is not None:
                    on_start(lambda: orders.put(STOP))
                order = wait(orders)
                if order == DRAIN:
                    self._lifecycle.drain()
                    order = wait_unless(self._lifecycle.has_drained, orders)
            elif not errors:
                logs.stopped_before_start(self)
        finally:
            on_stop()
            self.stop(timeout)
        if errors:
            raise errors[0]
        return limits[0] if order == DRAIN else _reason(order)

    def _thread_died(self, event: ThreadDied) -> None:
        self._has_died = True
        self._on_thread_died(event)

    def _limit_reached(self, event: LimitReached) -> None:
        self._on_limit_reached(event)

    def _start(self, loop: asyncio.AbstractEventLoop | None, stops: int) -> None:
        PROCESS.get_ready()
        if self._lifecycle.start(loop, stops):
            PROCESS.watch(self)

    def _new_lifecycle(self) -> Lifecycle:
        return Lifecycle(
            *(self._engine, self._queues, self._registry, self.events, self._options, repr(self)),
            observer=self._observer,
            tracer=self._tracer,
        )

    def _count_into(self, metrics: bool | MetricsRegistry) -> None:
        """Count for metrics, in this registry, or in one of the worker's own if True."""
        check_metrics(metrics)
        # Imported here, because prometheus-client is an extra.
        library = import_module("apoq.metrics.worker")
        self._observer, self.metrics = library.observe(
            metrics, self.events, self._state, has_one_queue=len(self._queues) == 1
        )

    def _state(self) -> WorkerState:
        """Return what the metrics say of this moment."""
        beat = self.last_heartbeat_at
        return WorkerState(
            series=frozenset(
                (queue.name, type_) for queue in self._queues for type_ in self.processors(queue)
            ),
            slots=self._options.concurrency,
            busy=self._lifecycle.busy(),
            heartbeat_age=0.0 if beat is None else (datetime.now(UTC) - beat).total_seconds(),
            place_conflicts=self._lifecycle.runtime.places.conflicts,
            is_connected=self._lifecycle.is_connected(),
        )

    def _reset_after_fork(self) -> None:
        """Reset the worker in a forked child, in which it has no threads.

        The engine gets a new pool, as SQLAlchemy's documentation recommends, because the connections in the
        old one are also the parent's.
        """
        engine = sync_side(self._engine)
        PROCESS.keep(self._lifecycle, engine.pool)
        engine.dispose(close=False)
        self._has_died = False
        if self._observer is not None:
            self._observer.reset()
        self._lifecycle = self._new_lifecycle()


def _reason(order: int) -> StopReason:
    return StopReason.STOP if order == STOP else StopReason.SIGNAL
