"""Execute an operation in the transaction of a test, for each kind of session."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util.concurrency import in_greenlet

from apoq.client import session_adapters
from apoq.client.unsupported_sessions import instead_of, is_mock, kind_of, refusal
from apoq.errors import SchemaMismatch, UnsupportedSession
from apoq.migrations.prepare import missing
from apoq.postgres.connections import is_missing
from apoq.postgres.urls import check_dialect
from apoq.schema.models import Task
from apoq.schema.objects import detached

TestSession = Session | scoped_session[Session] | Connection
AsyncTestSession = AsyncSession | async_scoped_session[AsyncSession] | AsyncConnection

Inner = Session | Connection
T = TypeVar("T")


def inside(
    session: TestSession | AsyncTestSession, operation: Callable[[Inner], T]
) -> T | Coroutine[Any, Any, T]:
    """Execute an operation in a session; return an awaitable if the session is asyncio's."""
    __tracebackhide__ = True
    if is_mock(session):
        raise UnsupportedSession(refusal(session))
    match session:
        case scoped_session():
            return operation(session())
        case Session() | Connection():
            return operation(session)
        case async_scoped_session():
            return session().run_sync(operation)
        case AsyncSession() | AsyncConnection():
            return session.run_sync(operation)
    raise UnsupportedSession(
        "session must be the session or the connection of your test, SQLAlchemy's Session, scoped_session, "
        f"Connection, AsyncSession or AsyncConnection, got {kind_of(session)}: {instead_of(session)}"
    )


def connection_of(inner: Inner) -> Connection:
    """Return the connection, in a transaction, on which apoq's statements are executed."""
    if isinstance(inner, Session):
        connection = session_adapters.connection_of(inner, session_adapters.bind_of(inner))
    else:
        connection = inner
    check_dialect(connection.dialect)
    if connection.dialect.is_async and not in_greenlet():
        raise UnsupportedSession(
            "session must be the AsyncSession or AsyncConnection itself, got its synchronous side: pass the "
            "asyncio object, and await the result"
        )
    driver: Any = connection.connection.driver_connection
    if driver.autocommit:
        raise UnsupportedSession(
            "session must be in a transaction that the test rolls back, got one in autocommit mode: omit "
            "isolation_level='AUTOCOMMIT'"
        )
    return connection


def in_session(inner: Inner, schema: str | None, row: Mapping[Any, Any]) -> Task:
    """Return the `Task` of a row that has just been read; the session's object, if there is a session."""
    task = detached(schema, row)
    return inner.merge(task, load=False) if isinstance(inner, Session) else task


@contextmanager
def clear_errors(schema: str | None) -> Iterator[None]:
    """Raise `SchemaMismatch` if the tables are missing."""
    try:
        yield
    except DBAPIError as error:
        if is_missing(error):
            raise SchemaMismatch(missing(schema)) from error
        raise
