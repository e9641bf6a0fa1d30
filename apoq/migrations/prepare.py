"""Bring a database up to date from a program, and tell whether it is."""

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

# Each starter in a transaction that sees, once it has waited for its turn, what the others did in theirs.
OPTIONS: Final[dict[str, Any]] = {"isolation_level": "READ COMMITTED"}

NO_ENCODING: Final = (
    "this database's encoding is SQL_ASCII, in which text means nothing: create one with ENCODING 'UTF8'"
)


@overload
def prepare(engine: sa.Engine, *, schema: str | None = None) -> None: ...
@overload
def prepare(engine: AsyncEngine, *, schema: str | None = None) -> Coroutine[Any, Any, None]: ...
def prepare(
    engine: sa.Engine | AsyncEngine, *, schema: str | None = None
) -> Coroutine[Any, Any, None] | None:
    """Run the pending migrations of apoq's tables, in one transaction; an `AsyncEngine` is awaited.

    Safe at every deploy and start: any number of starters take turns, and if nothing is to be done it
    reads the version and writes nothing. A database of the Node.js original is adopted, its tasks kept. If
    the tables are there without their version, as in a copy of the schema alone, it is recorded.

    Raises `SchemaMismatch` if the database is newer than this library, or has no encoding. Without `schema`,
    it makes no second set of tables: it raises `SchemaMismatch` if the search_path leads to none, and another
    schema has some.
    """
    if isinstance(engine, AsyncEngine):
        check_engine(engine)
        return _prepare_async(engine.execution_options(**OPTIONS), schema)
    if not isinstance(engine, sa.Engine):
        raise TypeError(
            f"prepare takes an Engine or an AsyncEngine, not {type(engine).__qualname__}: "
            "on a connection of yours, call apoq.migrations.upgrade"
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
    """Say what it means that SQLAlchemy can't read a new connection's answers."""
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
        # Here, for `import apoq` shall not import Alembic.
        from alembic.migration import MigrationContext  # noqa: PLC0415
        from alembic.operations import Operations  # noqa: PLC0415

        _check_encoding(connection)
        if not version and schema is None and (problem := another_set(connection)):
            raise SchemaMismatch(f"{problem.text}: {problem.fix}")
        upgrade(Operations(MigrationContext.configure(connection)), schema=schema)


def check(connection: sa.Connection, schema: str | None = None) -> None:
    """Raise `SchemaMismatch`, with what to do, unless the tables are at this library's version."""
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
    """Say that the tables are not there, or too old, and what to do."""
    where = "" if schema is None else f" in the schema {schema!r}"
    return f"apoq's tables{where} {what}; this library wants version {LATEST}: {preparing(schema)}"


def _check_encoding(connection: sa.Connection) -> None:
    # Reached where the connection names an encoding of its own (client_encoding).
    if connection.scalar(sa.text("SHOW server_encoding")) == "SQL_ASCII":
        raise SchemaMismatch(NO_ENCODING)
