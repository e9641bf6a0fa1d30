"""The methods of a queue for the results and the progress of its tasks."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, overload

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.client.progress import Progress, progress
from apoq.client.queue_base import QueueBase
from apoq.client.results import Result, result
from apoq.client.session_adapters import AsyncioSession, SyncSession, through
from apoq.client.session_first import session_first
from apoq.client.task_ids import task_id
from apoq.client.waiting import wait
from apoq.schema.models import Task


class QueueResults(QueueBase):
    """The results and the progress of a queue's tasks."""

    @overload
    def result(self, session: SyncSession, task: Task | int) -> Result[Any] | None: ...
    @overload
    def result(
        self, session: AsyncioSession, task: Task | int
    ) -> Coroutine[Any, Any, Result[Any] | None]: ...
    @session_first
    def result(
        self, session: SyncSession | AsyncioSession, task: Task | int
    ) -> Result[Any] | Coroutine[Any, Any, Result[Any] | None] | None:
        """Return the state of a task of this queue, with its result if it has completed.

        The result is stored only if the function has ``keep_result=True``, and as long as the task: see
        `Worker`'s `keep_completed`. To convert it by the function's return annotation, call `result` of the
        typed task instead.

        Args:
            session: A session or connection, as for `add`.
            task: The task, or its id.

        Returns:
            A `Result`, also if the task has not ended; None if the task doesn't exist, was pruned, or is in
            another queue. With an asyncio session or connection, an awaitable of it.

        Raises:
            InvalidTask: If `task` is not a task of this schema or an id.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.

        Note:
            Executes one SELECT in the caller's transaction. Above READ COMMITTED, it sees the task as it was
            when that transaction began.
        """
        parameters = self._task_of(task)
        return through(session, lambda caller: result(caller, self.schema, parameters))

    @overload
    def wait(self, engine: Engine, task: Task | int, *, timeout: float | timedelta) -> Result[Any]: ...
    @overload
    def wait(
        self, engine: AsyncEngine, task: Task | int, *, timeout: float | timedelta
    ) -> Coroutine[Any, Any, Result[Any]]: ...
    def wait(
        self, engine: Engine | AsyncEngine, task: Task | int, *, timeout: float | timedelta
    ) -> Result[Any] | Coroutine[Any, Any, Result[Any]]:
        """Wait until a task of this queue has completed, failed for good, or was cancelled.

        Commit the task before. It is read again and again, in short transactions, first after 0.05 s and in
        the end every second. In between, no connection is held.

        Args:
            engine: An Engine or an AsyncEngine, not a session.
            task: The task, or its id.
            timeout: The longest time to wait, in seconds or as a timedelta.

        Returns:
            The task's `Result`. A task that disappears meanwhile counts as completed, without a result:
            workers with ``keep_completed=0`` delete tasks on completion. With an AsyncEngine, an awaitable of
            it.

        Raises:
            WaitTimeout: A TimeoutError: if the task has not ended by then. The task goes on.
            TaskGone: If there is no such task in this queue.
            RuntimeError: If it is called by a processor: it would hold a slot that the other task may need.
            InvalidTask: If `task` is not a task of this schema or an id.
            TypeError: If `engine` is not an engine, or `timeout` is not a duration.
            ValueError: If `timeout` is not positive and finite.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        return wait(engine, self, task_id(self, task), timeout)

    @overload
    def progress(self, session: SyncSession, task: Task | int) -> Progress | None: ...
    @overload
    def progress(self, session: AsyncioSession, task: Task | int) -> Coroutine[Any, Any, Progress | None]: ...
    @session_first
    def progress(
        self, session: SyncSession | AsyncioSession, task: Task | int
    ) -> Progress | Coroutine[Any, Any, Progress | None] | None:
        """Return the progress that a task of this queue has reported last, by `RunningTask.set_progress`.

        Args:
            session: A session or connection, as for `add`.
            task: The task, or its id.

        Returns:
            The `Progress`; None if the task has reported none, or doesn't exist. With an asyncio session or
            connection, an awaitable of it.

        Raises:
            InvalidTask: If `task` is not a task of this schema or an id.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        parameters = self._task_of(task)
        return through(session, lambda caller: progress(caller, self.schema, parameters))

    def _task_of(self, task: Task | int) -> dict[str, Any]:
        return {"task_id": task_id(self, task), "from_queue": self.name}
