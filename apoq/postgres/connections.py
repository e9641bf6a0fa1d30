"""apoq's own few connections, separate from the caller's, for workers and notifications."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from apoq.postgres.fast_path import Result
from apoq.postgres.loaders import read_anything
from apoq.postgres.watchdog import watch
from apoq.tracing import untraced

STATEMENT_TIMEOUT_SECONDS: Final = 60
"""Seconds after which the server cancels a statement on one of apoq's own engines."""

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
# client_encoding: UTF-8, even if the caller's engine or PGCLIENTENCODING have another encoding. A single
# character that it doesn't have would stop every claim.
# DateStyle, IntervalStyle: psycopg can read only these styles from text.
# array_nulls: the outcomes of tasks are sent in arrays, which have NULLs.
# READ COMMITTED: at a higher isolation level, concurrent claims would fail (40001).
# The timeouts: a worker that freezes within a transaction would keep its rows locked, so that no other worker
# could rescue them.
# enable_seqscan, enable_bitmapscan: a prepared statement may be planned while the table is still empty.
# jit: before PostgreSQL 18, a disabled scan that can't be avoided costs ten billion to the planner. So each
# heartbeat was compiled for a second, to run for a tenth of a millisecond.

BEGIN: Final = f"""
    BEGIN ISOLATION LEVEL READ COMMITTED;
    SET LOCAL client_encoding = 'UTF8';
    SET LOCAL array_nulls = on;
    SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s';
    SET LOCAL idle_in_transaction_session_timeout = '5s'
"""
# The same through a pooler, per transaction: the pooler may hand the session and its settings to others.

MAX_KEPT: Final = 7
"""Connections that are kept open at most, for the services of a worker that use one at the same time."""

CONNECT_TIMEOUT_SECONDS: Final = 3
"""Seconds to wait for a new connection, unless the caller's engine has its own connect_timeout."""

ANSWER_TIMEOUT_SECONDS: Final = 10.0
"""Seconds after which a server that hasn't responded to a statement counts as unreachable."""

_UNPREPARED: Final = {"26000", "42P05", "08P01"}
"""SQLSTATEs of a prepared statement whose name is missing, taken already, or another session's."""

_MISSING: Final = {"42P01", "42703", "3F000"}
"""SQLSTATEs of a missing table, column or schema."""

_NOT_OF_A_ROW: Final = ("08", "0A", "25", "28", "3", "40", "42", "53", "55", "57", "58")
"""Classes of SQLSTATEs that concern a statement, a session or the server, rather than the values in a row."""

_OF_A_STATEMENT: Final = ("40", "54", "55", "57014")
"""SQLSTATEs, or their classes, of a failed statement that leaves its connection usable.

psycopg raises OperationalErrors for them: for a deadlock, an exceeded limit of the server, a lock that was
not available, and a cancelled statement.
"""

_DENIED: Final = "42501"
"""SQLSTATE of a missing right."""

_READ_ONLY: Final = "25006"
"""SQLSTATE of a server that is not the primary: after a failover, another server is."""

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
    """Return an engine for the same database with a few connections of its own.

    They are made in the same way as the caller's, but are independent of them: the caller's pool may be full,
    have a single connection, or use another isolation level. On a direct connection the engine prepares its
    statements. Through a pooler such as PgBouncer, which may run each transaction in another session, it
    relies on nothing that a session keeps. `lock_timeout` is PostgreSQL's setting.
    """
    source = bare_pool(engine)
    event.listen(source._dialect, "do_connect", _limit)  # noqa: SLF001 - the pool's own

    def connect() -> DBAPIConnection:
        # Through the pool, because its "connect" events may set the search_path, by which the tables are
        # found.
        pooled = source.connect()
        connection: Any = pooled.driver_connection
        pooled.detach()
        connection.cursor_factory = _without_tracing(connection.cursor_factory)
        return cast("DBAPIConnection", connection)

    with untraced():
        own = create_engine(
            "postgresql+psycopg://",
            creator=connect,
            poolclass=QueuePool,
            pool_size=MAX_KEPT,
            pool_use_lifo=True,  # the most recently used connection has its statements prepared
            pool_reset_on_return=None,  # every user of a connection ends its own transaction
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
        # The driver doesn't prepare anything: at a ROLLBACK it would deallocate all prepared statements,
        # including apoq's.
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
    """Let psycopg prepare statements on an engine's direct connections, but not through a pooler.

    For engines that apoq makes itself, because the user couldn't configure them for a pooler.
    """

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: ConnectionPoolEntry) -> None:
        if not _keeps_its_session(connection, record):
            cast("Any", record.driver_connection).prepare_threshold = None


