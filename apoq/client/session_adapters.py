"""One way to execute in a caller's transaction, whatever kind of session or connection the caller has.

Operations are written once, against `Caller`; the asyncio kinds are derived from the others.
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
from sqlalchemy import Connection, Dialect, Engine, Executable, insert, inspect
from sqlalchemy.engine.interfaces import ExecutionContext
from sqlalchemy.exc import DBAPIError, InvalidRequestError, PendingRollbackError, UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.util import identity_key
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from apoq.client.after_commit import notify_after_connection_commit, notify_after_session_commit
from apoq.client.unsupported_sessions import is_mock, kind_of, refusal
from apoq.errors import SchemaMismatch, UnsupportedSession, preparing
from apoq.postgres.connections import compiled, is_missing
from apoq.postgres.loaders import read_anything
from apoq.postgres.urls import check_dialect, check_untranslated
from apoq.schema.models import Task
from apoq.schema.statements.notify import Notification

SyncSession = Session | scoped_session[Any] | Connection | psycopg.Connection[Any]
AsyncioSession = AsyncSession | async_scoped_session[Any] | AsyncConnection | psycopg.AsyncConnection[Any]

Row = Mapping[Any, Any]
T = TypeVar("T")

_TAKEN: Final = "23505"
"""SQLSTATE of a value that another row has in a unique column."""

CLOCK: Final = "apoq_clock"
"""The option of a connection on which a test has set the clock: see `apoq.testing`."""

NO_ENGINE: Final = (
    "this session has no engine for apoq's tables: make it by Session(engine), or add `Task` to its binds, "
    "as in Session(binds={apoq.Task: engine, …})"
)

_MAPPER: Final = Task.__mapper__
"""What a session chooses its engine by, whatever the statement is; SQLAlchemy itself gives a mapper, too."""

_WRITE: Final = insert(Task)
"""What a session chooses its engine by, too, if it reads from a replica."""

LINES = 50
"""That a COPY sends at once: one by one, they would take longer."""

_TURN: Final = "apoq.turn"
"""In the `info` of an asyncio session: whose turn it is."""

COMMITS_WITH = "apoq.commits_with"
"""In the `info` of a session on a connection: the session that commits what this one has written."""


class Driver(Protocol):
    """The psycopg connection of a caller's transaction."""

    def execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row]:
        """Execute one statement, and answer the rows that it returns."""

    def copy(self, statement: Composed, lines: Iterator[str]) -> None:
        """Send lines by a COPY, as they come."""


class Caller(Protocol):
    """A caller's transaction."""

    @property
    def is_heard(self) -> bool:
        """Whether somebody listens to the session's ORM statements; one takes Python half as long again."""

    def execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row]:
        """Execute one statement, and answer the rows that it returns."""

    def driver(self) -> AbstractContextManager[Driver | None]:
        """Give the connection that has executed the last statement, or None where it can't COPY the same."""

    def keep(self, task: Task) -> None:
        """Put a task that stands in the database into the session, where there is one."""

    def renew(self, mapped: type[Task], row: Row) -> None:
        """Let the session, where there is one and it has this task, know what was written to it."""

    def notify(self, notification: Notification) -> None:
        """Tell workers something after the commit, where it can be known."""


def through(
    session: SyncSession | AsyncioSession, operation: Callable[[Caller], T]
) -> T | Coroutine[Any, Any, T]:
    """Do something in a caller's transaction: at once, or in an awaitable where the caller is asyncio's."""
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
    # Several at once, as asyncio.gather begins them, would each take the session's first connection.
    async with session.info.setdefault(_TURN, asyncio.Lock()):
        return await session.run_sync(lambda sync: operation(_OrmSession(sync)))


