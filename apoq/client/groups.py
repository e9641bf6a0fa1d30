"""Groups: tasks that are added together, and the tasks that run after all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import psycopg
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

from apoq.client.dependencies import Edge, Part, add, add_with_id, added, link
from apoq.client.session_adapters import AsyncioSession, Caller, SyncSession, through
from apoq.core.dependencies import MAX_MEMBERS, RUN, Dependencies, OnParentFailure
from apoq.errors import InvalidTask
from apoq.schema.models import Task
from apoq.schema.statements import links as statements
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.groups import GROUP_POSITION, add_to_own_edges, group_of, missing
from apoq.schema.statements.notify import has_tasks


class Closing(NamedTuple):
    """A task that runs after a group."""

    parameters: dict[str, Any]
    on_failure: OnParentFailure | None


class Group:
    """A group of tasks, and the tasks that run after it; made by `Queue.group`.

    Use it as a context manager, with ``async with`` if its session is asyncio's. At the end of the block, the
    tasks of `then` and `always` are added.

    Attributes:
        name (str): The group's name, for people.
        id (int): The id of the group: that of the first task that runs after it.
    """

    def __init__(self, queue: Any, session: SyncSession | AsyncioSession, name: str) -> None:
        """Use `Queue.group` instead."""
        self.name = name
        self.id = 0
        self._queue = queue
        self._session = session
        self._members: list[int] = []
        self._closing: list[Closing] = []
        self._is_open = False

    def add(self, task: Any, data: Any = None, **options: Any) -> Any:
        """Add a task to the group, in the transaction of its session.

        Args:
            task: A call of a typed task, made by `TypedTask.call`; or a type.
            data: The task's data, if a type was given. An empty dict by default.
            **options: As for `Queue.add`, but without a unique key. With `after`, the task waits for other
                tasks, which may be members of the group.

        Returns:
            The new `Task`. With an asyncio session, an awaitable of it.

        Raises:
            InvalidTask: If the task or an option is invalid, the block has ended, or the group has more than
                100,000 tasks.
            InvalidData: If the data can't be stored.
        """
        self._check_open()
        parameters, dependencies = self._queue._member(task, data, options)  # noqa: SLF001
        self._check_size(1)

        def operation(caller: Caller) -> Task:
            added_task = _add_member(caller, self._queue.schema, parameters, dependencies, self.id)
            self._members.append(added_task.id)
            return added_task

        return through(self._session, operation)

    def add_many(self, task: Any, items: Iterable[Any] | None = None, **options: Any) -> Any:
        """Add many tasks to the group.

        Args:
            task: Calls of typed tasks, made by `TypedTask.call`; or a type.
            items: The data of each task, if a type was given.
            **options: As for `add`, without `after`.

        Returns:
            The number of tasks. With an asyncio session, an awaitable of it.

        Raises:
            InvalidTask: As for `add`.
            InvalidData: If the data of a task can't be stored. Earlier ones may already be inserted.
        """
        self._check_open()
        parameters, parts = self._queue._members(task, items, options)  # noqa: SLF001

        def operation(caller: Caller) -> int:
            ids = _add_members(caller, self._queue.schema, parameters, parts, self.id, self._check_size)
            self._members += ids
            return len(ids)

        return through(self._session, operation)

    def then(
        self, task: Any, data: Any = None, *, on_parent_failure: OnParentFailure | None = None, **options: Any
    ) -> None:
        """Run a task when all tasks of the group have completed.

        Args:
            task: A call of a typed task, or a type.
            data: The task's data, if a type was given.
            on_parent_failure: What happens to it if a task of the group fails, as for `Queue.add`.
            **options: As for `Queue.add`, without `after` and a unique key.
        """
        self._close_with(task, data, options, on_parent_failure)

    def always(self, task: Any, data: Any = None, **options: Any) -> None:
        """Run a task when all tasks of the group have ended, whether or not they have completed.

        Args:
            task: A call of a typed task, or a type.
            data: The task's data, if a type was given.
            **options: As for `then`.
        """
        self._close_with(task, data, options, RUN)

    def __enter__(self) -> Self:
        """Begin the group."""
        if isinstance(self._session, _ASYNCIO):
            raise InvalidTask("a group of an asyncio session must be entered with `async with`")
        through(self._session, self._begin)
        return self

    def __exit__(
        self, type_: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Add the tasks that run after the group, unless an exception has ended the block."""
        self._is_open = False
        if value is None:
            self._check_closing()
            through(self._session, self._finish)

    async def __aenter__(self) -> Self:
        """Begin the group."""
        await _awaited(through(self._session, self._begin))
        return self

    async def __aexit__(
        self, type_: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Add the tasks that run after the group, unless an exception has ended the block."""
        self._is_open = False
        if value is None:
            self._check_closing()
            await _awaited(through(self._session, self._finish))

    def __repr__(self) -> str:
        return f"<Group {self.name!r} of {self._queue!r}>"

    def _begin(self, caller: Caller) -> None:
        (row,) = caller.execute(statements.reserve_id(self._queue.schema), {})
        self.id = row["id"]
        self._is_open = True

    def _finish(self, caller: Caller) -> None:
        schema, ids = self._queue.schema, [self.id]
        # Tasks that were added in a savepoint are gone if that was rolled back.
        gone = {row["id"] for row in caller.execute(missing(schema), {"ids": array_text(self._members)})}
        self._members = [member for member in self._members if member not in gone]
        for number, (parameters, on_failure) in enumerate(self._closing):
            its = {
                **parameters,
                **Dependencies((), on_failure).parameters,
                "task_blockers": len(self._members),
                "task_group_id": self.id,
            }
            if number == 0:
                add_with_id(caller, schema, {**its, "task_id": self.id})
            else:
                ids.append(add_with_id(caller, schema, {**its, "task_id": _next_id(caller, schema)}).id)
        _link_members(caller, schema, self._members, ids)
        if not self._members:
            caller.notify(has_tasks(schema, self._queue.name))

    def _close_with(
        self, task: Any, data: Any, options: dict[str, Any], on_failure: OnParentFailure | None
    ) -> None:
        self._check_open()
        parameters = self._queue._closing(task, data, options, on_failure, self.name)  # noqa: SLF001
        self._closing.append(Closing(parameters, on_failure))

    def _check_open(self) -> None:
        if not self._is_open:
            raise InvalidTask(
                "a task must be added to a group within its `with` block; a task of the group may add others "
                "later, by `task.group`"
            )

    def _check_closing(self) -> None:
        if not self._closing:
            raise InvalidTask(
                "a group must have a task that runs after it, by `group.then` or `group.always`: add other "
                "tasks by `queue.add`"
            )

    def _check_size(self, count: int) -> None:
        check_size(len(self._members) + count)


class TaskGroup:
    """The group of a running task, to which it can add tasks; ``task.group``.

    They are added in the transaction of ``task.session``, together with the task's completion.
    """

    def __init__(self, queue: Any, session: SyncSession | AsyncioSession, task_id: int) -> None:
        self._queue = queue
        self._session = session
        self._task_id = task_id

    def add(self, task: Any, data: Any = None, **options: Any) -> Any:
        """Add a task to the group, as `Group.add` does.

        Raises:
            InvalidTask: If the running task is not in a group, or has completed before; or as `Group.add`.
        """
        parameters, dependencies = self._queue._member(task, data, options)  # noqa: SLF001

        def operation(caller: Caller) -> Task:
            group_id, closing, check = self._group(caller)
            check(1)
            added_task = _add_member(caller, self._queue.schema, parameters, dependencies, group_id)
            self._join(caller, [added_task.id], closing)
            return added_task

        return through(self._session, operation)

    def add_many(self, task: Any, items: Iterable[Any] | None = None, **options: Any) -> Any:
        """Add many tasks to the group, as `Group.add_many` does.

        Raises:
            InvalidTask: As for `add`.
        """
        parameters, parts = self._queue._members(task, items, options)  # noqa: SLF001

        def operation(caller: Caller) -> int:
            group_id, closing, check = self._group(caller)
            ids = _add_members(caller, self._queue.schema, parameters, parts, group_id, check)
            self._join(caller, ids, closing)
            return len(ids)

        return through(self._session, operation)

    def _group(self, caller: Caller) -> tuple[int, list[int], Callable[[int], None]]:
        """Return the group's id, the tasks that run after it, and a check of its size."""
        rows = caller.execute(group_of(self._queue.schema), {"task_id": self._task_id})
        if not rows:
            raise InvalidTask(
                f"task.group must be used in a task of a group, and task {self._task_id} is in none; or it "
                "had completed before, and was retried"
            )
        blockers = max(row["blockers"] + (row["added_count"] or 0) for row in rows)
        return (
            rows[0]["group_id"],
            [row["child_id"] for row in rows],
            lambda count: check_size(blockers + count),
        )

    def _join(self, caller: Caller, ids: list[int], closing: list[int]) -> None:
        schema = self._queue.schema
        _link_members(caller, schema, ids, closing)
        caller.execute(
            add_to_own_edges(schema),
            {"task_id": self._task_id, "children": array_text(closing), "number": len(ids)},
        )


def check_size(count: int) -> None:
    """Raise `InvalidTask` if a group can't have so many tasks."""
    if count > MAX_MEMBERS:
        raise InvalidTask(
            f"a group must have at most {MAX_MEMBERS:,} tasks, got {count:,}: add several groups, or tasks "
            "that do more each"
        )


def _add_member(
    caller: Caller, schema: str | None, parameters: dict[str, Any], dependencies: Dependencies, group_id: int
) -> Task:
    return add(caller, schema, parameters, dependencies, task_group_id=group_id, task_is_followed=True)


def _add_members(
    caller: Caller,
    schema: str | None,
    parameters: dict[str, Any],
    parts: Iterable[Part],
    group_id: int,
    check: Callable[[int], None],
) -> list[int]:
    values = {**parameters, **Dependencies().parameters, "task_group_id": group_id}
    ids: list[int] = []
    for rows in added(caller, schema, values, parts, followed=MAX_MEMBERS + 1):
        ids += [row["id"] for row in rows]
        check(len(ids))
    if ids:
        caller.notify(has_tasks(schema, parameters["task_queue"]))
    return ids


def _link_members(caller: Caller, schema: str | None, members: list[int], closing: list[int]) -> None:
    link(caller, schema, (Edge(member, child, GROUP_POSITION) for child in closing for member in members))


def _next_id(caller: Caller, schema: str | None) -> int:
    (row,) = caller.execute(statements.reserve_id(schema), {})
    id_: int = row["id"]
    return id_


async def _awaited(found: Any) -> Any:
    return await found


_ASYNCIO: Final = (AsyncSession, async_scoped_session, AsyncConnection, psycopg.AsyncConnection)
