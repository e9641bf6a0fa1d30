"""The methods of a typed task for the results of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import timedelta
from functools import cached_property
from typing import Any, Generic, TypeVar, overload

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.client.results import Kind, Result, result
from apoq.client.session_adapters import AsyncioSession, SyncSession, through
from apoq.client.session_first import call_session_first
from apoq.client.task_ids import AnyQueue, task_id
from apoq.client.waiting import wait
from apoq.core.return_values import ReturnValue
from apoq.schema.models import Task

R_co = TypeVar("R_co", covariant=True)
V = TypeVar("V")
"""The result of a coroutine function when it is awaited."""


class TypedResults(Generic[R_co]):
    """The results of one function's tasks. Base of `TypedTask`, whose attributes it uses."""

    queue: AnyQueue
    function: Callable[..., R_co]
    type: str
    aliases: tuple[str, ...]

    @overload
    def result(
        self: TypedResults[Coroutine[Any, Any, V]], session: SyncSession, task: Task | int, /
    ) -> Result[V] | None: ...
    @overload
    def result(
        self: TypedResults[Coroutine[Any, Any, V]], session: AsyncioSession, task: Task | int, /
    ) -> Coroutine[Any, Any, Result[V] | None]: ...
    @overload
    def result(self, session: SyncSession, task: Task | int, /) -> Result[R_co] | None: ...
    @overload
    def result(
        self, session: AsyncioSession, task: Task | int, /
    ) -> Coroutine[Any, Any, Result[R_co] | None]: ...
    @call_session_first
    def result(self, session: SyncSession | AsyncioSession, task: Task | int, /) -> Any:
        """Return the state of a task of this function, with its result if it has completed.

        `Result.value` is converted by the function's return annotation. See `Queue.result`.

        Args:
            session: A session or a connection, as for `Queue.result`.
            task: The task, or its id.

        Returns:
            A `Result`, also if the task has not ended; None if the task doesn't exist, was pruned, or is in
            another queue. With an asyncio session, an awaitable of it.

        Raises:
            InvalidTask: If `task` is not a task of this schema or an id, or has another type.
            UnsupportedSession: If `session` is not a session or a connection.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        parameters = {"task_id": task_id(self.queue, task), "from_queue": self.queue.name}
        return through(session, lambda caller: result(caller, self.queue.schema, parameters, self._kind))

    @overload
    def wait(
        self: TypedResults[Coroutine[Any, Any, V]],
        engine: Engine,
        task: Task | int,
        /,
        *,
        timeout: float | timedelta,
    ) -> Result[V]: ...
    @overload
    def wait(
        self: TypedResults[Coroutine[Any, Any, V]],
        engine: AsyncEngine,
        task: Task | int,
        /,
        *,
        timeout: float | timedelta,
    ) -> Coroutine[Any, Any, Result[V]]: ...
    @overload
    def wait(self, engine: Engine, task: Task | int, /, *, timeout: float | timedelta) -> Result[R_co]: ...
    @overload
    def wait(
        self, engine: AsyncEngine, task: Task | int, /, *, timeout: float | timedelta
    ) -> Coroutine[Any, Any, Result[R_co]]: ...
    def wait(self, engine: Engine | AsyncEngine, task: Task | int, /, *, timeout: float | timedelta) -> Any:
        """Wait until a task of this function has ended, and return its result, as `result` does.

        Args:
            engine: An Engine or an AsyncEngine, not a session; see `Queue.wait`.
            task: The task, or its id.
            timeout: The longest time to wait, in seconds or as a timedelta.

        Returns:
            The task's `Result`. With an AsyncEngine, an awaitable of it.

        Raises:
            WaitTimeout: A TimeoutError: if the task has not ended by then. The task goes on.
            TaskGone: If there is no such task in the queue.
            RuntimeError: If it is called by a processor.
            InvalidTask: If `task` is not a task of this schema or an id, or has another type.
            TypeError: If `engine` is not an engine, or `timeout` is not a duration.
            ValueError: If `timeout` is not positive and finite.
        """
        return wait(engine, self.queue, task_id(self.queue, task), timeout, self._kind)

    @cached_property
    def _returned(self) -> ReturnValue:
        return ReturnValue(self.function, self.type)

    def _read_result(self, document: Any) -> Any:
        return self._returned.read(document)  # now, because the annotation may be defined below the task

    @property
    def _kind(self) -> Kind:
        return Kind(self._read_result, (self.type, *self.aliases))