def is_direct(pooled: PoolProxiedConnection) -> bool:
    """Return whether a connection of one of apoq's own engines leads to the server without a pooler."""
    return bool(pooled.info[_IS_DIRECT])


def execute(
    where: Engine | PoolProxiedConnection,
    statement: Executable,
    parameters: Mapping[str, Any],
    *,
    timeout: float = ANSWER_TIMEOUT_SECONDS,
) -> Result:
    """Execute one statement as its own transaction, on one of apoq's own engines or a connection of it.

    It takes one round trip unless there is a pooler. Raises psycopg's errors, including `OperationalError` if
    the server hasn't responded after `timeout` seconds.
    """
    if not isinstance(where, Engine):
        return _execute(where, statement, parameters, timeout)
    pooled = where.raw_connection()
    try:
        result = _execute(pooled, statement, parameters, timeout)
    except BaseException as error:
        pooled.invalidate(error)
        _learn_from(where, error)
        raise
    pooled.close()
    return result


Sent = tuple[Executable, Mapping[str, Any]]
"""A statement with its parameters."""


class Transaction:
    """A transaction on a connection of one of apoq's own engines; it begins with the first statement."""

    def __init__(self, pooled: PoolProxiedConnection) -> None:
        self._connection: Any = pooled.dbapi_connection
        self._prepared = pooled.info.setdefault(_PREPARED, set()) if is_direct(pooled) else None
        self._begin = pooled.info[_BEGIN]
        self._has_begun = False

    def __call__(self, statement: Executable, parameters: Mapping[str, Any]) -> Result:
        """Execute a statement."""
        [result] = self.together((statement, parameters))
        return result

    def together(self, *statements: Sent, commits: bool = False) -> list[Result]:
        """Execute statements, and then commit if `commits`: in one round trip, unless there is a pooler."""
        begins, self._has_begun = not self._has_begun, not commits
        if self._prepared is not None:
            return fast_path.execute_together(
                self._connection, statements, prepared=self._prepared, begins=begins, commits=commits
            )
        if begins:
            self._connection.execute(self._begin)
        results = [fast_path.execute(self._connection, *each, prepared=None) for each in statements]
        if commits:
            self._connection.commit()
        return results

    def commit(self) -> None:
        """Commit what has not been committed yet."""
        if self._has_begun:
            self._connection.commit()
            self._has_begun = False


@contextmanager
def transaction(engine: Engine, *, timeout: float = ANSWER_TIMEOUT_SECONDS) -> Iterator[Transaction]:
    """Yield a transaction on one of apoq's own engines, and commit it at the end of the block.

    It fails as `execute` does if it takes longer than `timeout` seconds.
    """
    pooled = engine.raw_connection()
    try:
        with watch.awaiting(pooled.dbapi_connection, timeout, pooled.info[_OWNER]):
            current = Transaction(pooled)
            yield current
            current.commit()
    except BaseException as error:
        pooled.invalidate(error)
        _learn_from(engine, error)
        raise
    pooled.close()


def prepare_statement(pooled: PoolProxiedConnection, statement: Executable) -> bytes:
    """Prepare a statement on a direct connection to the server; return the statement's name there."""
    connection: Any = pooled.dbapi_connection
    with watch.awaiting(connection, ANSWER_TIMEOUT_SECONDS, pooled.info[_OWNER]):
        return fast_path.prepare(connection, statement, pooled.info.setdefault(_PREPARED, set()))


