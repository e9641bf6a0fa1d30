"""Typed tasks of an application."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Concatenate, Final, Protocol, TypeVar, Unpack, cast, overload

import psycopg
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from typing_extensions import ParamSpec

from apoq.client.session_adapters import AsyncioSession, SyncSession
from apoq.client.typed_task import Call, TypedTask
from apoq.core.options import Options
from apoq.core.registry import Running
from apoq.schema.models import Task

P = ParamSpec("P")
C = ParamSpec("C", default=P)
R = TypeVar("R")
T = TypeVar("T", bound=Running)

_SESSIONS: Final = (
    Session,
    scoped_session,
    AsyncSession,
    async_scoped_session,
    Connection,
    AsyncConnection,
    psycopg.Connection,
    psycopg.AsyncConnection,
)
"""What a session is an instance of. No argument is, for none of these has a form in JSON."""


class AppTask(TypedTask[P, R, C]):
    """A function whose calls are added in the current application: made by ``@apoq.task``.

    As other typed tasks, but for the session, which may be left out: then it is the current request's.
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
        """Add a call with these arguments, in the current request's transaction or in that of a session."""
        session, *rest = args if args and isinstance(args[0], _SESSIONS) else (None, *args)
        return super().add(session, *rest, **kwargs)

    @overload
    def add_many(self, session: SyncSession, calls: Iterable[Call[P]], /) -> int: ...
    @overload
    def add_many(self, session: AsyncioSession, calls: Iterable[Call[P]], /) -> Coroutine[Any, Any, int]: ...
    @overload
    def add_many(self, calls: Iterable[Call[P]], /) -> int: ...
    def add_many(self, *args: Any) -> Any:
        """Add many calls, made by `call`, in the same transaction; answer how many there were."""
        session, calls = args if len(args) > 1 else (None, *args)
        return super().add_many(session, calls)

    def using(self, **options: Unpack[Options]) -> AppTask[P, R, C]:
        """Answer a copy that adds its tasks with these options, those of `Queue.add`."""
        return cast("AppTask[P, R, C]", super().using(**options))


class Decorator(Protocol):
    """What ``apoq.task(…)`` answers."""

    @overload
    def __call__(self, function: Callable[Concatenate[T, P], R], /) -> AppTask[P, R, Concatenate[T, P]]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> AppTask[P, R, P]: ...
