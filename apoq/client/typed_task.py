"""Typed tasks: functions whose calls are added to a queue."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property, update_wrapper
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    Generic,
    Protocol,
    TypeVar,
    Unpack,
    overload,
)

from typing_extensions import ParamSpec

from apoq.client.session_adapters import AsyncioSession, SyncSession
from apoq.client.session_first import call_session_first
from apoq.client.task_ids import AnyQueue
from apoq.client.typed_results import TypedResults
from apoq.core.arguments import Arguments, UnknownAnnotation
from apoq.core.failures import FollowUp, OnFailure, TaskFailure
from apoq.core.imported import importable_name
from apoq.core.limits import Limit
from apoq.core.options import Options, checked_options, merged_options, unique_options
from apoq.core.payload import canonical, check_name
from apoq.core.registry import Running, check_processed, make_processor
from apoq.core.retry import DEFAULT_RETRY_LIMIT, RetryDelay, exponential_backoff
from apoq.core.schedules import ScheduleOptions, declared
from apoq.core.unique import OnConflict, UniqueUntil, typed_key
from apoq.errors import (
    InvalidData,
    InvalidProcessor,
    InvalidSchedule,
    InvalidTask,
    glimpse,
)
from apoq.schema.models import Task

P = ParamSpec("P")
"""The parameters whose arguments are stored with the task."""
C = ParamSpec("C", default=P)
"""All parameters of the function; the first may be the running task."""
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T", bound=Running)

UniqueRule = bool | Callable[..., str | None]
"""Whether a typed task is unique by its arguments; or a function that returns the key for them."""

_OTHER_LIBRARIES: Final = {"apply_async", "defer", "delay", "enqueue", "send"}
"""Names of the method `add` in other libraries."""


class Anything:
    """A type that only a parameter without an annotation, or annotated with Any or object, accepts.

    Such a first parameter could also be the running task, which a type checker can't know. So the arguments
    of such a function are not checked.
    """


class TaskQueue(AnyQueue, Protocol):
    """The queue of a typed task."""

    def add(self, session: Any, type: str, data: Any, **options: Unpack[Options]) -> Any:
        """Add a task."""

    def add_many(self, session: Any, type: str, items: Iterable[Any], **options: Unpack[Options]) -> Any:
        """Add many tasks."""


class AdoptingQueue(TaskQueue, Protocol):
    """A `Queue`, whose module imports this one."""

    def adopt(self, task: TypedTask[..., Any, ...]) -> None:
        """Let workers of this queue run a task."""


@dataclass(frozen=True, slots=True)
class Call(Generic[P]):
    """A call of a typed task, made by `TypedTask.call`, for `add_many`, chains, groups and schedules.

    Attributes:
        type: The task's type.
        data: The arguments as JSON.
        options: The options of the typed task: those of `TypedTask.using`, and its keys.
    """

    type: str
    data: dict[str, Any]
    options: Options = field(default_factory=Options, repr=False)


Calls = Iterable[Call[P] | Mapping[str, Any]]
"""Calls of a typed task, for `TypedTask.add_many`: their arguments, or made by `TypedTask.call`."""


class TypedTask(TypedResults[R_co], Generic[P, R_co, C]):
    """A function whose calls can be added to a queue as tasks.

    Created by ``@queue.task``. Calling it calls the function directly, without a task.

    Attributes:
        function (Callable): The function itself.
        type (str): The type of its tasks.
        aliases (tuple[str, ...]): Other types that it also processes.
        queue (Queue): The queue that its tasks are added to.
        schedule (Mapping | None): The times and rules by which workers add its tasks, or None.
    """

    queue: TaskQueue

    def __init__(
        self,
        queue: TaskQueue,
        function: Callable[C, R_co],
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
        isolated: bool = False,
        schedule: ScheduleOptions | None = None,
    ) -> None:
        """Use `Queue.task` instead, which also registers the task."""
        if isinstance(function, TypedTask):
            function = function.function  # also a task of another queue
        if isinstance(function, staticmethod):
            function = function.__func__
        if not callable(function) or inspect.isclass(function):
            raise InvalidProcessor(
                f"@queue.task must decorate a function, got {glimpse(function)}: write `@queue.task`, or "
                "`@queue.task(type=…)` with keywords"
            )
        if isinstance(aliases, str):
            raise InvalidProcessor(f"aliases must be a list of types, such as [{aliases!r}], got {aliases!r}")
        self.queue = queue
        self.function: Callable[C, R_co] = function
        self.type = name_of(function) if type is None else type
        self.aliases = tuple(aliases)
        for alias in self.aliases:
            check_processed(alias)
        processor = make_processor(
            self.type,
            function,
            retry_limit=retry_limit,
            retry_delay=retry_delay,
            timeout=timeout,
            on_failure=on_failure,
            keep_result=keep_result,
            max_result_size=max_result_size,
            limit=limit,
            isolated=isolated,
        )
        process = self._process_async if processor.is_coroutine else self._process
        self._on_failure = on_failure
        follow = self._in_own_queue(processor.on_failure)
        self.processor = replace(processor, function=process, on_failure=follow)
        self._options = unique_options(self._key_of, unique, unique_until, on_conflict)
        self._unique = unique
        if limit is not None and callable(limit.key):
            self._options["key"] = self.concurrency_key_of
        self._declared_options = self._options
        # Now if possible. Annotations may name what the module defines below: these are read at the first
        # use.
        with suppress(UnknownAnnotation):
            self._arguments  # noqa: B018
            if keep_result:
                self._returned  # noqa: B018
        self.schedule = declared(schedule or {})
        if self.schedule:
            with suppress(UnknownAnnotation):
                self.scheduled_data()
        # Without the function's __dict__, which may contain any names.
        update_wrapper(self, function, updated=())

    def __call__(self, *args: C.args, **kwargs: C.kwargs) -> R_co:
        """Call the function directly, without a task, and return its result."""
        return self.function(*args, **kwargs)

    if not TYPE_CHECKING:  # with which type checkers would accept any attribute

        def __getattr__(self, name: str) -> Any:
            """Point to `add` those who know it by another name."""
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            if name in _OTHER_LIBRARIES:
                message += f": did you mean `{self._example('…')}`?"
            raise AttributeError(message)

    @overload
    def add(self, session: SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Task: ...
    @overload
    def add(
        self, session: AsyncioSession, /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, Task]: ...
    @call_session_first
    def add(self, session: SyncSession | AsyncioSession, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Add a call with these arguments as a task, in the transaction of `session`.

        Args:
            session: A session or a connection, as for `Queue.add`.
            *args: The function's positional arguments, without the running task.
            **kwargs: The function's keyword arguments.

        Returns:
            The new `Task`. With an asyncio session, an awaitable of it.

        Raises:
            InvalidTask: If the arguments don't fit the function's signature.
            InvalidData: If an argument doesn't fit its annotation, can't be converted to JSON, or would be
                changed by the conversion.
            UnsupportedSession: If `session` is not a session or a connection.
            SchemaMismatch: If apoq's tables are missing or at another version.

        Note:
            Executes one INSERT in the caller's transaction. It doesn't commit or flush.
        """
        return self._add(session, args, kwargs)

    @overload
    def add_many(self, session: SyncSession, calls: Calls[P], /) -> int: ...
    @overload
    def add_many(self, session: AsyncioSession, calls: Calls[P], /) -> Coroutine[Any, Any, int]: ...
    @call_session_first
    def add_many(self, session: SyncSession | AsyncioSession, calls: Calls[P], /) -> Any:
        """Add many calls as tasks, in the transaction of `session`.

        Args:
            session: A session or a connection, as for `Queue.add_many`.
            calls: The arguments of each call, as a dict by their names; or calls of this task, made by
                `call`, whose arguments a type checker checks. A list or a tuple is fastest.

        Returns:
            The number of tasks. With an asyncio session, an awaitable of it.

        Raises:
            InvalidTask: If `calls` is not an iterable of calls of this task, or the arguments of one don't
                fit the function's signature. Earlier calls may already be inserted, unless `calls` is a list
                or a tuple.
            InvalidData: If an argument doesn't fit its annotation, or can't be converted to JSON.
            UnsupportedSession: If `session` is not a session or a connection.
            SchemaMismatch: If apoq's tables are missing or at another version.

        Note:
            Sends batches in the caller's transaction while it iterates over `calls`, as `Queue.add_many`
            does.
        """
        return self._add_many(session, calls)

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call[P]:
        """Return a call with these arguments, for `add_many`, chains, groups and schedules.

        Args:
            *args: The function's positional arguments, without the running task.
            **kwargs: The function's keyword arguments.

        Raises:
            InvalidTask: If the arguments don't fit the function's signature.
            InvalidData: If an argument doesn't fit its annotation, can't be converted to JSON, or would be
                changed by the conversion.
        """
        return Call(self.type, self._arguments.write(args, kwargs), self._options)

    def scheduled_data(self) -> dict[str, Any]:
        """Return the data of the tasks that the function's own schedule adds: a call without arguments."""
        try:
            return self._arguments.write((), {})
        except InvalidTask:
            name = getattr(self.function, "__name__", "task")
            raise InvalidSchedule(
                f"a function with a schedule must be callable without arguments, got {self.type!r}, whose "
                f"parameters are {self._arguments.signature}: give them defaults, or schedule calls by "
                f"queue.schedule(session, 'a name', {name}.call(…), cron=…)"
            ) from None

    def using(self, **options: Unpack[Options]) -> TypedTask[P, R_co, C]:
        """Return a copy that adds its tasks with these options. This task is unchanged.

        Args:
            **options: `delay`, `process_at`, `priority`, `retry_limit`, `retry_delay`, `timeout`, `meta`,
                `expires_at`, `expires_in`, `unique_key`, `unique_until`, `on_conflict`, `debounce`,
                `max_wait` and `throttle`, as for `Queue.add`. They are added to the options that this task
                already has.

        Raises:
            InvalidTask: If an option is invalid.
            TypeError: If there is no such option.
        """
        for name in options.keys() - Options.__annotations__:
            raise TypeError(f"using() got an unexpected keyword argument {name!r}")
        merged = merged_options(self._options, options)
        checked_options(**merged)
        copied = copy(self)
        copied._options = merged  # noqa: SLF001 - of the same class
        return copied

    def to(self, queue: AdoptingQueue) -> TypedTask[P, R_co, C]:
        """Return a copy that adds its tasks to another queue, such as that of a tenant.

        Workers of that queue in this process run them from now on, so a program that runs a worker must call
        it for each of its queues. A schedule stays that of this task.

        Args:
            queue: The queue.

        Raises:
            InvalidProcessor: If `queue` is not a `Queue`, or it has another function for the type.
        """
        if isinstance(queue, type) or not callable(getattr(queue, "adopt", None)):
            raise InvalidProcessor(f"queue must be a Queue, got {glimpse(queue)}")
        follow = self._on_failure
        if (
            isinstance(follow, TypedTask)
            and self.processor.on_failure
            and not self.processor.on_failure.queue
        ):
            follow.to(queue)
        copied = copy(self)
        copied.queue = queue
        copied.schedule = declared({})
        queue.adopt(copied)
        return copied

    def follow_up(self) -> FollowUp:
        """Return how this task is added when another one fails; `InvalidProcessor` if it can't be."""
        with suppress(UnknownAnnotation):
            self._check_follow_up()
        parameters, unique = checked_options(**self._options)
        if unique is not None:
            raise InvalidProcessor(f"on_failure must be a task without a unique key, got {self!r}")

        def data(failure: TaskFailure) -> dict[str, Any]:
            return self._arguments.write((failure,), {})

        return FollowUp(self.type, self._queue_name(), parameters, data, self._options.get("key"))

    def _check_follow_up(self) -> None:
        try:
            self._arguments.write((TaskFailure(1, "", "", 1, "", ""),), {})
        except InvalidTask:
            raise InvalidProcessor(
                "on_failure must be a task with one argument, annotated with TaskFailure, such as "
                f"`def notify(failure: TaskFailure)`, got {self.type!r}, whose parameters are "
                f"{self._arguments.signature}"
            ) from None

    def _queue_name(self) -> str | None:
        """Return the name of the queue; None for the queue of each failed task."""
        return self.queue.name

    def _in_own_queue(self, follow: FollowUp | None) -> FollowUp | None:
        """Return the follow-up of this task, which goes to another queue if this one does."""
        its = self._on_failure
        if follow is None or follow.queue is None or not isinstance(its, TypedTask):
            return follow
        if its.queue.schema != self.queue.schema:
            raise InvalidProcessor(
                f"on_failure must be a task in the same schema as {self.type!r}, got {its!r}: define it on a "
                "queue of that schema"
            )
        return replace(follow, queue=None) if its.queue == self.queue else follow

    def __repr__(self) -> str:
        return f"<TypedTask {self.type!r} of {self.queue!r}>"

    def _add(self, session: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.queue.add(session, self.type, self._arguments.write(args, kwargs), **self._options)

    def _add_many(self, session: Any, calls: Calls[P]) -> Any:
        if isinstance(calls, Mapping) or not isinstance(calls, Iterable):
            raise InvalidTask(f"calls must be an iterable of calls of {self.type!r}, got {glimpse(calls)}")
        items = self._items(calls)
        return self.queue.add_many(
            session, self.type, list(items) if isinstance(calls, list | tuple) else items, **self._options
        )

    def _example(self, arguments: str, method: str = "add") -> str:
        """Return a call of a method, as a message shows it."""
        name = getattr(self.function, "__name__", "task")
        return f"{name}.{method}({', '.join(filter(None, ['session', arguments]))})"

    def _items(self, calls: Calls[P]) -> Iterator[dict[str, Any]]:
        for index, call in enumerate(calls):
            if isinstance(call, Mapping):
                yield self._written(index, call)
            elif isinstance(call, Call) and call.type == self.type:
                self._check_options(index, call)
                yield call.data
            else:
                raise InvalidTask(
                    f"calls[{index}] must be a dict of arguments of {self.type!r}, or a call of it, got "
                    f"{glimpse(call)}: make a call with the task's `call`"
                )

    def _check_options(self, index: int, call: Call[Any]) -> None:
        """Fail if a call has an option that would be ignored."""
        if call.options in (self._options, self._declared_options):
            return
        options: Mapping[str, Any] = self._options
        if own := {name for name, its in call.options.items() if its != options.get(name)}:
            raise InvalidTask(
                f"calls[{index}] must have no options of its own, got {', '.join(sorted(own))}: call "
                "task.using(…).add_many(session, …), with options for all calls"
            )

    def _written(self, index: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._arguments.write((), dict(arguments))
        except InvalidData as error:
            reason = str(error).removeprefix(f"{error.path}: ")
            raise InvalidData(f"calls[{index}]{error.path.removeprefix('data')}", reason) from None
        except InvalidTask as error:
            raise InvalidTask(f"calls[{index}]: {error}") from None

    @cached_property
    def _arguments(self) -> Arguments:
        return Arguments(self.function, self.type, is_coroutine=self.processor.is_coroutine)

    def _key_of(self, data: dict[str, Any]) -> str | None:
        """Return the unique key of a call, by the JSON of its arguments, as `unique` says."""
        if not callable(self._unique):
            return typed_key(self.type, canonical(self._arguments.without_defaults(data)))
        detail = self._unique(**self._arguments.with_defaults(data))
        return None if detail is None else typed_key(self.type, check_name(detail, "a unique key"))

    def concurrency_key_of(self, data: dict[str, Any]) -> str | None:
        """Return the concurrency key of a call, as the key of `limit` says."""
        limit = self.processor.limit
        return None if limit is None else limit.key_of(self._arguments.with_defaults(data))

    def _process(self, task: Running) -> Any:
        returned = self._call(task)
        if self.processor.result_encoder is None or inspect.isawaitable(returned):
            return returned  # it is ignored, or the worker refuses it
        return self._returned.write(returned)

    async def _process_async(self, task: Running) -> Any:
        returned = await self._call(task)
        return returned if self.processor.result_encoder is None else self._returned.write(returned)

    def _call(self, task: Running) -> Any:
        first = (task,) if self._arguments.follow_task else ()
        function: Any = self.function
        return function(*first, **self._arguments.read(task.data))


class Decorator(Protocol):
    """The decorator that ``queue.task(…)`` returns."""

    @overload
    def __call__(self, function: Callable[Concatenate[Anything, ...], R], /) -> TypedTask[..., R, ...]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[T, P], R], /) -> TypedTask[P, R, Concatenate[T, P]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> TypedTask[P, R, P]: ...


def name_of(function: Callable[..., Any]) -> str:
    """Return the dotted path of a function, which is the default type of its tasks."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not name or name.endswith("<lambda>"):
        raise InvalidProcessor(
            f"a task's function must have a name, got {function!r}: give its type, `queue.task(type=…)`"
        )
    return f"{importable_name(module)}.{name}" if module else name