def bind_of(session: Session) -> Engine | Connection:
    """Return what a session executes apoq's statements on; `UnsupportedSession` if that isn't one place.

    It is where a flush would write a `Task`, also if the session reads from a replica.
    """
    if isinstance(session, ShardedSession):
        raise UnsupportedSession(
            "a ShardedSession sends a statement to several shards: give the connection of one, "
            "`session.connection(bind_arguments={'shard_id': …})`, which is in the session's transaction, or "
            "a session of its own, `Session(engine_of_the_shard)`"
        )
    try:
        with _writing(session):
            bind = session.get_bind(_MAPPER, clause=_WRITE)
    except UnboundExecutionError as error:
        raise UnsupportedSession(NO_ENGINE) from error
    if not isinstance(bind, Engine | Connection):
        raise UnsupportedSession(
            "a session's get_bind must return one Engine or Connection for `apoq.Task`, and that of this "
            f"{kind_of(session)} returned {kind_of(bind)}: give a Session(engine), or an "
            "AsyncSession(engine) if the engine is an AsyncEngine"
        )
    return bind


def connection_of(session: Session, bind: Engine | Connection) -> Connection:
    """Return the connection of a session's transaction on this engine, which its `get_bind` has chosen."""
    return session.connection(bind_arguments={"bind": bind})


@contextmanager
def _writing(session: Session) -> Iterator[None]:
    """Let a session choose the engine that it writes to.

    One that reads from a replica tells a write by its statement or by `_flushing`, as in SQLAlchemy's
    documentation ("Custom Vertical Partitioning"), which sends other INSERTs to a replica.
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
    def is_heard(self) -> bool:
        return bool(self._session.dispatch.do_orm_execute)

    def execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row]:
        # What else waits in the session is flushed when its owner wants it to be.
        with _clear_errors(statement), self._session.no_autoflush, self._clear_state():
            connection = connection_of(self._session, self._bind)
            check_untranslated(connection.get_execution_options(), _schema(statement))
            # Since SQLAlchemy 2.1, a session may have such options, too.
            check_untranslated(getattr(self._session, "execution_options", {}), _schema(statement))
            with _writing(self._session):
                result: Any = self._session.execute(statement, parameters, bind_arguments={"mapper": _MAPPER})
            # A listener may have added them. An UPDATE's result has a context since SQLAlchemy 2.1.
            if self.is_heard and hasattr(result, "context"):
                check_untranslated(result.context.execution_options, _schema(statement))
            self._result = result
            return _rows(result)

    @contextmanager
    def _clear_state(self) -> Iterator[None]:
        try:
            yield
        except InvalidRequestError as error:
            transaction = self._session.get_transaction()
            if isinstance(error, PendingRollbackError) or transaction is None or transaction.is_active:
                raise
            raise UnsupportedSession(
                "nothing can be added in this session now, when its transaction is beginning or ending, as "
                "in the events after_begin, after_commit and after_rollback: add the task in before_commit "
                "or earlier, or through a session of its own"
            ) from error

    def driver(self) -> AbstractContextManager[Driver | None]:
        return _driver(self._result.context)

    def keep(self, task: Task) -> None:
        # In an event such as after_insert, SQLAlchemy warns of objects that are added to the session.
        if self._session._warn_on_events:  # noqa: SLF001 - nothing public says that it is flushing
            return
        self._session.add(task)
        transaction = self._session.get_nested_transaction() or self._session.get_transaction()
        if transaction is not None:
            # A rollback takes it out of the session then, like an object that was flushed.
            transaction._new[inspect(task)] = True  # noqa: SLF001 - nothing public does it without a flush

    def renew(self, mapped: type[Task], row: Row) -> None:
        known = self._session.identity_map.get(identity_key(mapped, row["id"]))
        if known is not None:
            for name, value in row.items():
                # SQLAlchemy has seen the change, and will undo it with the transaction; here it is read.
                set_committed_value(known, name, value)

    def notify(self, notification: Notification) -> None:
        # A session on a connection is in somebody else's transaction, often one that a test rolls back.
        if isinstance(self._bind, Engine):
            notify_after_session_commit(self._session, self._bind, notification)
        elif COMMITS_WITH in self._session.info:
            notify_after_session_commit(self._session.info[COMMITS_WITH], self._bind.engine, notification)


class _CoreConnection:
    is_heard = False

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

    def keep(self, task: Task) -> None:
        """Leave the task in no session: there is none."""

    def renew(self, mapped: type[Task], row: Row) -> None:
        """Nothing: there is no session."""

    def notify(self, notification: Notification) -> None:
        notify_after_connection_commit(self._connection, notification)


class _PsycopgConnection:
    is_heard = False

    # With cursors of a kind that we know, whatever the connection makes: Django's answer jsonb as text, and
    # a RawCursor takes no named parameters.

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def execute(self, statement: Executable, parameters: dict[str, Any]) -> Sequence[Row]:
        with _clear_errors(statement), psycopg.Cursor(self._connection, row_factory=dict_row) as cursor:
            read_anything(cursor)
            # In a pipeline, another one around it waits for the answer.
            with self._connection.pipeline() if self._is_in_pipeline() else nullcontext():
                cursor.execute(*_compiled(statement, parameters))
            return cursor.fetchall() if cursor.description else ()

    @contextmanager
    def driver(self) -> Iterator[Driver | None]:
        yield None if self._is_in_pipeline() else self  # in a pipeline there can be no COPY

    def copy(self, statement: Composed, lines: Iterator[str]) -> None:
        with psycopg.Cursor(self._connection) as cursor, cursor.copy(statement) as copy:
            while chunk := "".join(islice(lines, LINES)):
                copy.write(chunk)

    def keep(self, task: Task) -> None:
        """Leave the task in no session: there is none."""

    def renew(self, mapped: type[Task], row: Row) -> None:
        """Nothing: there is no session."""

    def notify(self, notification: Notification) -> None:
        """Give none: psycopg doesn't tell of its commits. Workers find the task when they look next."""

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
    # Not the session's own idea of its connection: it may choose one by the statement.
    connection: Any = context.root_connection.connection.driver_connection
    dialect = context.dialect
    kind = _AsyncPsycopgConnection if dialect.is_async else _PsycopgConnection
    options = context.execution_options
    if options.get("schema_translate_map") or options.get(CLOCK):
        yield None  # these change SQLAlchemy's own statements only
        return
    try:
        with kind(connection).driver() as driver:
            yield driver
    except psycopg.Error as error:
        # As if SQLAlchemy had executed it.
        raise DBAPIError.instance("COPY", None, error, psycopg.Error, dialect=dialect) from error


