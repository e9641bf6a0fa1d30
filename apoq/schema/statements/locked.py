"""Finds tasks that another session has locked."""

from __future__ import annotations

from functools import cache

from sqlalchemy import Select, all_, any_, func, select

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints


@cache
def locked(schema: str | None) -> Select[tuple[int]]:
    """Return the tasks of `ids` that are locked, such as by a caller who cancels them and hasn't committed.

    The statement doesn't wait for locks. A task that doesn't exist isn't locked.
    """
    tasks = tasks_table(schema)
    free = tasks.alias("free")
    lockable = select(free.c.id).where(free.c.id == any_(bigints("ids"))).with_for_update(skip_locked=True)
    return select(tasks.c.id).where(
        tasks.c.id == any_(bigints("ids")), tasks.c.id != all_(func.array(lockable.scalar_subquery()))
    )
