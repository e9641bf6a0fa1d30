"""Takes the unique keys of tasks that are pending again, as far as they are free."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Text,
    Update,
    any_,
    exists,
    func,
    literal_column,
    select,
    update,
)

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.states import is_pending

LOCK_TIMEOUT: Final = "50ms"
"""How long it waits for a caller who is adding a task with such a key."""


def lacks_key(tasks: FromClause) -> ColumnElement[bool]:
    """Return the condition that a task has a unique key, but doesn't hold it."""
    return (tasks.c.unique_key.is_not(None) & tasks.c.held_unique_key.is_(None)).label("lacks_key")


@cache
def take_keys(schema: str | None) -> Update:
    """Let the pending tasks of `ids` hold their unique keys, if no other tasks hold them.

    If another transaction takes one of the keys at the same moment, it fails, and takes none.
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
    within = func.set_config(_literal("lock_timeout"), _literal(LOCK_TIMEOUT), literal_column("true"))
    return (
        update(tasks)
        .where(
            tasks.c.id == any_(func.array(free)),
            is_pending(tasks),  # one that was claimed meanwhile must not take it
            lacks_key(tasks),
            select(within).scalar_subquery().is_not(None),
        )
        .values(held_unique_key=tasks.c.unique_key)
    )


def _literal(text: str) -> ColumnElement[Any]:
    return literal_column(f"'{text}'", Text)