def _rows(result: Any) -> Sequence[Row]:
    # What an ORM statement answers always has rows.
    has_rows = getattr(result, "returns_rows", True)
    return cast("Sequence[Row]", result.mappings().all()) if has_rows else ()


def _compiled(statement: Any, parameters: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    text, constants = compiled(statement)
    return text, {**constants, **parameters}


def _check_dialect(dialect: Dialect) -> None:
    check_dialect(dialect)
    if dialect.is_async and not in_greenlet():
        raise UnsupportedSession(
            "this is the synchronous side of an asyncio session: give the AsyncSession or AsyncConnection "
            "itself, and await the answer"
        )


def _schema(statement: Any) -> str | None:
    schema: str | None = statement.table.schema
    return schema


@contextmanager
def _clear_errors(statement: Any) -> Iterator[None]:
    try:
        yield
    except (DBAPIError, psycopg.Error) as error:
        cause: Any = getattr(error, "orig", error)
        if is_missing(error):
            raise SchemaMismatch(
                f"{cause.diag.message_primary}. Are apoq's tables missing, or at another version? Then "
                f"{preparing(_schema(statement))}"
            ) from error
        if _is_taken_id(cause):
            raise SchemaMismatch(
                "the id of the new task is taken, because the sequence of apoq_tasks.id is behind, as after "
                "a restore without it: `apoq doctor` shows the statement that sets it"
            ) from error
        raise


def _is_taken_id(cause: Any) -> bool:
    diag = getattr(cause, "diag", None)
    # A naming convention may have renamed the key.
    is_key = diag and (diag.constraint_name == "apoq_tasks_pkey" or "(id)=(" in (diag.message_detail or ""))
    return bool(is_key) and cause.sqlstate == _TAKEN
