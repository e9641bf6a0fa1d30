"""The extension."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from datetime import timedelta
from typing import Any, Concatenate, TypeVar, Unpack, overload
from weakref import WeakSet

from flask import Flask, current_app, request_started
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker
from typing_extensions import ParamSpec

from apoq.client.queue import Queue
from apoq.client.session_adapters import AsyncioSession, SyncSession
from apoq.core.options import Options
from apoq.core.registry import ProcessorOptions, Running, make_processor
from apoq.core.retry import DEFAULT_RETRY_LIMIT, RetryDelay, exponential_backoff
from apoq.errors import InvalidProcessor, glimpse
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


class Apoq:
    """The extension: has processors, for any number of applications, and adds tasks in the current one.

    What belongs to one application stands in its ``extensions["apoq"]``.
    """

    def __init__(
        self,
        app: Flask | None = None,
        queue: Queue | None = None,
        *,
        queues: Iterable[Queue] = (),
        session: Callable[[], AnySession] | None = None,
    ) -> None:
        """Make the extension, for `app` or for those that `init_app` is called with.

        `queue` is what tasks are added to, unless APOQ_QUEUE and APOQ_SCHEMA name it; the worker works it,
        and `queues` as well. `session` is a `scoped_session`, or a function that answers the current
        request's session; by default it is that of Flask-SQLAlchemy or Flask-SQLAlchemy-Lite.
        """
        self._others = tuple(queues)
        for given in (*self._others, *filter(None, [queue])):
            if not isinstance(given, Queue):
                raise TypeError(f"a queue is a Queue, such as Queue('emails'), not {glimpse(given)}")
        makes = isinstance(session, sessionmaker | async_sessionmaker)
        if session is not None and (makes or not callable(session)):
            raise TypeError(
                "session answers the current request's session, which the request commits: give a "
                f"scoped_session or a function, not a {type(session).__qualname__}"
            )
        self._queue = queue
        self._session = session
        self._processors: dict[str, tuple[Callable[[Any], Any], ProcessorOptions]] = {}
        self._workers: WeakSet[Worker] = WeakSet()
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Read the application's settings, and give it the commands ``flask apoq``.

        Before or after the `init_app` of the extension that has the session.
        """
        if KEY in app.extensions:
            raise RuntimeError(f"the application {app.name!r} has an Apoq already: call init_app once")
        settings = Settings.read(app.config)
        queue = settings.make_queue(self._queue)
        database = Database(app, bind=settings.bind, session=self._session)
        app.extensions[KEY] = Installed(app, settings, (queue, *self._others), database, self)
        app.cli.add_command(group())
        if settings.in_process_worker:
            request_started.connect(serve, app)

    @property
    def current(self) -> Installed:
        """What the current application has."""
        found = current_app.extensions.get(KEY)
        if not isinstance(found, Installed) or found.owner is not self:
            raise RuntimeError(f"the application {current_app.name!r} has no such Apoq: call its init_app")
        return found

    @property
    def queue(self) -> Queue:
        """The current application's queue."""
        return self.current.queue

    @property
    def worker(self) -> Worker:
        """The current application's worker in this process: for its `events`, `work`, `start` and `stop`."""
        return self.current.worker

    def is_healthy(self) -> bool:
        """Tell whether the current application's worker is at work in this process, for a health check."""
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
        """Add a task in the transaction of the current session, or of `session`, as `Queue.add` does.

        It is there when you commit, and gone when you roll back. Raises `UnsupportedSession`, too, where
        `session` is on another database than the application's tasks.
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
        """Add a task for each of `items`, as `Queue.add_many` does; answer how many there were."""
        current = self.current
        joined: Any = current.database.joined(session)
        count: int | Coroutine[Any, Any, int] = current.queue.add_many(joined, type, items, **options)
        return count

    def use(self, type: str, processor: Callable[[Any], Any], **options: Unpack[ProcessorOptions]) -> None:
        """Work tasks of this type with `processor`, as `Worker.use` does, in every application of this Apoq.

        Before or after `init_app`. Each call is in an application context of its own.
        """
        make_processor(type, processor, **options)  # which refuses what can't be one
        if type in self._processors:
            raise InvalidProcessor(
                f"the type {type!r} has a processor already, {self._processors[type][0]!r}: a type has one"
            )
        self._processors[type] = (processor, options)
        for worker in list(self._workers):
            worker.use(type, processor, **options)

    def processor(self, type: str, **options: Unpack[ProcessorOptions]) -> Callable[[F], F]:
        """Decorate a plain or a coroutine function that works tasks of this type, as `use` does."""

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
    ) -> Any:
        """Make a function's calls tasks, as `Queue.task` does: ``@apoq.task``, ``@apoq.task(retry_limit=3)``.

        They are added to the current application's queue, in the current session:
        ``send_welcome.add(user_id=7)``, or ``send_welcome.add(session, user_id=7)``. Each runs in an
        application context of its own.
        """
        options: ProcessorOptions = {
            "retry_limit": retry_limit,
            "retry_delay": retry_delay,
            "timeout": timeout,
        }

        def decorate(function: Callable[..., Any]) -> AppTask[..., Any, ...]:
            task: AppTask[..., Any, ...] = AppTask(
                CurrentQueue(self), function, type=type, aliases=aliases, **options
            )
            for name in (task.type, *task.aliases):
                self.use(name, task.processor.function, **options)
            return task

        return decorate if function is None else decorate(function)

    def equip(self, worker: Worker) -> None:
        """Give a worker the processors: those that there are, and those that are still to come."""
        for type_, (processor, options) in self._processors.items():
            worker.use(type_, processor, **options)
        self._workers.add(worker)


class CurrentQueue:
    """The current application's queue, for typed tasks that are made before there is an application."""

    def __init__(self, apoq: Apoq) -> None:
        self._apoq = apoq

    def __repr__(self) -> str:
        return "<the queue of the current application>"

    @property
    def name(self) -> str:
        """Its name."""
        return self._apoq.queue.name

    @property
    def schema(self) -> str | None:
        """Where its tables are."""
        return self._apoq.queue.schema

    def add(self, session: Any, type: str, data: Any, **options: Unpack[Options]) -> Any:
        """Add a task, in the current session where none is given."""
        return self._apoq.add(type, data, session=session, **options)

    def add_many(self, session: Any, type: str, items: Iterable[Any], **options: Unpack[Options]) -> Any:
        """Add many tasks."""
        return self._apoq.add_many(type, items, session=session, **options)
