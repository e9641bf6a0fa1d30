"""Adapters that execute statements in a caller's transaction, for each kind of session and connection.

Operations are written once, for a `Caller`. Asyncio sessions run the same code by `run_sync`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, Final, Protocol, TypeVar, cast

import psycopg
from psycopg.pq import PipelineStatus
from psycopg.rows import dict_row
from psycopg.sql import Composed
from sqlalchemy import CompoundSelect, Connection, Dialect, Engine, Executable, Select, insert, inspect
from sqlalchemy.engine.interfaces import ExecutionContext
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError, UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm.attributes import instance_state, set_committed_value
from sqlalchemy.orm.util import identity_key
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from apoq.client.after_commit import notify_after_connection_commit, notify_after_session_commit
from apoq.client.missing_rights import what_to_grant
from apoq.client.unsupported_sessions import is_mock, kind_of, refusal
from apoq.errors import SchemaMismatch, UnsupportedSession, command, preparing
from apoq.postgres.connections import compiled, is_denied, is_missing
from apoq.postgres.loaders import read_anything
from apoq.postgres.urls import check_dialect, check_untranslated
from apoq.schema.models import Task
from apoq.schema.statements.links import SCHEMA
from apoq.schema.statements.notify import Notification

SyncSession = Session | scoped_session[Any] | Connection | psycopg.Connection[Any]
AsyncioSession = AsyncSession | async_scoped_session[Any] | AsyncConnection | psycopg.AsyncConnection[Any]

SESSION_CLASSES: Final = (
    Session,
    scoped_session,
    AsyncSession,
    async_scoped_session,
    Connection,
    AsyncConnection,
    psycopg.Connection,
    psycopg.AsyncConnection,
)

Row = Mapping[Any, Any]
T = TypeVar("T")

_TAKEN: Final = "23505"
"""SQLSTATE of a unique violation."""

CLOCK: Final = "apoq_clock"
"""The execution option of a connection whose clock a test has set: see `apoq.testing`."""

NO_ENGINE: Final = (
    "this session has no engine for apoq's tables: create it with Session(engine), or add `Task` to its "
    "binds, as in Session(binds={apoq.Task: engine, …})"
)

_MAPPER: Final = Task.__mapper__
"""The mapper by which a session chooses its engine."""

_WRITE: Final = insert(Task)
"""The statement by which a session that reads from a replica chooses its engine."""

LINES = 50
"""Number of lines that a COPY sends at once, which is faster than one by one."""

_TURN: Final = "apoq.turn"
"""Key in the `info` of an asyncio session: the lock that orders concurrent calls."""

COMMITS_WITH = "apoq.commits_with"
"""Key in the `info` of a session on a connection: the session that commits this one's writes."""


class Driver(Protocol):
    """The psycopg connection of a caller's transaction."""

    def execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row]:
        """Execute one statement, and return its rows."""

    def copy(self, statement: Composed, lines: Iterator[str]) -> None:
        """Send lines by a COPY as the iterator yields them."""


class Caller(Protocol):
    """A caller's transaction."""

    @property
    def has_orm_listeners(self) -> bool:
        """Whether the session has listeners of ORM statements, which take half as much time again."""

    def execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row]:
        """Execute one statement, and return its rows."""

    def driver(self) -> AbstractContextManager[Driver | None]:
        """Yield the connection that has executed the last statement, or None if a COPY can't do the same."""

    def attach(self, task: Task) -> None:
        """Put a task that is in the database into the session, if there is one."""

    def refresh(self, mapped: type[Task], row: Row) -> None:
        """Update the session's object of this task, if it has one, with a row that was just written."""

    def found(self, task: Task) -> Task:
        """Return the session's object of a task that was just read, which is put into the session if not."""

    def notify(self, notification: Notification) -> None:
        """Notify workers after the commit, if the adapter can know when it happens."""


