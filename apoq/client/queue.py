"""A queue: adds tasks, cancels them and runs them once more, in the caller's transaction."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Concatenate, TypeVar, Unpack, overload
from weakref import WeakSet

from sqlalchemy import inspect
from typing_extensions import ParamSpec

from apoq.client.operations import add, add_many, cancel, retry
from apoq.client.session_adapters import AsyncioSession, SyncSession, through
from apoq.client.typed_task import Anything, Decorator, TypedTask
from apoq.client.unsupported_sessions import refusal
from apoq.core.options import HIGHEST_LIMIT, Options, checked, integer
from apoq.core.outcomes import Cancel, report
from apoq.core.payload import MAX_DATA_SIZE, check_name, check_schema, check_type, encode
from apoq.core.registry import Registry, Running
from apoq.core.retry import DEFAULT_RETRY_LIMIT, RetryDelay, exponential_backoff
from apoq.errors import InvalidProcessor, InvalidTask, UnsupportedSession, glimpse
from apoq.schema.models import DEFAULT_QUEUE, Task, task_class

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound=Running)

_LOWEST_ID, _HIGHEST_ID = -(2**63), 2**63 - 1


class Queue:
    """A name and a schema, to which tasks are added. It holds no connection: the caller's session is used.

    Tasks of different queues are worked by different workers, or by one that is given both.
    """

    def __init__(
        self, name: str = DEFAULT_QUEUE, *, schema: str | None = None, max_data_size: int = MAX_DATA_SIZE
    ) -> None:
        """Name a queue; `schema` is where apoq's tables are (default: by the connection's search_path).

        `max_data_size` is the limit of a task's data, in bytes of JSON.
        """
        self.name = check_name(name, "a queue's name")
        self.schema = check_schema(schema)
        self.max_data_size = integer("max_data_size", max_data_size, 1, HIGHEST_LIMIT)
        self._tasks: dict[str, TypedTask[..., Any]] = {}
        self._registries: WeakSet[Registry] = WeakSet()

    def __repr__(self) -> str:
        schema = "" if self.schema is None else f", schema={self.schema!r}"
        return f"Queue({self.name!r}{schema})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Queue) and (self.name, self.schema) == (other.name, other.schema)

    def __hash__(self) -> int:
        return hash((self.name, self.schema))

    @property
    def task_class(self) -> type[Task]:
        """The class mapped to this queue's table: `apoq.Task`, unless the queue has a schema of its own."""
        return task_class(self.schema)

    @overload
    def add(
        self,
        session: SyncSession,
        type: str,
        data: Any = ...,
        **options: Unpack[Options],
    ) -> Task: ...
    @overload
    def add(
        self,
        session: AsyncioSession,
        type: str,
        data: Any = ...,
        **options: Unpack[Options],
    ) -> Coroutine[Any, Any, Task]: ...
    def add(
        self,
        session: SyncSession | AsyncioSession,
        type: str,
        data: Any = {},  # noqa: B006 - never changed
        *,
        delay: timedelta | None = None,
        process_at: datetime | None = None,
        priority: int = 0,
        retry_limit: int | None = None,
        retry_delay: float | timedelta | None = None,
        timeout: float | timedelta | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Task | Coroutine[Any, Any, Task]:
        """Add a task in the transaction of `session`, with one statement, and answer it with its id.

        The task is there when the caller commits, and gone when the caller rolls back. Nothing is
        committed, retried or flushed here. With an asyncio session or connection, await the answer. A
        `Task` added through an ORM session is in that session; any other is in none.

        `data` is anything that JSON can hold. It is due at once, or after `delay`, or at `process_at`
        (with a time zone); of the due tasks of a queue, those with a higher `priority` are claimed first.
        `retry_limit`, `retry_delay` and `timeout` (seconds or timedeltas) stand for the processor's own.
        `meta` is a dict for your application's own use, such as a request id or a tenant, of at most 4 KB of
        JSON; a processor reads it as ``task.meta``. The keys `traceparent` and `tracestate` are reserved.

        Raises `InvalidTask` before anything is sent, and `SchemaMismatch` where the tables are missing.
        """
        if isinstance(session, str):
            raise UnsupportedSession(refusal(session))
        options = checked(delay, process_at, priority, retry_limit, retry_delay, timeout, meta)
        parameters = {"task_queue": self.name, "task_type": check_type(type), **options}
        parameters["task_data"] = encode(data, self.max_data_size)
        return through(session, lambda caller: add(caller, self.schema, parameters))

    @overload
    def add_many(
        self,
        session: SyncSession,
        type: str,
        items: Iterable[Any],
        **options: Unpack[Options],
    ) -> int: ...
    @overload
    def add_many(
        self,
        session: AsyncioSession,
        type: str,
        items: Iterable[Any],
        **options: Unpack[Options],
    ) -> Coroutine[Any, Any, int]: ...
    def add_many(
        self,
        session: SyncSession | AsyncioSession,
        type: str,
        items: Iterable[Any],
        *,
        delay: timedelta | None = None,
        process_at: datetime | None = None,
        priority: int = 0,
        retry_limit: int | None = None,
        retry_delay: float | timedelta | None = None,
        timeout: float | timedelta | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> int | Coroutine[Any, Any, int]:
        """Add a task for each of `items` in the transaction of `session`, and answer how many there were.

        Sent in batches as `items` yields them: a million tasks never stand in memory, nor in one
        statement. Fastest where `items` is a list or a tuple: what is beyond the first batch is sent by one
        COPY then. Options as in `add`, the same for all. Where `items` holds something that JSON can't,
        `InvalidData` says which; tasks before it may have been sent by then, and a COPY that fails fails the
        transaction, so let the error roll back, all or to a savepoint. On a psycopg connection in
        autocommit, each batch is committed by itself.
        """
        if isinstance(session, str):
            raise UnsupportedSession(refusal(session))
        options = checked(delay, process_at, priority, retry_limit, retry_delay, timeout, meta)
        parameters = {"task_queue": self.name, "task_type": check_type(type), **options}
        if isinstance(items, str | bytes | dict) or not isinstance(items, Iterable):
            raise InvalidTask(
                f"add_many takes the data of many tasks, such as a list of dicts, not one {glimpse(items)}"
            )
        total = len(items) if isinstance(items, list | tuple) else None
        return through(
            session,
            lambda caller: add_many(caller, self.schema, parameters, self._documents(items), total),
        )

    @overload
    def cancel(self, session: SyncSession, task: Task | int, *, reason: str = ...) -> bool: ...
    @overload
    def cancel(
        self, session: AsyncioSession, task: Task | int, *, reason: str = ...
    ) -> Coroutine[Any, Any, bool]: ...
    def cancel(
        self, session: SyncSession | AsyncioSession, task: Task | int, *, reason: str = ""
    ) -> bool | Coroutine[Any, Any, bool]:
        """Cancel a task of this queue, or the one with this id, in the transaction of `session`.

        Answers whether it did: not where the task has ended already, or isn't in this queue. With an asyncio
        session or connection, await the answer. `reason` is kept in `Task.error`.

        A task that waits is not run. One that runs when you commit is told to stop: a coroutine is cancelled,
        for a plain function `task.should_stop` turns true. Whatever it comes to then is refused, and what it
        wrote to `task.session` undone. Its worker learns of it at once if a notification reaches it, else
        within its next heartbeats.

        Where the task is just being completed, this waits for that to end, one way or the other.
        """
        parameters = {
            "task_id": self._id_of(task),
            "from_queue": self.name,
            "reason": encode(report(Cancel(_reason(reason)))),
        }
        return through(session, lambda caller: cancel(caller, self.schema, parameters))

    @overload
    def retry(self, session: SyncSession, task: Task | int, *, delay: timedelta | None = ...) -> bool: ...
    @overload
    def retry(
        self, session: AsyncioSession, task: Task | int, *, delay: timedelta | None = ...
    ) -> Coroutine[Any, Any, bool]: ...
    def retry(
        self, session: SyncSession | AsyncioSession, task: Task | int, *, delay: timedelta | None = None
    ) -> bool | Coroutine[Any, Any, bool]:
        """Run a task of this queue that has ended once more, or the one with this id.

        It is pending when you commit `session`, due at once or after `delay`, whether it had failed, was
        cancelled or had completed, and has all its attempts again. Its last error stays until the next.
        Answers whether it did: not where the task has not ended, or isn't in this queue. With an asyncio
        session or connection, await the answer.
        """
        parameters = {
            "task_id": self._id_of(task),
            "from_queue": self.name,
            "task_delay": checked(delay)["task_delay"],
        }
        return through(session, lambda caller: retry(caller, self.schema, parameters))

    @property
    def tasks(self) -> Mapping[str, TypedTask[..., Any]]:
        """The typed tasks of this queue, by their types and aliases."""
        return MappingProxyType(self._tasks)

    @overload
    def task(self, function: Callable[Concatenate[Anything, ...], R], /) -> TypedTask[..., R, ...]: ...
    @overload
    def task(self, function: Callable[Concatenate[T, P], R], /) -> TypedTask[P, R, Concatenate[T, P]]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> TypedTask[P, R, P]: ...
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
        """Make a function's calls tasks of this queue: ``@queue.task``, or ``@queue.task(retry_limit=3)``.

        What it answers still calls the function, and adds tasks by ``.add(session, …)`` with the function's
        own arguments. A worker that is given this queue runs them. A first parameter that is annotated with
        `RunningTask`, or `AsyncRunningTask` for a coroutine function, gets the running task.

        `type` is the function's dotted path unless it is named here, and `aliases` are types that it had
        before and are still worked. The other options are as in `Worker.use`.

        Raises `InvalidProcessor` where the type has a processor already, an argument could not travel as
        JSON, or an option makes no sense.
        """

        def decorate(function: Callable[..., Any]) -> TypedTask[..., Any]:
            task: TypedTask[..., Any] = TypedTask(
                self,
                function,
                type=type,
                aliases=aliases,
                retry_limit=retry_limit,
                retry_delay=retry_delay,
                timeout=timeout,
            )
            self._register(task)
            return task

        return decorate if function is None else decorate(function)

    def register_in(self, registry: Registry) -> None:
        """Tell a worker's registry the typed tasks of this queue: those of now, and those to come."""
        for type_, task in self._tasks.items():
            registry.put(self, type_, task.processor)
        self._registries.add(registry)

    def _register(self, task: TypedTask[..., Any]) -> None:
        types, registries = dict.fromkeys((task.type, *task.aliases)), tuple(self._registries)
        for type_ in types:
            if type_ in self._tasks:
                raise InvalidProcessor(
                    f"the type {type_!r} has a processor already, {self._tasks[type_].function!r}: "
                    f"name another by {self!r}.task(type=…)"
                )
        for registry in registries:
            for type_ in types:
                registry.check_free(self, type_)
        for type_ in types:
            self._tasks[type_] = task
            for registry in registries:
                registry.put(self, type_, task.processor)

    def _documents(self, items: Iterable[Any]) -> Iterator[str]:
        for index, data in enumerate(items):
            yield encode(data, self.max_data_size, f"items[{index}]")

    def _id_of(self, task: Task | int) -> int:
        if isinstance(task, Task):
            if inspect(task).mapper.local_table is not self.task_class.__table__:
                raise InvalidTask(f"{task!r} is in another schema than {self!r}")
            if task.id is None:
                raise InvalidTask(f"{task!r} has no id yet: flush the session that it was added to")
            return task.id
        return integer("a task's id", task, _LOWEST_ID, _HIGHEST_ID)


def _reason(reason: object) -> str:
    if not isinstance(reason, str):
        raise InvalidTask(f"a reason is text, not {glimpse(reason)}")
    return reason
