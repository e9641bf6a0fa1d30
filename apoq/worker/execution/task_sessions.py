"""The sessions that processors get as ``task.session``."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType

from sqlalchemy import Connection, Engine, ExceptionContext, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from apoq.core.outcomes import Outcome
from apoq.errors import SessionMisused
from apoq.postgres.connections import make_renewable, prepare_where_kept, renew
from apoq.postgres.engine_twins import async_twin, sync_twin
from apoq.postgres.urls import sync_side
from apoq.postgres.watchdog import cut
from apoq.worker.execution.event_loop import EventLoopThread

_COMPLETING = "apoq.completing"
_CONNECTION = "apoq.connection"
_CUT_OFF = "apoq.cut_off"
_UNCONNECTED = "_apoq_unconnected"


class TaskSession(Session):
    """A session that the worker commits, together with the completion of the task."""

    def __exit__(self, *_: object) -> None:
        """Leave it open: the worker commits what `with task.session:` has written, and closes it."""

    def commit_completion(self) -> None:
        """Commit, as only the worker does."""
        self.info[_COMPLETING] = True
        self.commit()


class AsyncTaskSession(AsyncSession):
    """The asyncio twin of `TaskSession`."""

    sync_session_class = TaskSession

    async def __aexit__(
        self, type_: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave it open, as `TaskSession` does."""


@event.listens_for(TaskSession, "before_commit")
def _guard(session: Session) -> None:
    # A commit by the processor would separate its writes from the completion.
    if not session.in_nested_transaction() and not session.info.get(_COMPLETING):
        raise SessionMisused(
            "the worker commits task.session, together with the task's completion: remove the commit, or "
            "open a session of your own for writes that must be committed earlier"
        )


@event.listens_for(TaskSession, "after_begin")
def _note_connection(session: Session, _transaction: object, connection: Connection) -> None:
    session.info[_CONNECTION] = connection.connection


def cut_off(session: TaskSession | AsyncTaskSession) -> None:
    """Cut the session's connection, from another thread; the server undoes what was not committed."""
    session.info[_CUT_OFF] = True
    with suppress(AttributeError, KeyError):  # not begun yet, or closed already
        cut(session.info[_CONNECTION].driver_connection)


def is_completing(session: TaskSession | AsyncTaskSession) -> bool:
    """Return whether the worker commits the session, or has committed it."""
    return _COMPLETING in session.info


def is_cut_off(session: TaskSession | AsyncTaskSession) -> bool:
    """Return whether the session was cut off."""
    return _CUT_OFF in session.info


def could_not_connect(error: BaseException) -> bool:
    """Return whether an attempt failed because `task.session` could not connect to its database.

    False if another database is away, and if a connection was lost after it had been made. An outcome that
    the processor has chosen by raising, such as `Retry`, takes precedence.
    """
    seen: set[int] = set()
    asked: list[object] = [] if isinstance(error, Outcome) else [error]
    while asked:
        found = asked.pop()
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        if hasattr(found, _UNCONNECTED):
            return True
        seen.add(id(found))
        asked += [getattr(found, "orig", None), found.__cause__, found.__context__]
    return False


def _make_ready(engine: Engine) -> None:
    make_renewable(engine)
    if not event.contains(engine, "handle_error", _mark_unconnected):
        event.listen(engine, "handle_error", _mark_unconnected)


def _mark_unconnected(context: ExceptionContext) -> None:
    if context.connection is None:  # it could not be made
        setattr(context.original_exception, _UNCONNECTED, True)


class TaskSessions:
    """Opens the sessions of a worker's tasks, on the engine that the worker was given, or on its twin."""

    def __init__(self, engine: Engine | AsyncEngine, event_loop: EventLoopThread) -> None:
        self._engine = engine
        _make_ready(sync_side(engine))
        self._event_loop = event_loop
        self._lock = threading.Lock()
        self._sync_twin: Engine | None = None
        self._async_twin: AsyncEngine | None = None

    def open(self) -> TaskSession:
        """Open a session for a plain processor."""
        return TaskSession(self._sync_engine())

    def open_async(self) -> AsyncTaskSession:
        """Open a session for a coroutine processor."""
        return AsyncTaskSession(self._async_engine())

    def renew(self) -> None:
        """Use new connections from now on, because the pooled ones may be dead without an error."""
        with self._lock:
            for engine in (self._engine, self._sync_twin, self._async_twin):
                if engine is not None:
                    renew(sync_side(engine))

    def dispose(self, timeout: float) -> None:
        """Close the worker's own engines, within `timeout` seconds; the application's engine stays open."""
        with self._lock:
            if self._sync_twin is not None:
                self._sync_twin.dispose()
            if self._async_twin is not None:
                # The loop is blocked by a coroutine, whose connection it may be, or it has ended.
                with suppress(TimeoutError, RuntimeError):
                    self._event_loop.run(self._async_twin.dispose(), timeout)
            self._sync_twin = self._async_twin = None

    def _sync_engine(self) -> Engine:
        if isinstance(self._engine, Engine):
            return self._engine
        with self._lock:
            if self._sync_twin is None:
                self._sync_twin = sync_twin(self._engine)
                _make_ready(self._sync_twin)
                prepare_where_kept(self._sync_twin)
            return self._sync_twin

    def _async_engine(self) -> AsyncEngine:
        # Connections belong to an event loop: the application's engine serves its own loop only.
        if isinstance(self._engine, AsyncEngine) and self._event_loop.is_applications:
            return self._engine
        with self._lock:
            if self._async_twin is None:
                self._async_twin = async_twin(self._engine)
                _make_ready(self._async_twin.sync_engine)
                prepare_where_kept(self._async_twin.sync_engine)
            return self._async_twin