def through(
    session: SyncSession | AsyncioSession, operation: Callable[[Caller], T]
) -> T | Coroutine[Any, Any, T]:
    """Execute an operation in a caller's transaction; return an awaitable if the session is asyncio's.

    Raises `UnsupportedSession` if it is not a session or a connection.
    """
    if is_mock(session):
        raise UnsupportedSession(refusal(session))
    match session:
        case Session():
            return operation(_OrmSession(session))
        case scoped_session():
            return operation(_OrmSession(session()))
        case Connection():
            return operation(_CoreConnection(session))
        case psycopg.Connection():
            return operation(_PsycopgConnection(session))
        case AsyncSession():
            return _in_turn(session, operation)
        case async_scoped_session():
            return _in_turn(session(), operation)
        case AsyncConnection():
            return session.run_sync(lambda sync: operation(_CoreConnection(sync)))
        case psycopg.AsyncConnection():
            return greenlet_spawn(operation, _AsyncPsycopgConnection(session))
    raise UnsupportedSession(refusal(session))


async def _in_turn(session: AsyncSession, operation: Callable[[Caller], T]) -> T:
    # Concurrent calls, as by asyncio.gather, would each make the session take its first connection.
    async with session.info.setdefault(_TURN, asyncio.Lock()):
        return await session.run_sync(lambda sync: operation(_OrmSession(sync)))


def bind_of(session: Session) -> Engine | Connection:
    """Return the engine or connection to which a session would flush a `Task`.

    Raises `UnsupportedSession` if there is none, or several.
    """
    if isinstance(session, ShardedSession):
        raise UnsupportedSession(
            "a task can't be added through a ShardedSession, which has several databases: pass the "
            "connection of one shard, `session.connection(bind_arguments={'shard_id': …})`, which is in the "
            "session's transaction, or another session, `Session(engine_of_the_shard)`"
        )
    try:
        with _writing(session):
            bind = session.get_bind(_MAPPER, clause=_WRITE)
    except UnboundExecutionError as error:
        raise UnsupportedSession(NO_ENGINE) from error
    if not isinstance(bind, Engine | Connection):
        raise UnsupportedSession(
            "a session's get_bind must return one Engine or Connection for `apoq.Task`, and that of this "
            f"{kind_of(session)} returned {kind_of(bind)}: pass a Session(engine), or an "
            "AsyncSession(engine) if the engine is an AsyncEngine"
        )
    return bind


def connection_of(session: Session, bind: Engine | Connection) -> Connection:
    """Return a session's connection on this engine or connection, in the session's transaction."""
    return session.connection(bind_arguments={"bind": bind})


@contextmanager
def _writing(session: Session) -> Iterator[None]:
    """Make a session with a replica choose the engine that it writes to.

    Such a session recognises a write by its statement or by `_flushing`, as in SQLAlchemy's documentation
    ("Custom Vertical Partitioning").
    """
    before = session._flushing  # noqa: SLF001 - see above
    session._flushing = True  # noqa: SLF001
    try:
        yield
    finally:
        session._flushing = before  # noqa: SLF001


