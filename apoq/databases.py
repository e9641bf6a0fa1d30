"""Which databases apoq works on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Dialect, Engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.errors import UnsupportedDatabase

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


def check_untranslated(options: Mapping[str, Any], schema: str | None) -> None:
    """Raise `UnsupportedDatabase` if execution options would look for the tables of a schema in another.

    SQLAlchemy translates its own statements only: workers, COPY and notifications would miss the tables.
    """
    translated = options.get("schema_translate_map") or {}
    other = translated.get(schema, schema)
    if other != schema:
        raise UnsupportedDatabase(
            f"apoq's tables can't be found by a schema_translate_map, and this one maps {schema!r} to "
            f"{other!r}: use Queue(schema={other!r}), and prepare(engine, schema={other!r})"
        )


def sync_side(engine: Engine | AsyncEngine) -> Engine:
    """Answer the engine itself, or the one within an asyncio engine, which has its pool and its events."""
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine
