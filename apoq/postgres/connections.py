"""apoq's own few connections, apart from the caller's: what its workers and notifications speak through."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

import psycopg
import sqlalchemy.exc
from sqlalchemy import Connection, Engine, Executable, create_engine, event
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool

from apoq.postgres import fast_path
from apoq.postgres.engine_twins import bare_pool
from apoq.postgres.fast_path import Answer
from apoq.postgres.loaders import read_anything
from apoq.postgres.watchdog import watch

STATEMENT_TIMEOUT_SECONDS: Final = 60
"""Seconds after which the server ends a statement of an engine of apoq's own."""

SESSION: Final = f"""
    SET client_encoding = 'UTF8';
    SET DateStyle = 'ISO';
    SET IntervalStyle = 'postgres';
    SET array_nulls = on;
    SET default_transaction_isolation = 'read committed';
    SET statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s';
    SET idle_in_transaction_session_timeout = '5s';
    SET enable_seqscan = off;
    SET enable_bitmapscan = off;
    SET jit = off
"""
# UTF-8, whatever the caller's engine or PGCLIENTENCODING say: one character that another encoding doesn't
# have would stop every claim. The styles, because psycopg reads no others as text. NULL in arrays,
# or else what became of a task, sent in arrays, could not be written.
# READ COMMITTED, for at a higher level claims would fail on each other (40001).
# The time-outs, for a worker that is frozen in a transaction would keep its rows locked, and nobody could
# rescue them.
# Plans by index only, for a prepared statement's plan may be made while the table is still empty.
# Nothing is compiled: before PostgreSQL 18, a scan that is off and yet unavoidable costs ten billion to the
# planner, and so each heartbeat was compiled for a second, to run for a tenth of a millisecond.

BEGIN: Final = f"""
    BEGIN ISOLATION LEVEL READ COMMITTED;
    SET LOCAL client_encoding = 'UTF8';
    SET LOCAL array_nulls = on;
    SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s';
    SET LOCAL idle_in_transaction_session_timeout = '5s'
"""
# The same where a pooler is in between: a setting of the session would be the next one's, too.

CONNECT_TIMEOUT_SECONDS: Final = 3
"""Seconds for a connection to be made, unless the caller's engine says otherwise."""

ANSWER_TIMEOUT_SECONDS: Final = 10.0
"""Seconds after which a server that hasn't answered a statement is taken for gone."""

_UNPREPARED: Final = {"26000", "42P05", "08P01"}
"""SQLSTATEs of a named prepared statement that is not there, is there already, or is somebody else's."""

_MISSING: Final = {"42P01", "42703", "3F000"}
"""SQLSTATEs of a table, a column or a schema that is not there."""

_NOT_OF_A_ROW: Final = ("08", "0A", "25", "28", "3", "40", "42", "53", "55", "57", "58")
"""Classes of SQLSTATEs that speak of a statement, a session or the server, and not of what is in a row."""

_OF_A_STATEMENT: Final = ("40", "54", "55", "57014")
"""SQLSTATEs, or their classes, of a statement that failed on a connection that goes on.

OperationalErrors to psycopg: a deadlock, a limit of the server, a lock that could not be had, a cancellation.
"""

_READ_ONLY: Final = "25006"
"""SQLSTATE of a server that is no longer the primary, or not yet: after a failover, another one is."""

_OWNER: Final = "apoq.owner"
_IS_DIRECT: Final = "apoq.is_direct"
_IS_POOLED: Final = "apoq_is_pooled"
_BEGIN: Final = "apoq.begin"
_PREPARED: Final = "apoq.prepared"

_GENERATION: Final = "apoq.generation"
_IS_NEW: Final = "apoq.is_new"

_generations: WeakKeyDictionary[Engine, int] = WeakKeyDictionary()
_dialect = PGDialect_psycopg()  # type: ignore[no-untyped-call]


def own_engine(engine: Engine, *, lock_timeout: str = "0") -> Engine:
    """Make an engine to the same database whose few connections are apoq's own.

    Made the way the caller's are, and apart from them: it doesn't matter to it that the caller's pool is
    full, has a single connection, or is at another isolation level. Straight to the server, it prepares
    its statements; through a pooler such as PgBouncer, which may hand each transaction to another
    session, it relies on nothing that a session keeps. `lock_timeout` is PostgreSQL's.
    """
    source = bare_pool(engine)
    event.listen(source._dialect, "do_connect", _limit)  # noqa: SLF001 - the pool's own

    def connect() -> DBAPIConnection:
        # Through the pool, for its "connect" events may set what the tables are found by: the search_path.
        pooled = source.connect()
        connection: Any = pooled.driver_connection
        pooled.detach()
        return cast("DBAPIConnection", connection)

    own = create_engine(
        "postgresql+psycopg://",
        creator=connect,
        poolclass=QueuePool,
        pool_use_lifo=True,  # what was prepared on the last one is there
        pool_reset_on_return=None,  # whoever takes a connection ends what it has begun
        isolation_level="AUTOCOMMIT",
    )

    make_renewable(own)

    @event.listens_for(own, "connect")
    def prepare(connection: Any, record: ConnectionPoolEntry) -> None:
        read_anything(connection)
        connection.autocommit = True
        record.info[_OWNER] = own
        with watch.awaiting(connection, ANSWER_TIMEOUT_SECONDS, own):
            set_up(connection, record)

    def set_up(connection: Any, record: ConnectionPoolEntry) -> None:
        # What it has prepared, the driver deallocates at a ROLLBACK, and all else that is prepared as well.
        connection.prepare_threshold = None
        is_direct = not own.get_execution_options().get(_IS_POOLED) and _keeps_its_session(connection, record)
        record.info[_IS_DIRECT] = is_direct
        if is_direct:
            connection.execute(f"{SESSION}; SET lock_timeout = '{lock_timeout}'")
            record.info[_BEGIN] = "BEGIN"
        else:
            record.info[_BEGIN] = f"{BEGIN}; SET LOCAL lock_timeout = '{lock_timeout}'"

    @event.listens_for(own, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.info[_BEGIN])

    return own


def prepare_where_kept(engine: Engine) -> None:
    """Let an engine's connections prepare statements as psycopg does, but not through a pooler.

    For engines that apoq makes by itself: nobody told them what is in between.
    """

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: ConnectionPoolEntry) -> None:
        if not _keeps_its_session(connection, record):
            cast("Any", record.driver_connection).prepare_threshold = None


def is_direct(pooled: PoolProxiedConnection) -> bool:
    """Tell whether a connection of an engine of apoq's own leads straight to the server."""
    return bool(pooled.info[_IS_DIRECT])


def execute(
    where: Engine | PoolProxiedConnection,
    statement: Executable,
    parameters: Mapping[str, Any],
    *,
    timeout: float = ANSWER_TIMEOUT_SECONDS,
) -> Answer:
    """Execute one statement on an engine of apoq's own, as a transaction by itself.

    One round trip, where no pooler is in between. On one of its connections, where the caller has that in
    hand. Raises psycopg's own errors; an `OperationalError`, too, where the server hasn't answered after
    `timeout` seconds.
    """
    if not isinstance(where, Engine):
        return _execute(where, statement, parameters, timeout)
    pooled = where.raw_connection()
    try:
        answer = _execute(pooled, statement, parameters, timeout)
    except BaseException as error:
        pooled.invalidate(error)
        _note(where, error)
        raise
    pooled.close()
    return answer


def prepare_statement(pooled: PoolProxiedConnection, statement: Executable) -> bytes:
    """Prepare a statement on a connection that leads straight to the server; answer its name there."""
    connection: Any = pooled.dbapi_connection
    with watch.awaiting(connection, ANSWER_TIMEOUT_SECONDS, pooled.info[_OWNER]):
        return fast_path.prepare(connection, statement, pooled.info.setdefault(_PREPARED, set()))


def _execute(
    pooled: PoolProxiedConnection,
    statement: Executable,
    parameters: Mapping[str, Any],
    timeout: float,
) -> Answer:
    connection: Any = pooled.dbapi_connection  # psycopg's own, even where the pool knows of it no more
    with watch.awaiting(connection, timeout, pooled.info[_OWNER]):
        if is_direct(pooled):
            prepared = pooled.info.setdefault(_PREPARED, set())
            return fast_path.execute(connection, statement, parameters, prepared=prepared)
        connection.execute(pooled.info[_BEGIN])
        answer = fast_path.execute(connection, statement, parameters, prepared=None)
        connection.commit()
        return answer


@cache
def compiled(statement: Executable) -> tuple[Any, dict[str, Any]]:
    """Compile a Core statement once; answer its text and the parameters that it brings along."""
    found: Any = cast("Any", statement).compile(dialect=_dialect)
    return str(found), found.params


def make_renewable(engine: Engine) -> None:
    """Prepare an engine for `renew`."""
    if engine in _generations:
        return
    _generations[engine] = 0

    @event.listens_for(engine, "connect")
    def note(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info[_GENERATION] = _generations[engine]
        record.info[_IS_NEW] = True

    @event.listens_for(engine, "checkout")
    def check(_connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
        if record.info.pop(_IS_NEW, False):
            return  # whatever has been found out since it was asked for
        if record.info.get(_GENERATION, 0) != _generations[engine]:
            raise sqlalchemy.exc.DisconnectionError  # the pool makes a new one


def renew(engine: Engine) -> None:
    """Use none of the connections again that were made until now: they may be dead, and none would say so.

    Not `dispose`, after which nobody would close those that are in use now.
    """
    _generations[engine] += 1


def keeps_session(engine: Engine) -> bool:
    """Tell whether an engine of apoq's own speaks to the server itself, with no pooler in between."""
    pooled = engine.raw_connection()
    try:
        return is_direct(pooled)
    finally:
        pooled.close()


def is_away(error: BaseException) -> bool:
    """Tell whether an error speaks of the database being away, and not of what was asked of it."""
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        error = error.orig or error
    if isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(_OF_A_STATEMENT):
        return False
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | OSError):
        return True
    return isinstance(error, psycopg.Error) and error.sqlstate == _READ_ONLY


def is_caused_by_a_row(error: BaseException) -> bool:
    """Return whether a statement may have failed because of one of its rows: it may succeed without that.

    Such as one whose value the server refuses, or can't read. Not if it failed as such, as for lack of a
    right.
    """
    if is_away(error) or not isinstance(error, psycopg.DatabaseError):
        return False
    return not (error.sqlstate or "").startswith(_NOT_OF_A_ROW)


def is_missing(error: BaseException) -> bool:
    """Tell whether an error speaks of a table, a column or a schema that is not there."""
    cause = getattr(error, "orig", None) or error
    return getattr(cause, "sqlstate", None) in _MISSING


def _limit(_dialect: object, _record: object, _arguments: object, options: dict[str, Any]) -> None:
    """Let a connection be refused in time."""
    options.setdefault("connect_timeout", CONNECT_TIMEOUT_SECONDS)


def _keeps_its_session(connection: Any, record: ConnectionPoolEntry) -> bool:
    """Tell whether the session that serves a connection is the one that answered when it was made.

    A pooler answers by itself, and makes up the process id that goes with it.
    """
    cursor = connection.cursor()
    cursor.execute("SELECT pg_backend_pid()")
    (pid,) = cursor.fetchone()
    cursor.close()
    connection.rollback()
    return bool(pid == cast("Any", record.driver_connection).info.backend_pid)


def _note(engine: Engine, error: BaseException) -> None:
    """Learn from an error: what is in between is a pooler, or the other connections are gone as well."""
    if isinstance(error, psycopg.Error) and error.sqlstate in _UNPREPARED:
        engine.update_execution_options(**{_IS_POOLED: True})
        renew(engine)
    elif is_away(error):
        renew(engine)
