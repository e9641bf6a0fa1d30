"""Functions whose calls are tasks."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property, update_wrapper
from pathlib import Path
from typing import Any, Concatenate, Generic, Protocol, TypeVar, Unpack, overload

from typing_extensions import ParamSpec

from apoq.client.session_adapters import AsyncioSession, SyncSession
from apoq.core.arguments import Arguments, UnknownAnnotation
from apoq.core.options import Options, checked
from apoq.core.registry import Running, check_processed, make_processor
from apoq.core.retry import DEFAULT_RETRY_LIMIT, RetryDelay, exponential_backoff
from apoq.errors import InvalidProcessor, InvalidTask, glimpse
from apoq.schema.models import Task

P = ParamSpec("P")
"""The parameters whose arguments travel."""
C = ParamSpec("C", default=P)
"""The parameters of the function itself, of which the first may be the running task."""
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T", bound=Running)


class Anything:
    """What a first parameter takes only where it takes anything.

    It might take a running task, too, for all that a type checker knows; so such a function isn't checked.
    """


class TaskQueue(Protocol):
    """What a typed task knows of its `Queue`."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def schema(self) -> str | None:
        """Where its tables are."""

    def add(self, session: Any, type: str, data: Any, **options: Unpack[Options]) -> Any:
        """Add a task."""

    def add_many(self, session: Any, type: str, items: Iterable[Any], **options: Unpack[Options]) -> Any:
        """Add many tasks."""


@dataclass(frozen=True, slots=True)
class Call(Generic[P]):
    """A call of a typed task that may be added to its queue."""

    type: str
    data: dict[str, Any]
    """Its arguments, as they travel."""


class TypedTask(Generic[P, R_co, C]):
    """A function whose calls can be added to a queue, where its workers run them.

    Made by ``@queue.task``. Calling it calls the function, here and now.
    """

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
    ) -> None:
        """Use `Queue.task` instead, which also tells the workers."""
        if isinstance(function, TypedTask):
            function = function.function  # which is a task of another queue, too
        if isinstance(function, staticmethod):
            function = function.__func__
        if not callable(function) or inspect.isclass(function):
            raise InvalidProcessor(f"a task is a function, not {glimpse(function)}: `@queue.task(type=…)`")
        if isinstance(aliases, str):
            raise InvalidProcessor(f"aliases are several types, such as [{aliases!r}], not {aliases!r}")
        self.queue = queue
        self.function: Callable[C, R_co] = function
        self.type = name_of(function) if type is None else type
        self.aliases = tuple(aliases)
        for alias in self.aliases:
            check_processed(alias)
        processor = make_processor(
            self.type, function, retry_limit=retry_limit, retry_delay=retry_delay, timeout=timeout
        )
        process = self._process_async if processor.is_coroutine else self._process
        self.processor = replace(processor, function=process)
        self._options = Options()
        # Of what the module defines further down: read when they are first needed.
        with suppress(UnknownAnnotation):
            self._arguments  # noqa: B018
        # Not its __dict__, which may hold anything.
        update_wrapper(self, function, updated=())

    def __call__(self, *args: C.args, **kwargs: C.kwargs) -> R_co:
        """Call the function."""
        return self.function(*args, **kwargs)

    @overload
    def add(self, session: SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Task: ...
    @overload
    def add(
        self, session: AsyncioSession, /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, Task]: ...
    def add(self, session: SyncSession | AsyncioSession, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Add a call with these arguments, in the transaction of `session`, and answer the task.

        As `Queue.add` does: await the answer where the session is asyncio's. Raises `InvalidTask` where the
        arguments don't fit the function, and `InvalidData` if a value doesn't fit its annotation, has no
        form in JSON, or would not come back from it as it was given.
        """
        return self.queue.add(session, self.type, self._arguments.write(args, kwargs), **self._options)

    @overload
    def add_many(self, session: SyncSession, calls: Iterable[Call[P]], /) -> int: ...
    @overload
    def add_many(self, session: AsyncioSession, calls: Iterable[Call[P]], /) -> Coroutine[Any, Any, int]: ...
    def add_many(self, session: SyncSession | AsyncioSession, calls: Iterable[Call[P]], /) -> Any:
        """Add many calls, made by `call`, in the transaction of `session`, and answer how many there were.

        As `Queue.add_many` does: in batches, as `calls` yields them, and fastest where it is a list.
        """
        if not isinstance(calls, Iterable):
            raise InvalidTask(f"add_many takes many calls of {self.type!r}, not {glimpse(calls)}")
        items = self._items(calls)
        return self.queue.add_many(
            session, self.type, list(items) if isinstance(calls, list | tuple) else items, **self._options
        )

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call[P]:
        """Make a call for `add_many`; raises what `add` does where the arguments don't fit."""
        return Call(self.type, self._arguments.write(args, kwargs))

    def using(self, **options: Unpack[Options]) -> TypedTask[P, R_co, C]:
        """Answer a copy that adds its tasks with these options, those of `Queue.add`; this one is unchanged.

        Options of `using` on a copy are added to those that it has.
        """
        for name in options.keys() - Options.__annotations__:
            raise TypeError(f"using() got an unexpected keyword argument {name!r}")
        merged: Options = {**self._options, **options}
        checked(**merged)
        copied = copy(self)
        copied._options = merged  # noqa: SLF001 - its own
        return copied

    def __repr__(self) -> str:
        return f"<TypedTask {self.type!r} of {self.queue!r}>"

    def _items(self, calls: Iterable[Call[P]]) -> Iterator[dict[str, Any]]:
        for index, call in enumerate(calls):
            if not isinstance(call, Call) or call.type != self.type:
                raise InvalidTask(
                    f"calls[{index}] is no call of {self.type!r} but {glimpse(call)}: make it by its `call`"
                )
            yield call.data

    @cached_property
    def _arguments(self) -> Arguments:
        return Arguments(self.function, self.type, is_coroutine=self.processor.is_coroutine)

    def _process(self, task: Running) -> Any:
        first = (task,) if self._arguments.follow_task else ()
        function: Any = self.function
        return function(*first, **self._arguments.read(task.data))

    async def _process_async(self, task: Running) -> Any:
        return await self._process(task)


class Decorator(Protocol):
    """What ``queue.task(…)`` answers."""

    @overload
    def __call__(self, function: Callable[Concatenate[Anything, ...], R], /) -> TypedTask[..., R, ...]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[T, P], R], /) -> TypedTask[P, R, Concatenate[T, P]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> TypedTask[P, R, P]: ...


def name_of(function: Callable[..., Any]) -> str:
    """Answer the dotted path of a function, by which its tasks are known."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not name or name.endswith("<lambda>"):
        raise InvalidProcessor(f"{function!r} has no name of its own: give one, `queue.task(type=…)`")
    if module == "__main__":
        # Of a program, what others call it when they import it.
        main = sys.modules["__main__"]
        file = getattr(main, "__file__", None)
        spec = getattr(main, "__spec__", None)
        module = spec.name if spec else Path(file).stem if file else module
    return f"{module}.{name}" if module else name
