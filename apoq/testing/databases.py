"""A database for tests, and sessions that are rolled back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from typing import Any, Final, overload
from uuid import uuid4

from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from apoq.embedded import database
from apoq.errors import ApoqError
from apoq.migrations import prepare
from apoq.postgres.urls import database_url

_FAST: Final = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
"""Settings of a private server, whose data is not needed after the tests."""

_COMMITS: Final[dict[str, Any]] = {"join_transaction_mode": "create_savepoint"}
"""With it, a commit releases a savepoint, and a rollback undoes only this session's changes."""


@contextmanager
def private_database() -> Iterator[URL]:
    """Create a database with apoq's tables, and drop it at the end."""
    with database(settings=_FAST) as server:
        url = database_url(server)
        admin = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        name = f"apoq_test_{uuid4().hex[:12]}"
        try:
            _execute(admin, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
        except ProgrammingError as error:
            raise ApoqError(
                f"DATABASE_URL must have a role that may create databases: {error.orig}: use another role, "
                "unset it for a private server, or define your own fixture apoq_engine"
            ) from None
        try:
            url = url.set(database=name)
            engine = create_engine(url, poolclass=NullPool)
            prepare(engine)
            yield url
        finally:
            _execute(admin, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@overload
def rolled_back(engine: Engine, **options: Any) -> AbstractContextManager[Session]: ...
@overload
def rolled_back(engine: AsyncEngine, **options: Any) -> AbstractAsyncContextManager[AsyncSession]: ...
def rolled_back(
    engine: Engine | AsyncEngine, **options: Any
) -> AbstractContextManager[Session] | AbstractAsyncContextManager[AsyncSession]:
    """Return a context manager that yields a session, and rolls back everything at its end.

    The session may be committed, which releases a savepoint. Other sessions on ``session.connection()`` join
    its transaction.

    Args:
        engine: The engine. With an `AsyncEngine`, use ``async with``; the session is an `AsyncSession`.
        **options: Arguments of the session.

    Raises:
        TypeError: If `engine` is not an engine.
    """
    match engine:
        case Engine():
            return _rolled_back(engine, options)
        case AsyncEngine():
            return _rolled_back_async(engine, options)
    raise TypeError(f"engine must be an Engine or an AsyncEngine, got {type(engine).__qualname__}")


@contextmanager
def _rolled_back(engine: Engine, options: dict[str, Any]) -> Iterator[Session]:
    with engine.connect() as connection, connection.begin() as transaction:
        try:
            with Session(connection, **{**_COMMITS, **options}) as session:
                yield session
        finally:
            transaction.rollback()


@asynccontextmanager
async def _rolled_back_async(engine: AsyncEngine, options: dict[str, Any]) -> AsyncIterator[AsyncSession]:
    # Without expire_on_commit, because an expired attribute can't be loaded without an await.
    defaults = {**_COMMITS, "expire_on_commit": False}
    async with engine.connect() as connection, connection.begin() as transaction:
        try:
            async with AsyncSession(connection, **{**defaults, **options}) as session:
                yield session
        finally:
            await transaction.rollback()


def _execute(engine: Engine, statement: str) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)
