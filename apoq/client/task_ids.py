"""The ids of tasks that callers pass to a queue's methods."""

from __future__ import annotations

from typing import Final, Protocol

from sqlalchemy import inspect

from apoq.core.options import integer
from apoq.errors import InvalidTask
from apoq.schema.models import Task, task_class

_LOWEST_ID: Final = -(2**63)
_HIGHEST_ID: Final = 2**63 - 1


class AnyQueue(Protocol):
    """A queue, by its name and its schema."""

    @property
    def name(self) -> str:
        """The queue's name."""

    @property
    def schema(self) -> str | None:
        """The schema of the queue's tables."""


def task_id(queue: AnyQueue, task: Task | int | None, what: str = "task") -> int:
    """Return the id of a task; `InvalidTask` if it isn't a task in the queue's schema, or an id.

    `what` is its name in the message.
    """
    if not isinstance(task, Task):
        return integer("a task's id", task, _LOWEST_ID, _HIGHEST_ID)
    if inspect(task).mapper.local_table is not task_class(queue.schema).__table__:
        raise InvalidTask(f"{what} must be in the schema of {queue!r}, got {task!r}")
    if task.id is None:
        raise InvalidTask(f"{what} must have an id, got {task!r}: flush the session that it was added to")
    return task.id
