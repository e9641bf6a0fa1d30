"""Which databases apoq works on, and engines of its own for them."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import Dialect, Engine, create_engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool

from apoq.errors import UnsupportedDatabase
from apoq.reading import read_anything

_SPELLINGS = {"postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg_async"}
_DRIVERS = {"psycopg", "psycopg_async"}


def database_url(url: str | URL) -> URL:
    """Read a PostgreSQL URL in any of its usual spellings, ready for ``sqlalchemy.create_engine``.

    ``postgres://``, ``postgresql://`` and ``postgresql+psycopg://`` all mean psycopg 3, whatever the
    SQLAlchemy version takes for its default driver.

    Raises `UnsupportedDatabase` for any other database or driver.
    """
    parsed = make_url(url)
    if parsed.drivername not in _SPELLINGS:
        raise UnsupportedDatabase(
            f"apoq works on PostgreSQL through psycopg 3, not on {parsed.drivername!r}: "
            "give a URL that starts with postgresql://"
        )
    return parsed.set(drivername="postgresql+psycopg")


def check_dialect(dialect: Dialect) -> None:
    """Raise `UnsupportedDatabase` unless an engine or a session is on PostgreSQL, through psycopg 3."""
    if dialect.name != "postgresql" or dialect.driver not in _DRIVERS:
        raise UnsupportedDatabase(
            f"apoq works on PostgreSQL through psycopg 3, and this is {dialect.name}+{dialect.driver}: "
            "create the engine with a postgresql+psycopg:// URL"
        )


def own_engine(engine: Engine) -> Engine:
    """Make an engine to the same database whose few connections are apoq's own.

    Made the way the caller's are, and apart from them: it doesn't matter to it that the caller's pool is
    full, has a single connection, or is at another isolation level. At AUTOCOMMIT, and with no named
    prepared statements: a pooler such as PgBouncer in transaction mode hands each transaction to another
    session.
    """
    if engine.dialect.is_async:
        engine = create_engine(database_url(engine.url))  # an asyncio driver can't be used from threads
    source = engine.pool.recreate()

    def connect() -> DBAPIConnection:
        # Through the pool, for its "connect" events may set what the tables are found by: the search_path.
        pooled = source.connect()
        connection: Any = pooled.driver_connection
        pooled.detach()
        connection.prepare_threshold = None
        read_anything(connection)
        return cast("DBAPIConnection", connection)

    return create_engine(
        "postgresql+psycopg://", creator=connect, poolclass=QueuePool, isolation_level="AUTOCOMMIT"
    )


def sync_twin(engine: AsyncEngine) -> Engine:
    """Make an `Engine` to the same database, by its URL."""
    return create_engine(database_url(engine.url))


def async_twin(engine: Engine | AsyncEngine) -> AsyncEngine:
    """Make an `AsyncEngine` to the same database, by its URL."""
    return create_async_engine(database_url(engine.url))
