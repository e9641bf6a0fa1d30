"""Engines of the other kind, sync or asyncio, that connect in the same way as the caller's engine.

Threads need sync connections, and coroutines asyncio ones, but an engine makes only one kind. Both kinds use
the same arguments of psycopg.
"""

# SQLAlchemy has no public way to read the arguments of an engine.
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
"""Modules whose "connect" listeners are not the caller's: every engine gets its own."""


def sync_twin(engine: Engine | AsyncEngine) -> Engine:
    """Return an `Engine` for the same database, which connects in the same way as this one.

    It uses the same arguments (`connect_args`) and listeners ("do_connect" and "connect"). It raises
    `UnsupportedDatabase` when it connects if the source can only make connections of the other kind.
    """
    source = sync_side(engine)
    twin = create_engine(on_psycopg(source.url), **options_of(source, is_async=False))
    _forward_events(source, twin.dialect, twin.pool)
    return twin


def async_twin(engine: Engine | AsyncEngine) -> AsyncEngine:
    """Return an `AsyncEngine` for the same database, which connects in the same way; see `sync_twin`."""
    source = sync_side(engine)
    twin = create_async_engine(on_psycopg(source.url), **options_of(source, is_async=True))
    _forward_events(source, twin.dialect, twin.pool)
    return twin


def bare_pool(engine: Engine) -> Pool:
    """Return a pool of sync connections that are made in the same way as this engine's; see `sync_twin`.

    Only the caller's listeners configure them. The pool doesn't keep the engine alive.
    """
    twin = create_engine(on_psycopg(engine.url), **_connecting(engine, is_async=False))
    pool = NullPool(twin.pool._creator, dialect=twin.dialect)
    _forward_events(engine, twin.dialect, pool)
    return pool


def options_of(source: Engine, *, is_async: bool) -> dict[str, Any]:
    """Return the arguments of `create_engine` that have an effect on connections."""
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
    creator: Any = source.pool._creator  # the only place where the `connect_args` are kept
    known = inspect.getclosurevars(creator).nonlocals if inspect.isfunction(creator) else {}
    arguments = known.get("cparams")  # a variable of SQLAlchemy's creator; the caller may have passed another
    if arguments is not None and "async_creator_fn" not in arguments:
        # The cursor class and the dialect's adapters belong to one kind of engine.
        own = {"cursor_factory"}
        if arguments.get("context") is dialect._psycopg_adapters_map:
            own.add("context")
        return {"connect_args": {name: arguments[name] for name in arguments.keys() - own}}
    if source.dialect.is_async is is_async:
        return {"creator": creator}
    return {"creator": _refuse_async if is_async else _refuse_sync}


def _refuse_sync() -> NoReturn:
    raise UnsupportedDatabase(
        "apoq's threads need sync connections, but this AsyncEngine's are made by its async_creator: use "
        "create_async_engine(connect_args=…) instead, or pass an Engine to Worker"
    )


def _refuse_async() -> NoReturn:
    raise UnsupportedDatabase(
        "task.session of a coroutine needs asyncio connections, but this Engine's are made by its creator: "
        "use create_engine(connect_args=…) instead, or pass an AsyncEngine to Worker"
    )


def callers_listeners(source: Engine) -> list[Callable[..., Any]]:
    """Return the caller's "connect" listeners of an engine."""
    return [
        listener
        for listener in source.pool.dispatch.connect.listeners
        if not str(getattr(listener, "__module__", "")).startswith(_NOT_THE_CALLERS)
    ]


def _forward_events(source: Engine, dialect: Dialect, pool: Pool) -> None:
    """Call the caller's connection listeners on the source for the connections of its twin as well."""
    theirs = source.dialect
    callers = callers_listeners(source)

    @event.listens_for(dialect, "do_connect")
    def connect(dialect: Dialect, record: object, arguments: object, options: object) -> Any:
        for listener in theirs.dispatch.do_connect.listeners:
            # With the twin's dialect, because `dialect.connect` must make a connection of the twin's kind.
            connection = _call(dialect, listener, dialect, record, arguments, options)
            if connection is not None:
                if isinstance(connection, psycopg.Connection) is dialect.is_async:
                    reason = f"it returned a {type(connection).__qualname__}"
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
        f"the engine's listener {name} must work for {kind} connection as well, because apoq needs one, but "
        f"it works only for {other} one: {reason}"
    )
