"""Typed tasks of a Flask application."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Never, Protocol, TypeVar, Unpack, cast, overload

from typing_extensions import ParamSpec

from apoq.client.session_adapters import SESSION_CLASSES, AsyncioSession, SyncSession
from apoq.client.typed_task import AdoptingQueue, Calls, TypedTask
from apoq.client.unsupported_sessions import is_mistaken, refusal
from apoq.core.options import Options
from apoq.core.registry import Running
from apoq.errors import InvalidProcessor, UnsupportedSession, glimpse
from apoq.schema.models import Task

P = ParamSpec("P")
C = ParamSpec("C", default=P)
R = TypeVar("R")
T = TypeVar("T", bound=Running)


class AppTask(TypedTask[P, R, C]):
    """A function whose calls can be added as tasks of the current application.

    Created by ``@apoq.task``. It is a `TypedTask` whose session may be omitted: by default, tasks are added
    in the current request's session.
    """

    @overload
    def add(self, session: SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> Task: ...
    @overload
    def add(
        self, session: AsyncioSession, /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, Task]: ...
    @overload
    def add(self, *args: P.args, **kwargs: P.kwargs) -> Task: ...
    def add(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[misc]  # it does accept them all
        """Add a call with these arguments as a task, in the transaction of the current or the given session.

        Args:
            *args: Optionally a session, and then the function's positional arguments without the running
                task.
            **kwargs: The function's keyword arguments.

        Returns:
            The new `Task`. With an asyncio session, an awaitable of it.

        Raises:
            InvalidTask: If the arguments don't fit the function's signature.
            InvalidData: If an argument doesn't fit its annotation, can't be converted to JSON, or would be
                changed by the conversion.
            UnsupportedSession: If the session is on another database than the application's tasks, or the
                first argument is an engine or the like instead of a session.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        session, rest = _session_of(args)
        return self._add(session, rest, kwargs)

    @overload
    def add_many(self, session: SyncSession, calls: Calls[P], /) -> int: ...
    @overload
    def add_many(self, session: AsyncioSession, calls: Calls[P], /) -> Coroutine[Any, Any, int]: ...
    @overload
    def add_many(self, calls: Calls[P], /) -> int: ...
    def add_many(self, *args: Any) -> Any:
        """Add many calls as tasks, in the transaction of the current or the given session.

        Args:
            *args: Optionally a session, and then the calls: dicts of arguments, or made by `call`.

        Returns:
            The number of tasks. With an asyncio session, an awaitable of it.

        Raises:
            InvalidTask: If the calls are not an iterable of calls of this task. Earlier calls may already be
                inserted.
            TypeError: If there are other arguments.
            UnsupportedSession: If the session is on another database than the application's tasks, or is not
                a session.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        session, rest = _session_of(args)
        if len(rest) != 1:
            raise TypeError(f"add_many takes an optional session and the calls, got {len(args)} arguments")
        return self._add_many(session, rest[0])

    def using(self, **options: Unpack[Options]) -> AppTask[P, R, C]:
        """Return a copy that adds its tasks with these options. This task is unchanged.

        Args:
            **options: The options, as for `TypedTask.using`.

        Raises:
            InvalidTask: If an option is invalid.
            TypeError: If there is no such option.
        """
        return cast("AppTask[P, R, C]", super().using(**options))

    def to(self, queue: AdoptingQueue) -> Never:
        """Raise `InvalidProcessor`: the tasks are for the queue of the current application.

        Args:
            queue: The other queue.

        Raises:
            InvalidProcessor: Always.
        """
        raise InvalidProcessor(
            f"{self.type!r} must stay in the application's queue, got {glimpse(queue)}: define its function "
            "on that queue, too, with @queue.task, and give the queue in Apoq(queues=[…])"
        )

    def _queue_name(self) -> None:
        """Return None: the queue of each failed task, because the name needs an application context."""

    def _example(self, arguments: str, method: str = "add") -> str:
        return f"{getattr(self.function, '__name__', 'task')}.{method}({arguments})"


def _session_of(args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Split arguments into the session, or None, and the rest. No argument of a task is a session."""
    if args and isinstance(args[0], SESSION_CLASSES):
        return args[0], args[1:]
    if args and not isinstance(args[0], str | None) and is_mistaken(args[0]):
        raise UnsupportedSession(refusal(args[0]))
    return None, args


class Decorator(Protocol):
    """The decorator that ``apoq.task(…)`` returns."""

    @overload
    def __call__(self, function: Callable[Concatenate[T, P], R], /) -> AppTask[P, R, Concatenate[T, P]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> AppTask[P, R, P]: ...
