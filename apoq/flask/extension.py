"""The Flask extension."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from datetime import timedelta
from typing import Any, Concatenate, Final, TypeVar, Unpack, overload
from weakref import WeakSet

from flask import Flask, current_app, request_started
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker
from typing_extensions import ParamSpec

from apoq.client.queue import Queue
from apoq.client.session_adapters import AsyncioSession, SyncSession
from apoq.client.typed_task import UniqueRule
from apoq.core.failures import OnFailure
from apoq.core.limits import Limit
from apoq.core.options import Options
from apoq.core.registry import ProcessorOptions, Running, make_processor
from apoq.core.retry import DEFAULT_RETRY_LIMIT, RetryDelay, exponential_backoff
from apoq.core.schedules import ScheduleOptions
from apoq.core.unique import OnConflict, UniqueUntil
from apoq.errors import InvalidProcessor, glimpse, name_commands
from apoq.flask.commands import group
from apoq.flask.database import AnySession, Database
from apoq.flask.installed import KEY, Installed, serve
from apoq.flask.settings import Settings
from apoq.flask.tasks import AppTask, Decorator
from apoq.schema.models import Task
from apoq.worker import Worker

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound=Running)


NOT_ISOLATED: Final = (
    "the tasks of Apoq must not be isolated, because their application context belongs to an object of this "
    "process: define the task on a Queue of its own, @queue.task(isolated=True), and run it by a Worker"
)


class Apoq:
    """The Flask extension: adds tasks in the current application, and holds the processors of its worker.

    One object serves any number of applications.
    """

    def __init__(
        self,
        app: Flask | None = None,
        queue: Queue | None = None,
        *,
        queues: Iterable[Queue] = (),
        session: Callable[[], AnySession] | None = None,
    ) -> None:
        """Create the extension.

        Args:
            app: The application. Without it, call `init_app`.
            queue: The queue that tasks are added to, and that the worker works on. By default the one that
                the settings APOQ_QUEUE and APOQ_SCHEMA name, or else ``Queue()``.
            queues: Other queues that the worker works on.
            session: A `scoped_session`, or a function that returns the current request's session. By default
                the session of Flask-SQLAlchemy or Flask-SQLAlchemy-Lite.

        Raises:
            TypeError: If a queue is not a `Queue`, or `session` can't be used.
        """
        self._others = tuple(queues)
        for given in (*self._others, *filter(None, [queue])):
            if not isinstance(given, Queue):
                raise TypeError(f"a queue must be a Queue, such as Queue('emails'), got {glimpse(given)}")
        makes = isinstance(session, sessionmaker | async_sessionmaker)
        if session is not None and (makes or not callable(session)):
            raise TypeError(
                "session must be a scoped_session or a function that returns the current request's session, "
                f"which the request commits, got a {type(session).__qualname__}"
            )
        self._queue = queue
        self._session = session
        self._scheduled: list[AppTask[..., Any, ...]] = []
        self._processors: dict[str, tuple[Callable[[Any], Any], ProcessorOptions]] = {}
        self._workers: WeakSet[Worker] = WeakSet()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Read the application's settings, and add the commands ``flask apoq``.

        It may be called before or after the `init_app` of the SQLAlchemy extension.

        Args:
            app: The application.

        Raises:
            RuntimeError: If the application already has an `Apoq`.
            TypeError: If a setting has the wrong type.
            ValueError: If a setting is invalid.
        """
        if KEY in app.extensions:
            raise RuntimeError(f"the application {app.name!r} already has an Apoq: call init_app once")
        settings = Settings.read(app.config)
        queue = settings.make_queue(self._queue)
        database = Database(app, bind=settings.bind, session=self._session)
        app.extensions[KEY] = Installed(app, settings, (queue, *self._others), database, self)
        app.cli.add_command(group())
        name_commands("flask apoq", "flask db upgrade")
        if settings.in_process_worker:
            request_started.connect(serve, app)

    @property
    def current(self) -> Installed:
        """The state of the extension in the current application."""
        found = current_app.extensions.get(KEY)
        if not isinstance(found, Installed) or found.owner is not self:
            raise RuntimeError(
                f"the application {current_app.name!r} doesn't have this Apoq: call its init_app with it"
            )
        return found

    @property
    def queue(self) -> Queue:
        """The current application's queue."""
        return self.current.queue

    @property
    def worker(self) -> Worker:
        """The current application's worker in this process, created at the first use and not started."""
        return self.current.worker

    def is_healthy(self) -> bool:
        """Return whether the current application's worker is started in this process, and healthy.

        For health checks; see `Worker.is_healthy`.
        """
        return self.current.is_healthy()

    @overload
    def add(
        self, type: str, data: Any = ..., *, session: SyncSession | None = ..., **options: Unpack[Options]
    ) -> Task: ...
    @overload
    def add(
        self, type: str, data: Any = ..., *, session: AsyncioSession, **options: Unpack[Options]
    ) -> Coroutine[Any, Any, Task]: ...
    def add(
        self,
        type: str,
        data: Any = {},  # noqa: B006 - never changed
        *,
        session: SyncSession | AsyncioSession | None = None,
        **options: Unpack[Options],
    ) -> Task | Coroutine[Any, Any, Task]:
        """Add a task to the current application's queue, and return it.

        The task exists when the session commits, and doesn't exist if it rolls back.

        Args:
            type: The task's type, by which a worker finds its processor.
            data: The task's data: anything that JSON can represent. An empty dict by default.
            session: The session whose transaction adds the task. By default the current request's.
            **options: The options of `Queue.add`, such as `delay` and `priority`.

        Returns:
            The new `Task`, with its id. With an asyncio session or connection, an awaitable of it.

        Raises:
            InvalidTask: If the type or an option is invalid. Nothing was sent.
            InvalidData: If the data can't be stored, or is too large. Nothing was sent.
            UnsupportedSession: If the session is not one, or is on another database than the application's
                tasks.
            SchemaMismatch: If apoq's tables are missing or at another version.
            RuntimeError: If there is no application context, or `init_app` was not called for its
                application.

        Note:
            Executes one INSERT in the session's transaction. It doesn't commit or flush.
        """
        current = self.current
        joined: Any = current.database.joined(session)
        task: Task | Coroutine[Any, Any, Task] = current.queue.add(joined, type, data, **options)
        return task

    @overload
    def add_many(
        self,
        type: str,
        items: Iterable[Any],
        *,
        session: SyncSession | None = ...,
        **options: Unpack[Options],
    ) -> int: ...
    @overload
    def add_many(
        self, type: str, items: Iterable[Any], *, session: AsyncioSession, **options: Unpack[Options]
    ) -> Coroutine[Any, Any, int]: ...
    def add_many(
        self,
        type: str,
        items: Iterable[Any],
        *,
        session: SyncSession | AsyncioSession | None = None,
        **options: Unpack[Options],
    ) -> int | Coroutine[Any, Any, int]:
        """Add a task for each of `items` to the current application's queue; see `Queue.add_many`.

        Args:
            type: The type of all these tasks.
            items: The data of each task.
            session: The session whose transaction adds the tasks. By default the current request's.
            **options: The options of `Queue.add`, for all these tasks.

        Returns:
            The number of tasks. With an asyncio session or connection, an awaitable of it.

        Raises:
            InvalidTask: If the type or an option is invalid, or `items` is not an iterable of data.
            InvalidData: If one of the items can't be stored. Earlier items may already be inserted.
            UnsupportedSession: If the session is not one, or is on another database than the application's
                tasks.
            SchemaMismatch: If apoq's tables are missing or at another version.
            RuntimeError: If there is no application context, or `init_app` was not called for its
                application.
        """
        current = self.current
        joined: Any = current.database.joined(session)
        count: int | Coroutine[Any, Any, int] = current.queue.add_many(joined, type, items, **options)
        return count

    def use(self, type: str, processor: Callable[[Any], Any], **options: Unpack[ProcessorOptions]) -> None:
        """Run tasks of this type with `processor`, in the workers of all applications of this extension.

        Each call runs in a new application context. It may be called before or after `init_app`.

        Args:
            type: The type of the tasks.
            processor: A plain function or a coroutine function that takes the running task.
            **options: The options of `Worker.use`: `retry_limit`, `retry_delay`, `timeout`, `keep_result`,
                `max_result_size`, `on_failure` and `limit`.

        Raises:
            InvalidProcessor: If the type already has a processor, or an argument is invalid.
        """
        if options.get("isolated"):
            raise InvalidProcessor(NOT_ISOLATED)
        make_processor(type, processor, **options)  # raises if it is invalid
        if type in self._processors:
            raise InvalidProcessor(
                f"the type {type!r} already has a processor, {self._processors[type][0]!r}: choose another "
                "type"
            )
        self._processors[type] = (processor, options)
        for worker in list(self._workers):
            worker.use(type, processor, **options)

    def processor(self, type: str, **options: Unpack[ProcessorOptions]) -> Callable[[F], F]:
        """Return a decorator that registers a function as the processor of a type, as `use` does.

        Args:
            type: The type of the tasks.
            **options: The options of `Worker.use`: `retry_limit`, `retry_delay`, `timeout`, `keep_result`,
                `max_result_size`, `on_failure` and `limit`.

        Returns:
            A decorator that returns the function unchanged. It raises what `use` raises.
        """

        def decorate(function: F) -> F:
            self.use(type, function, **options)
            return function

        return decorate

    @overload
    def task(self, function: Callable[Concatenate[T, P], R], /) -> AppTask[P, R, Concatenate[T, P]]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> AppTask[P, R, P]: ...
    @overload
    def task(
        self,
        function: None = None,
        /,
        *,
        type: str | None = ...,
        aliases: Iterable[str] = ...,
        retry_limit: int = ...,
        retry_delay: RetryDelay = ...,
        timeout: float | timedelta | None = ...,
        keep_result: bool = ...,
        max_result_size: int | None = ...,
        unique: UniqueRule = ...,
        unique_until: UniqueUntil | None = ...,
        on_conflict: OnConflict | None = ...,
        on_failure: OnFailure | None = ...,
        limit: Limit | None = ...,
        **schedule: Unpack[ScheduleOptions],
    ) -> Decorator: ...
    def task(
        self,
        function: Any = None,
        /,
        *,
        type: str | None = None,
        aliases: Iterable[str] = (),
        retry_limit: int = DEFAULT_RETRY_LIMIT,
        retry_delay: RetryDelay = exponential_backoff,
        timeout: float | timedelta | None = None,
        keep_result: bool = False,
        max_result_size: int | None = None,
        unique: UniqueRule = False,
        unique_until: UniqueUntil | None = None,
        on_conflict: OnConflict | None = None,
        on_failure: OnFailure | None = None,
        limit: Limit | None = None,
        **schedule: Unpack[ScheduleOptions],
    ) -> Any:
        """Make a function a typed task: ``@apoq.task``, or ``@apoq.task(retry_limit=3)``.

        ``send_welcome.add(user_id=7)`` adds a call to the current application's queue, in the current
        request's session; ``send_welcome.add(session, user_id=7)`` in another session. Each task runs in a
        new application context.

        Args:
            function: The function, when used without parentheses.
            type: The type of its tasks. By default the function's dotted path.
            aliases: Other types that the function also processes, such as its earlier names.
            retry_limit: Number of retries after a failure.
            retry_delay: Time before a retry, in seconds or as a timedelta, or a function that returns it for
                the number of failures so far.
            timeout: Limit of each attempt, in seconds or as a timedelta; see `Worker.use`. None: no limit.
            keep_result: As for `Queue.task`: whether the value that the function returns is stored with the
                task.
            max_result_size: The limit of a result, in bytes of JSON: 64 KiB by default, 1 MiB at most.
            unique: As for `Queue.task`: True for tasks that are unique by their arguments, or a function of
                the arguments.
            unique_until: As for `Queue.add`, if the tasks are unique.
            on_conflict: As for `Queue.add`, if the tasks are unique.
            on_failure: As for `Queue.task`: a typed task of this extension that is added when a task fails.
            limit: How many of its tasks may run at once, over all workers: a `Limit`.
            **schedule: `cron` or `every`, and the other times and rules of `Queue.schedule`. The
                application's workers add a task at each of these times. The function must be callable without
                arguments.

        Returns:
            An `AppTask`, which is a `TypedTask`, or a decorator that returns one.

        Raises:
            InvalidProcessor: If the type already has a processor, an annotation can't be represented in JSON,
                or an option is invalid.
            InvalidLimit: If the limit is invalid.
            InvalidSchedule: If the times or rules of the schedule are invalid.
        """
        options: ProcessorOptions = {
            "retry_limit": retry_limit,
            "retry_delay": retry_delay,
            "timeout": timeout,
            "on_failure": on_failure,
            "keep_result": keep_result,
            "max_result_size": max_result_size,
            "limit": limit,
        }
        if "isolated" in schedule:
            raise InvalidProcessor(NOT_ISOLATED)
        of_processor = options.copy()
        if limit is not None:
            of_processor["limit"] = limit.of_given_keys

        def decorate(function: Callable[..., Any]) -> AppTask[..., Any, ...]:
            task: AppTask[..., Any, ...] = AppTask(
                CurrentQueue(self),
                function,
                type=type,
                aliases=aliases,
                unique=unique,
                unique_until=unique_until,
                on_conflict=on_conflict,
                schedule=schedule,
                **options,
            )
            for name in (task.type, *task.aliases):
                self.use(name, task.processor.function, **of_processor)
            if task.schedule:
                self._scheduled.append(task)
                for worker in self._workers:
                    worker.queues[0].declare(task)
            return task

        return decorate if function is None else decorate(function)

    def equip(self, worker: Worker) -> None:
        """Add the processors to a worker, including those that are registered later."""
        for type_, (processor, options) in self._processors.items():
            worker.use(type_, processor, **options)
        for task in self._scheduled:
            worker.queues[0].declare(task)  # to which the application's tasks are added
        self._workers.add(worker)


class CurrentQueue:
    """The current application's queue, for typed tasks that are defined before there is an application."""

    def __init__(self, apoq: Apoq) -> None:
        self._apoq = apoq

    def __repr__(self) -> str:
        return "<the queue of the current application>"

    @property
    def name(self) -> str:
        """The queue's name."""
        return self._apoq.queue.name

    @property
    def schema(self) -> str | None:
        """The schema of the queue's tables, or None for the connection's own."""
        return self._apoq.queue.schema

    def add(self, session: Any, type: str, data: Any, **options: Unpack[Options]) -> Any:
        """Add a task, in the current session if none is given."""
        return self._apoq.add(type, data, session=session, **options)

    def add_many(self, session: Any, type: str, items: Iterable[Any], **options: Unpack[Options]) -> Any:
        """Add many tasks, in the current session if none is given."""
        return self._apoq.add_many(type, items, session=session, **options)
