"""The clock that apoq's statements read, set for the transaction of one test.

Neither Python's clock nor the server's is changed. In statements about apoq's tables that are executed on
this connection, `now()` and its like are replaced by another time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final, Self

from sqlalchemy import ClauseElement, ColumnElement, Connection, DateTime, TableClause, cast, event, func
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.visitors import iterate, replacement_traverse

from apoq.client.session_adapters import CLOCK
from apoq.errors import glimpse
from apoq.schema.models import Task
from apoq.testing.inside import AsyncTestSession, Inner, TestSession, connection_of, inside

_READ_THE_CLOCK: Final = {"now", "statement_timestamp", "clock_timestamp"}


@dataclass(frozen=True, slots=True)
class Clock:
    """Stands still `at` a time, or goes `ahead` of the database's."""

    at: datetime | None = None
    ahead: timedelta = timedelta()

    def now(self) -> ColumnElement[datetime]:
        """Return the expression to read instead of the database's clock."""
        if self.at is not None:
            # A cast, because the ORM reads back an expression, and not a parameter.
            return cast(self.at + self.ahead, DateTime(timezone=True))
        return func.clock_timestamp() + self.ahead


class ClockSet:
    """Sets the clock of a session from its beginning to its end: in a `with`, or an `async with`."""

    def __init__(self, session: TestSession | AsyncTestSession, change: Callable[[Clock], Clock]) -> None:
        self._session = session
        self._change = change
        self._inner: Inner | None = None
        self._clock = Clock()
        self._before: dict[Connection, Clock | None] = {}

    def __enter__(self) -> Self:
        if isinstance(self._session, AsyncSession | async_scoped_session | AsyncConnection):
            raise TypeError("the session is asyncio's: use `async with`")
        inside(self._session, self._set)
        return self

    def __exit__(self, *_: object) -> None:
        self._unset()

    async def __aenter__(self) -> Self:
        if not isinstance(self._session, AsyncSession | async_scoped_session | AsyncConnection):
            raise TypeError("the session isn't asyncio's: use a plain `with`")
        setting: Any = inside(self._session, self._set)
        await setting
        return self

    async def __aexit__(self, *_: object) -> None:
        self._unset()

    def _set(self, inner: Inner) -> None:
        connection = connection_of(inner)
        self._clock = self._change(_of(connection) or Clock())
        self._set_on(connection)
        self._inner = inner
        if isinstance(inner, Session):
            # Where a test's session is on an engine, each of its transactions may have another connection.
            event.listen(inner, "after_begin", self._has_begun)

    def _has_begun(self, _session: Session, _transaction: object, connection: Connection) -> None:
        if connection not in self._before:
            self._set_on(connection)

    def _set_on(self, connection: Connection) -> None:
        self._before[connection] = _of(connection)
        connection.execution_options(**{CLOCK: self._clock})
        if not event.contains(connection, "before_execute", _read_another):
            event.listen(connection, "before_execute", _read_another, retval=True)

    def _unset(self) -> None:
        if isinstance(self._inner, Session):
            event.remove(self._inner, "after_begin", self._has_begun)
        for connection, before in self._before.items():
            connection.execution_options(**{CLOCK: before})
            if before is None:
                event.remove(connection, "before_execute", _read_another)
        self._before.clear()


def freeze(session: TestSession | AsyncTestSession, at: datetime) -> ClockSet:
    """Let apoq's clock stand still in a test's transaction, for the length of a ``with`` block.

    Tasks that are added in the block are created at that time, and due then or `delay` later; `drain` runs
    the tasks that are due by then.

    Args:
        session: The test's session or connection.
        at: The time that the clock shows, with a time zone.

    Returns:
        A context manager. With an asyncio session, use ``async with``.

    Raises:
        TypeError: If `at` is not a datetime with a time zone.
    """
    if not isinstance(at, datetime) or at.utcoffset() is None:
        raise TypeError(f"freeze needs a datetime with a time zone, got {glimpse(at)}")
    return ClockSet(session, lambda _clock: Clock(at))


def travel(session: TestSession | AsyncTestSession, by: timedelta) -> ClockSet:
    """Move apoq's clock ahead in a test's transaction, for the length of a ``with`` block.

    A clock that `freeze` has stopped stays stopped.

    Args:
        session: The test's session or connection.
        by: The time by which the clock is ahead.

    Returns:
        A context manager. With an asyncio session, use ``async with``.

    Raises:
        TypeError: If `by` is not a timedelta.
    """
    if not isinstance(by, timedelta):
        raise TypeError(f"travel needs a timedelta such as timedelta(hours=1), got {glimpse(by)}")
    return ClockSet(session, lambda clock: replace(clock, ahead=clock.ahead + by))


def _of(connection: Connection) -> Clock | None:
    found: Clock | None = connection.get_execution_options().get(CLOCK)
    return found


def _read_another(
    connection: Connection, statement: Any, multiparams: Any, params: Any, _options: Any
) -> tuple[Any, Any, Any]:
    clock = _of(connection)
    return statement if clock is None else _reading(clock, statement), multiparams, params


@lru_cache(maxsize=256)  # to copy a large statement takes a tenth of a second
def _reading(clock: Clock, statement: Any) -> Any:
    """Return a statement that reads this clock, if it is one of apoq's."""
    # A Sequence can be executed, but is not a clause.
    if not isinstance(statement, ClauseElement) or not _is_about_apoq(statement):
        return statement

    def replace(element: Any, **_: Any) -> ColumnElement[datetime] | None:
        reads = isinstance(element, FunctionElement) and element.name in _READ_THE_CLOCK
        return clock.now() if reads else None

    return replacement_traverse(statement, {}, replace)


def _is_about_apoq(statement: Any) -> bool:
    return any(
        isinstance(table := getattr(element, "table", element), TableClause)
        and table.name.startswith("apoq_")
        for element in iterate(statement)
    )


@event.listens_for(Task, "before_insert", propagate=True)
def _say_when(_mapper: object, connection: Connection, task: Any) -> None:
    """Write by the statement what is the column's default otherwise, which reads the server's clock."""
    if _of(connection):
        for name in ("created_at", "process_at"):
            if task.__dict__.get(name) is None:
                setattr(task, name, func.now())