class _OrmSession:
    def __init__(self, session: Session) -> None:
        self._session = session
        self._bind = bind_of(session)
        _check_dialect(self._bind.dialect)

    @property
    def has_orm_listeners(self) -> bool:
        return bool(self._session.dispatch.do_orm_execute)

    def execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row]:
        # Without a flush of the session's other objects, which is the caller's decision.
        with _clear_errors(statement), self._session.no_autoflush:
            try:
                return self._executed(statement, parameters)
            except InvalidRequestError as error:
                self._check_state(error)
                raise

    def _executed(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row]:
        connection = connection_of(self._session, self._bind)
        check_untranslated(connection.get_execution_options(), _schema(statement))
        # Since SQLAlchemy 2.1, a session may have such options, too.
        check_untranslated(getattr(self._session, "execution_options", {}), _schema(statement))
        with _writing(self._session):
            result: Any = self._session.execute(statement, parameters, bind_arguments={"mapper": _MAPPER})
        # A listener may have added options. An UPDATE's result has a context since SQLAlchemy 2.1.
        if self.has_orm_listeners and hasattr(result, "context"):
            check_untranslated(result.context.execution_options, _schema(statement))
        self._result = result
        return _rows(result)

    def _check_state(self, error: InvalidRequestError) -> None:
        """Raise a clear error if the session was in no state to execute a statement."""
        transaction = self._session.get_transaction()
        if not (isinstance(error, PendingRollbackError) or transaction is None or transaction.is_active):
            raise UnsupportedSession(
                "a task can't be added while the session's transaction is beginning or ending, as in the "
                "events after_begin, after_commit and after_rollback: add it in before_commit or earlier, or "
                "through another session"
            ) from error

    def driver(self) -> AbstractContextManager[Driver | None]:
        return _driver(self._result.context)

    def attach(self, task: Task) -> None:
        # In an event such as after_insert, SQLAlchemy warns of objects that are added to the session.
        if self._session._warn_on_events:  # noqa: SLF001 - there is no public API for this
            return
        self._session.add(task)
        transaction = self._session.get_nested_transaction() or self._session.get_transaction()
        if transaction is not None:
            # So that a rollback removes it from the session, like an object that was flushed.
            transaction._new[instance_state(task)] = True  # noqa: SLF001 - no public API does it without a flush

    def refresh(self, mapped: type[Task], row: Row) -> None:
        known = self._session.identity_map.get(identity_key(mapped, row["id"]))
        if known is not None:
            for name, value in row.items():
                # The ORM's UPDATE has marked the object, so that a rollback expires it.
                set_committed_value(known, name, value)

    def found(self, task: Task) -> Task:
        known = self._session.identity_map.get(identity_key(instance=task))
        if known is None:
            if not self._session._warn_on_events:  # noqa: SLF001 - as in `attach`
                self._session.add(task)
            return task
        changed: Any = inspect(known).committed_state
        for name, value in task.__dict__.items():
            if name in inspect(known).mapper.column_attrs and name not in changed:
                set_committed_value(known, name, value)
        return known

    def notify(self, notification: Notification) -> None:
        # A session on a connection doesn't end that connection's transaction, which a test may roll back.
        if isinstance(self._bind, Engine):
            notify_after_session_commit(self._session, self._bind, notification)
        elif COMMITS_WITH in self._session.info:
            notify_after_session_commit(self._session.info[COMMITS_WITH], self._bind.engine, notification)


class _CoreConnection:
    has_orm_listeners = False

    def __init__(self, connection: Connection) -> None:
        _check_dialect(connection.dialect)
        self._connection = connection

    def execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row]:
        check_untranslated(self._connection.get_execution_options(), _schema(statement))
        with _clear_errors(statement):
            self._result: Any = self._connection.execute(statement, parameters)
            return _rows(self._result)

    def driver(self) -> AbstractContextManager[Driver | None]:
        return _driver(self._result.context)

    def attach(self, task: Task) -> None:
        """Do nothing, because there is no session."""

    def refresh(self, mapped: type[Task], row: Row) -> None:
        """Do nothing, because there is no session."""

    def found(self, task: Task) -> Task:
        return task

    def notify(self, notification: Notification) -> None:
        notify_after_connection_commit(self._connection, notification)


class _PsycopgConnection:
    has_orm_listeners = False

    # With plain cursors instead of the connection's own: Django's return jsonb as text, and a RawCursor takes
    # no named parameters.

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row]:
        with _clear_errors(statement), psycopg.Cursor(self._connection, row_factory=dict_row) as cursor:
            read_anything(cursor)
            # In a pipeline, a nested one waits for the result.
            with self._connection.pipeline() if self._is_in_pipeline() else nullcontext():
                cursor.execute(*_compiled(statement, parameters))
            return cursor.fetchall() if cursor.description else ()

    @contextmanager
    def driver(self) -> Iterator[Driver | None]:
        yield None if self._is_in_pipeline() else self  # COPY isn't possible in a pipeline

    def copy(self, statement: Composed, lines: Iterator[str]) -> None:
        with psycopg.Cursor(self._connection) as cursor, cursor.copy(statement) as copy:
            while chunk := "".join(islice(lines, LINES)):
                copy.write(chunk)

    def attach(self, task: Task) -> None:
        """Do nothing, because there is no session."""

    def refresh(self, mapped: type[Task], row: Row) -> None:
        """Do nothing, because there is no session."""

    def found(self, task: Task) -> Task:
        return task

    def notify(self, notification: Notification) -> None:
        """Do nothing, because psycopg has no event for a commit. Workers find the task at their next poll."""

    def _is_in_pipeline(self) -> bool:
        return self._connection.pgconn.pipeline_status != PipelineStatus.OFF


