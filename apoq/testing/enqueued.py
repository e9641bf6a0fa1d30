"""Assertions about pending tasks."""

from __future__ import annotations

import json
from collections.abc import Coroutine, Mapping
from typing import Any, Final, overload

from sqlalchemy import ColumnElement, Connection, select

from apoq.client.queue import Queue
from apoq.client.typed_task import TypedTask
from apoq.core.conversion import NotConvertible, reread
from apoq.core.states import PENDING, WAITING
from apoq.errors import glimpse
from apoq.postgres.urls import check_untranslated
from apoq.schema.models import DEFAULT_QUEUE, Task, tasks_table
from apoq.schema.objects import detached
from apoq.testing.inside import (
    AsyncTestSession,
    Inner,
    TestSession,
    clear_errors,
    connection_of,
    in_session,
    inside,
)

AnyTypedTask = TypedTask[..., Any, ...]

SHOWN: Final = 20
"""Maximum number of tasks in a failure's message."""


class Enqueued(list[Task]):
    """The tasks that were found. If there are none, its repr lists other tasks."""

    def __init__(self, tasks: list[Task], others: list[Task]) -> None:
        super().__init__(tasks)
        self.others = others

    def __repr__(self) -> str:
        if self or not self.others:
            return super().__repr__()
        return f"[] (there is: {'; '.join(map(_shown, self.others))})"


@overload
def enqueued(
    session: TestSession,
    task: str | AnyTypedTask | None = ...,
    data: Any = ...,
    /,
    *,
    queue: Queue | str | None = ...,
    **arguments: Any,
) -> list[Task]: ...
@overload
def enqueued(
    session: AsyncTestSession,
    task: str | AnyTypedTask | None = ...,
    data: Any = ...,
    /,
    *,
    queue: Queue | str | None = ...,
    **arguments: Any,
) -> Coroutine[Any, Any, list[Task]]: ...
def enqueued(
    session: TestSession | AsyncTestSession,
    task: str | AnyTypedTask | None = None,
    data: Any = None,
    /,
    *,
    queue: Queue | str | None = None,
    **arguments: Any,
) -> list[Task] | Coroutine[Any, Any, list[Task]]:
    """Return the pending tasks of this type, and with this data, that the transaction of `session` sees.

    Also those that wait for other tasks.

    Args:
        session: The session or connection of the test.
        task: A type or a typed task. None: any.
        data: The data of the tasks. A dict may have only some of their keys.
        queue: A `Queue` or the name of one. By default the queue of a typed task, or any queue.
        **arguments: Keys and values of the data, in addition to `data`.

    Returns:
        The tasks, in the order of their ids. With an asyncio session, an awaitable of them.

    Raises:
        TypeError: If `task` is not a type or a typed task, or if there are keywords and `data` is not a dict.
        InvalidTask: If a typed task doesn't have such an argument.
        UnsupportedSession: If `session` can't be used.
        SchemaMismatch: If apoq's tables are missing or at another version.

    Note:
        A session is flushed before.
    """
    wanted = _Wanted(task, data, queue, arguments)
    return inside(session, wanted.find)


@overload
def assert_enqueued(
    session: TestSession,
    task: str | AnyTypedTask,
    data: Any = ...,
    /,
    *,
    queue: Queue | str | None = ...,
    **arguments: Any,
) -> Task: ...
@overload
def assert_enqueued(
    session: AsyncTestSession,
    task: str | AnyTypedTask,
    data: Any = ...,
    /,
    *,
    queue: Queue | str | None = ...,
    **arguments: Any,
) -> Coroutine[Any, Any, Task]: ...
def assert_enqueued(
    session: TestSession | AsyncTestSession,
    task: str | AnyTypedTask,
    data: Any = None,
    /,
    *,
    queue: Queue | str | None = None,
    **arguments: Any,
) -> Task | Coroutine[Any, Any, Task]:
    """Assert that there is exactly one such pending task, and return it.

    Args:
        session: The session or connection of the test.
        task: A type or a typed task.
        data: The data of the task. A dict may have only some of its keys.
        queue: A `Queue` or the name of one. By default the queue of a typed task, or any queue.
        **arguments: Keys and values of the data, in addition to `data`.

    Returns:
        The task. With an asyncio session, an awaitable of it.

    Raises:
        AssertionError: If there is no such task, or more than one. The message lists the tasks that there
            are.
        TypeError: If `task` is not a type or a typed task, or if there are keywords and `data` is not a dict.
        InvalidTask: If a typed task doesn't have such an argument.
        UnsupportedSession: If `session` can't be used.
        SchemaMismatch: If apoq's tables are missing or at another version.

    Note:
        A session is flushed before.
    """
    __tracebackhide__ = True  # pytest then shows the line of the test
    wanted = _Wanted(task, data, queue, arguments)
    return inside(session, wanted.find_one)


