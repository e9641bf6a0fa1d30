"""Engines of the other kind, sync or asyncio, that connect as the caller's engine does.

Threads need a sync connection, and coroutines an asyncio one; an engine makes connections of one kind. What
psycopg is told is the same for both.
"""

# SQLAlchemy keeps what an engine was made with to itself.
# ruff: noqa: SLF001
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final, NoReturn

import psycopg
from sqlalchemy import Dialect, Engine, create_engine, event
from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, Pool

from apoq.errors import UnsupportedDatabase
from apoq.postgres.urls import on_psycopg, sync_side

_NOT_THE_CALLERS: Final = ("sqlalchemy.engine.", "sqlalchemy.util.", "apoq.")
"""Modules whose "connect" listeners each engine gets of its own."""


def sync_twin(engine: Engine | AsyncEngine) -> Engine:
    """Make an `Engine` to the same database, which connects as this one does.

    With its arguments (`connect_args`) and its listeners ("do_connect" and "connect"). The twin raises
    `UnsupportedDatabase` when it connects, if the engine's connections can only be of the other kind.
    """
    source = sync_side(engine)
    twin = create_engine(on_psycopg(source.url), **_options(source, is_async=False))
    _forward_events(source, twin.dialect, twin.pool)
    return twin


def async_twin(engine: Engine | AsyncEngine) -> AsyncEngine:
    """Make an `AsyncEngine` to the same database, which connects as this one does; see `sync_twin`."""
    source = sync_side(engine)
    twin = create_async_engine(on_psycopg(source.url), **_options(source, is_async=True))
    _forward_events(source, twin.dialect, twin.pool)
    return twin


def bare_pool(engine: Engine) -> Pool:
    """Make a pool of sync connections that are made as this engine's are; see `sync_twin`.

    Nothing is set on them but by the caller's listeners. The pool doesn't keep the engine alive.
    """
    twin = create_engine(on_psycopg(engine.url), **_connecting(engine, is_async=False))
    pool = NullPool(twin.pool._creator, dialect=twin.dialect)
    _forward_events(engine, twin.dialect, pool)
    return pool


def _options(source: Engine, *, is_async: bool) -> dict[str, Any]:
    """Return what `create_engine` takes, as far as it is seen on a connection."""
    dialect: Any = source.dialect
    return _connecting(source, is_async=is_async) | {
        "isolation_level": dialect._on_connect_isolation_level,
        "json_serializer": dialect._json_serializer,
        "json_deserializer": dialect._json_deserializer,
        "execution_options": source.get_execution_options(),
        "hide_parameters": source.hide_parameters,
    }


def _connecting(source: Engine, *, is_async: bool) -> dict[str, Any]:
    dialect: Any = source.dialect
    creator: Any = source.pool._creator  # the only one who knows the `connect_args`
    known = inspect.getclosurevars(creator).nonlocals if inspect.isfunction(creator) else {}
    arguments = known.get("cparams")  # of the creator that SQLAlchemy makes, unless it is given one
    if arguments is not None and "async_creator_fn" not in arguments:
        # The dialect's own adapters, and a kind of cursor, are one engine's only.
        own = {"cursor_factory"}
        if arguments.get("context") is dialect._psycopg_adapters_map:
            own.add("context")
        return {"connect_args": {name: arguments[name] for name in arguments.keys() - own}}
    if source.dialect.is_async is is_async:
        return {"creator": creator}
    return {"creator": _refuse_async if is_async else _refuse_sync}


def _refuse_sync() -> NoReturn:
    raise UnsupportedDatabase(
        "apoq's threads need sync connections, and this AsyncEngine's are made by its async_creator: pass "
        "create_async_engine(connect_args=…) instead, or give Worker an Engine"
    )


def _refuse_async() -> NoReturn:
    raise UnsupportedDatabase(
        "task.session of a coroutine needs asyncio connections, and this Engine's are made by its creator: "
        "pass create_engine(connect_args=…) instead, or give Worker an AsyncEngine"
    )


def _forward_events(source: Engine, dialect: Dialect, pool: Pool) -> None:
    """Let the caller's listeners to the source's connecting take part in that of its twin."""
    theirs = source.dialect
    callers = [
        listener
        for listener in source.pool.dispatch.connect.listeners
        if not str(getattr(listener, "__module__", "")).startswith(_NOT_THE_CALLERS)
    ]

    @event.listens_for(dialect, "do_connect")
    def connect(dialect: Dialect, record: object, arguments: object, options: object) -> Any:
        for listener in theirs.dispatch.do_connect.listeners:
            # With the twin's dialect, for `dialect.connect` is to make a connection of its kind.
            connection = _call(dialect, listener, dialect, record, arguments, options)
            if connection is not None:
                if isinstance(connection, psycopg.Connection) is dialect.is_async:
                    reason = f"it has returned a {type(connection).__qualname__}"
                    raise _misfit(dialect, listener, reason)
                return connection
        return None

    @event.listens_for(pool, "connect")
    def connected(connection: object, record: ConnectionPoolEntry) -> None:
        for listener in callers:
            _call(dialect, listener, connection, record)


def _call(dialect: Dialect, listener: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return listener(*arguments)
    except (AttributeError, TypeError, MissingGreenlet) as error:
        raise _misfit(dialect, listener, error) from error


def _misfit(dialect: Dialect, listener: Callable[..., Any], reason: object) -> UnsupportedDatabase:
    kind, other = ("an asyncio", "a sync") if dialect.is_async else ("a sync", "an asyncio")
    name = getattr(listener, "__qualname__", listener)
    return UnsupportedDatabase(
        f"apoq calls the engine's listener {name} for {kind} connection, too, and it works for {other} one "
        f"only: {reason}; make it work for both"
    )