class _AsyncPsycopgConnection(_PsycopgConnection):
    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection: Any = connection

    def execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row]:
        return await_only(self._execute(statement, parameters))

    async def _execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row]:
        with _clear_errors(statement):
            async with psycopg.AsyncCursor(self._connection, row_factory=dict_row) as cursor:
                read_anything(cursor)
                async with self._connection.pipeline() if self._is_in_pipeline() else nullcontext():
                    await cursor.execute(*_compiled(statement, parameters))
                return await cursor.fetchall() if cursor.description else ()

    def copy(self, statement: Composed, lines: Iterator[str]) -> None:
        await_only(self._copy(statement, lines))

    async def _copy(self, statement: Composed, lines: Iterator[str]) -> None:
        async with psycopg.AsyncCursor(self._connection) as cursor, cursor.copy(statement) as copy:
            while chunk := "".join(islice(lines, LINES)):
                await copy.write(chunk)


@contextmanager
def _driver(context: ExecutionContext) -> Iterator[Driver | None]:
    # From the statement's context, because a session may choose its connection by the statement.
    connection: Any = context.root_connection.connection.driver_connection
    dialect = context.dialect
    kind = _AsyncPsycopgConnection if dialect.is_async else _PsycopgConnection
    options = context.execution_options
    if options.get("schema_translate_map") or options.get(CLOCK):
        yield None  # these options change SQLAlchemy's own statements only
        return
    try:
        with kind(connection).driver() as driver:
            yield driver
    except psycopg.Error as error:
        # The same error as if SQLAlchemy had executed the COPY.
        raise DBAPIError.instance("COPY", None, error, psycopg.Error, dialect=dialect) from error


def _rows(result: Any) -> Sequence[Row]:
    # The result of an ORM statement has no such attribute, and always has rows.
    has_rows = getattr(result, "returns_rows", True)
    return cast("Sequence[Row]", result.mappings().all()) if has_rows else ()


def _compiled(statement: Any, parameters: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    text, constants = compiled(statement)
    return text, {**constants, **parameters}


def _check_dialect(dialect: Dialect) -> None:
    check_dialect(dialect)
    if dialect.is_async and not in_greenlet():
        raise UnsupportedSession(
            "session must be the AsyncSession or AsyncConnection itself, got its synchronous side: pass the "
            "asyncio object, and await the result"
        )


def _schema(statement: Any) -> str | None:
    if isinstance(statement, CompoundSelect | Select):
        options = statement.get_execution_options()
        if SCHEMA in options:
            return cast("str | None", options[SCHEMA])
    table = statement.get_final_froms()[0] if isinstance(statement, Select) else statement.table
    schema: str | None = table.schema
    return schema


@contextmanager
def _clear_errors(statement: Any) -> Iterator[None]:
    try:
        yield
    except (DBAPIError, psycopg.Error) as error:
        cause: Any = getattr(error, "orig", error)
        if is_denied(error):
            error.add_note(what_to_grant(cause))
        if is_missing(error):
            raise SchemaMismatch(
                f"{cause.diag.message_primary}: apoq's tables seem to be missing, or at another version: "
                f"{preparing(_schema(statement))}"
            ) from error
        if _is_taken_id(cause):
            raise SchemaMismatch(
                "the id of the new task already exists, because the sequence of apoq_tasks.id is behind, as "
                f"after a restore without sequences: `{command('doctor')}` shows the statement that sets it"
            ) from error
        raise


def _is_taken_id(cause: Any) -> bool:
    diag = getattr(cause, "diag", None)
    # Not only by name, because a naming convention may have renamed the primary key.
    is_key = diag and (diag.constraint_name == "apoq_tasks_pkey" or "(id)=(" in (diag.message_detail or ""))
    return bool(is_key) and cause.sqlstate == _TAKEN
