"""Takes the unique keys of tasks that are pending again, as far as they are free."""

from __future__ import annotations

from functools import cache

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Update,
    any_,
    exists,
    func,
    select,
    update,
)

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.states import is_pending


def lacks_key(tasks: FromClause) -> ColumnElement[bool]:
    """Return the condition that a task has a unique key, but doesn't hold it."""
    return (tasks.c.unique_key.is_not(None) & tasks.c.held_unique_key.is_(None)).label("lacks_key")


@cache
def take_keys(schema: str | None) -> Update:
    """Let the pending tasks of `ids` hold their unique keys, if no other tasks hold them.

    If another transaction takes one of the keys at the same moment, it waits for that, up to the connection's
    `lock_timeout`, and fails.
    """
    tasks = tasks_table(schema)
    waiting, holder = tasks.alias("waiting"), tasks.alias("holder")
    is_held = exists().where(
        holder.c.queue == waiting.c.queue, holder.c.held_unique_key == waiting.c.unique_key
    )
    # One task for each key.
    free = (
        select(func.min(waiting.c.id))
        .where(waiting.c.id == any_(bigints("ids")), is_pending(waiting), lacks_key(waiting), ~is_held)
        .group_by(waiting.c.queue, waiting.c.unique_key)
        .scalar_subquery()
    )
    return (
        update(tasks)
        .where(
            tasks.c.id == any_(func.array(free)),
            is_pending(tasks),  # one that was claimed meanwhile must not take it
            lacks_key(tasks),
        )
        .values(held_unique_key=tasks.c.unique_key)
    )