def _execute(
    pooled: PoolProxiedConnection,
    statement: Executable,
    parameters: Mapping[str, Any],
    timeout: float,
) -> Result:
    connection: Any = pooled.dbapi_connection  # psycopg's own, even if it was detached from the pool
    with watch.awaiting(connection, timeout, pooled.info[_OWNER]):
        if is_direct(pooled):
            prepared = pooled.info.setdefault(_PREPARED, set())
            return fast_path.execute(connection, statement, parameters, prepared=prepared)
        connection.execute(pooled.info[_BEGIN])
        result = fast_path.execute(connection, statement, parameters, prepared=None)
        connection.commit()
        return result


@cache
def compiled(statement: Executable) -> tuple[Any, dict[str, Any]]:
    """Compile a Core statement once; return its text and its own parameters."""
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
            return  # just made for this checkout: it is good even if `renew` was called meanwhile
        if record.info.get(_GENERATION, 0) != _generations[engine]:
            raise sqlalchemy.exc.DisconnectionError  # makes the pool open a new connection


def renew(engine: Engine) -> None:
    """Replace all connections of an engine when they are next used: they may be dead without any error.

    Not `dispose`, after which the connections that are in use now would never be closed.
    """
    _generations[engine] += 1


def keeps_session(engine: Engine) -> bool:
    """Return whether one of apoq's own engines connects to the server without a pooler."""
    pooled = engine.raw_connection()
    try:
        return is_direct(pooled)
    finally:
        pooled.close()


def is_away(error: BaseException) -> bool:
    """Return whether an error means that the database is unreachable, rather than that a statement failed."""
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        error = error.orig or error
    if isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(_OF_A_STATEMENT):
        return False
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | OSError):
        return True
    return isinstance(error, psycopg.Error) and error.sqlstate == _READ_ONLY


def is_caused_by_a_row(error: BaseException) -> bool:
    """Return whether one of its rows may have made a statement fail, so that it may succeed without that row.

    The server may reject a value of the row, or be unable to read it. An error such as a missing right is not
    caused by a row.
    """
    if is_away(error) or not isinstance(error, psycopg.DatabaseError):
        return False
    return not (error.sqlstate or "").startswith(_NOT_OF_A_ROW)


def is_missing(error: BaseException) -> bool:
    """Return whether an error means that a table, a column or a schema is missing."""
    cause = getattr(error, "orig", None) or error
    return getattr(cause, "sqlstate", None) in _MISSING


def is_denied(error: BaseException) -> bool:
    """Return whether an error means that the role lacks a right."""
    cause = getattr(error, "orig", None) or error
    return getattr(cause, "sqlstate", None) == _DENIED


def _without_tracing(factory: type) -> type:
    """Return a class of cursors, or the one that OpenTelemetry's instrumentation has derived it from."""
    return next(its for its in factory.__mro__ if not its.__module__.startswith("opentelemetry."))


def _limit(_dialect: object, _record: object, _arguments: object, options: dict[str, Any]) -> None:
    """Limit the time to connect."""
    options.setdefault("connect_timeout", CONNECT_TIMEOUT_SECONDS)


def _keeps_its_session(connection: Any, record: ConnectionPoolEntry) -> bool:
    """Return whether a connection is served by the session that accepted it.

    A pooler accepts connections by itself, with an invented process id.
    """
    cursor = connection.cursor()
    cursor.execute("SELECT pg_backend_pid()")
    (pid,) = cursor.fetchone()
    cursor.close()
    connection.rollback()
    return bool(pid == cast("Any", record.driver_connection).info.backend_pid)


def _learn_from(engine: Engine, error: BaseException) -> None:
    """Adapt an engine to an error: there is a pooler after all, or the other connections are dead as well."""
    if isinstance(error, psycopg.Error) and error.sqlstate in _UNPREPARED:
        engine.update_execution_options(**{_IS_POOLED: True})
        renew(engine)
    elif is_away(error):
        renew(engine)
