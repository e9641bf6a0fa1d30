"""The levels of a queue: the priorities of its tasks, for tasks with and without concurrency keys apart.

Claims that give places to tasks with keys are transactions of several statements. Because these tasks have
levels of their own, other tasks are claimed as if there were none.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import ColumnElement, FromClause, Integer, cast, literal_column

_TWO: Final = literal_column("2", Integer)


def level(tasks: FromClause) -> ColumnElement[int]:
    """Return the level of a task, written as in the index of open tasks."""
    return tasks.c.priority * _TWO + cast(tasks.c.key.is_not(None), Integer)


def level_of(priority: int, *, is_keyed: bool) -> int:
    """Return the level of tasks of this priority, with or without concurrency keys."""
    return 2 * priority + is_keyed


def priority_of(level: int) -> int:
    """Return the priority of a level."""
    return level // 2


def is_keyed(level: int) -> bool:
    """Return whether the tasks of a level have concurrency keys."""
    return level % 2 == 1