class _Wanted:
    """The tasks that a test looks for."""

    def __init__(
        self,
        task: str | AnyTypedTask | None,
        data: Any,
        queue: Queue | str | None,
        arguments: Mapping[str, Any],
    ) -> None:
        if arguments:
            if not isinstance(data, dict | None):
                raise TypeError(f"data must be a dict if there are keywords, got {glimpse(data)}")
            data = {**(data or {}), **arguments}
        if isinstance(task, TypedTask):
            self.type: str | None = task.type
            if queue is None:
                queue = Queue(task.queue.name, schema=task.queue.schema)
            if isinstance(data, dict):
                data = task._arguments.write_some(data)  # noqa: SLF001 - as its `add` does
        elif task is None or isinstance(task, str):
            self.type = task
        else:
            raise TypeError(
                f"task must be a task's type, or a function decorated with @queue.task, got {glimpse(task)}"
            )
        self.data = data
        self.schema = queue.schema if isinstance(queue, Queue) else None
        self.queue = queue.name if isinstance(queue, Queue) else queue

    def __str__(self) -> str:
        words = ["task" if self.type is None else repr(self.type)]
        if self.queue not in {None, DEFAULT_QUEUE}:
            words.append(f"in the queue {self.queue!r}")
        if isinstance(self.data, dict):
            words.append("with " + ", ".join(f"{key}={glimpse(value)}" for key, value in self.data.items()))
        elif self.data is not None:
            words.append(f"with the data {glimpse(self.data)}")
        return " ".join(words)

    def find(self, inner: Inner) -> Enqueued:
        """Return the tasks that match."""
        tasks = tasks_table(self.schema)
        conditions: list[ColumnElement[bool]] = [tasks.c.state.in_([PENDING, WAITING])]
        if self.type is not None:
            conditions.append(tasks.c.type == self.type)
        if self.queue is not None:
            conditions.append(tasks.c.queue == self.queue)
        if not isinstance(inner, Connection):
            inner.flush()
        connection = connection_of(inner)
        check_untranslated(connection.get_execution_options(), self.schema)
        with clear_errors(self.schema):
            rows = connection.execute(select(*tasks.c).where(*conditions).order_by(tasks.c.id)).mappings()
            found = [row for row in rows if self._matches(row["data"])]
            if found:
                return Enqueued([in_session(inner, self.schema, row) for row in found], [])
            last = select(*tasks.c).order_by(tasks.c.id.desc()).limit(SHOWN)
            others = [detached(self.schema, row) for row in connection.execute(last).mappings()]
        return Enqueued([], others[::-1])

    def find_one(self, inner: Inner) -> Task:
        """Return the only task that matches."""
        __tracebackhide__ = True
        found = self.find(inner)
        if len(found) == 1:
            return found[0]
        if found:
            problem, listed = f"expected one pending task, found {len(found)}: {self}", found[:SHOWN]
        else:
            problem, listed = f"no {self} is pending", found.others
        lines = [f"  {_shown(task)}" for task in listed] or ["  none"]
        raise AssertionError("\n".join([f"{problem}. The tasks in this transaction:", *lines]))

    def _matches(self, data: Any) -> bool:
        if self.data is None:
            return True
        if not isinstance(self.data, dict):
            return _equal(data, self.data)
        return isinstance(data, dict) and all(
            key in data and _equal(data[key], value) for key, value in self.data.items()
        )


def _equal(stored: Any, wanted: Any) -> bool:
    """Compare as JSON, in which a tuple or a UUID was stored."""
    if stored == wanted:
        return True
    try:
        return bool(stored == reread(wanted))
    except (NotConvertible, TypeError, ValueError):
        return False


def _shown(task: Task) -> str:
    words = [task.type, json.dumps(task.data, ensure_ascii=False)]
    if task.queue != DEFAULT_QUEUE:
        words.append(f"in the queue {task.queue!r}")
    if task.state != PENDING:
        words.append(f"({task.state})")
    return " ".join(words)
