"""Migrates a database from a program, and checks its version."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final, overload

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.errors import SchemaMismatch, preparing
from apoq.migrations.places import another_set, where_looked, why_missing
from apoq.migrations.steps import LATEST, current, newer, upgrade
from apoq.postgres.urls import check_engine

# READ COMMITTED, so that after waiting for its turn each process sees the changes of the others.
OPTIONS: Final[dict[str, Any]] = {"isolation_level": "READ COMMITTED"}

NO_ENCODING: Final = (
    "the database must have an encoding, got SQL_ASCII, which defines no characters beyond ASCII: create a "
    "database with ENCODING 'UTF8'"
)


@overload
def prepare(engine: sa.Engine, *, schema: str | None = None) -> None: ...
@overload
def prepare(engine: AsyncEngine, *, schema: str | None = None) -> Coroutine[Any, Any, None]: ...
def prepare(
    engine: sa.Engine | AsyncEngine, *, schema: str | None = None
) -> Coroutine[Any, Any, None] | None:
    """Create apoq's tables or migrate them to the version of this library, in one transaction.

    It is safe to call at every deploy and every start: any number of concurrent callers take turns, and if
    the tables are up to date, it reads their version and writes nothing. It adopts a database of the Node.js
    original and keeps its tasks. If the tables exist without a recorded version, as in a copy of a schema
    without its rows, it records the version.

    Args:
        engine: The database. With an `AsyncEngine`, await the result.
        schema: The schema of the tables, created if it is missing; by default, the search_path is used.

    Raises:
        SchemaMismatch: The tables are newer than this library; or the database has no encoding; or, without
            `schema`, another schema has apoq's tables and those of the search_path have none: a second set
            of tables would be created.

    Note:
        It uses a connection and a transaction of its own. On your own connection, call
        `apoq.migrations.upgrade`.
    """
    if isinstance(engine, AsyncEngine):
        check_engine(engine)
        return _prepare_async(engine.execution_options(**OPTIONS), schema)
    if not isinstance(engine, sa.Engine):
        raise TypeError(
            f"engine must be an Engine or an AsyncEngine, got {type(engine).__qualname__}: "
            "on your own connection, call apoq.migrations.upgrade"
        )
    check_engine(engine)
    with _readable(), engine.execution_options(**OPTIONS).begin() as connection:
        _prepare(connection, schema)
    return None


async def _prepare_async(engine: AsyncEngine, schema: str | None) -> None:
    with _readable():
        async with engine.begin() as connection:
            await connection.run_sync(_prepare, schema)


@contextmanager
def _readable() -> Iterator[None]:
    """Raise a clear error if SQLAlchemy gets bytes from a new connection, because it has no encoding."""
    try:
        yield
    except TypeError as error:
        if "bytes-like" not in str(error):
            raise
        raise SchemaMismatch(NO_ENCODING) from error


def _prepare(connection: sa.Connection, schema: str | None) -> None:
    version = current(connection, schema)
    if version > LATEST:
        raise SchemaMismatch(newer(version))
    if version < LATEST:
        # Imported here, so that `import apoq` doesn't import Alembic.
        from alembic.migration import MigrationContext  # noqa: PLC0415
        from alembic.operations import Operations  # noqa: PLC0415

        _check_encoding(connection)
        if not version and schema is None and (problem := another_set(connection)):
            raise SchemaMismatch(f"{problem.text}: {problem.fix}")
        upgrade(Operations(MigrationContext.configure(connection)), schema=schema)


def check(connection: sa.Connection, schema: str | None = None) -> None:
    """Check that apoq's tables are at the version of this library.

    Args:
        connection: A connection to the database.
        schema: The schema of the tables; by default, the search_path is used.

    Raises:
        SchemaMismatch: The tables are missing or at another version. The message says what to do.
    """
    version = current(connection, schema)
    if version > LATEST:
        raise SchemaMismatch(newer(version))
    if version == LATEST:
        return
    if version:
        raise SchemaMismatch(missing(schema, f"are at version {version}"))
    if problem := why_missing(connection, schema):
        raise SchemaMismatch(f"{problem.text}: {problem.fix}")
    raise SchemaMismatch(missing(schema, f"are missing, in {where_looked(connection, schema)}"))


def missing(schema: str | None, what: str = "are missing") -> str:
    """Return the message for tables that are missing or too old, with what to do."""
    where = "" if schema is None else f" in the schema {schema!r}"
    return f"apoq's tables{where} {what}; this library needs version {LATEST}: {preparing(schema)}"


def _check_encoding(connection: sa.Connection) -> None:
    # Only reached if the connection sets its own client_encoding; otherwise SQLAlchemy fails to connect.
    if connection.scalar(sa.text("SHOW server_encoding")) == "SQL_ASCII":
        raise SchemaMismatch(NO_ENCODING)
