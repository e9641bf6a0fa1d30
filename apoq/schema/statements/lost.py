"""Finds tasks that a worker no longer owns."""

from __future__ import annotations

from functools import cache

from sqlalchemy import Select, func, select

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.settle import held_as


@cache
def lost(schema: str | None) -> Select[tuple[int, int]]:
    """Return the tasks of `ids`, claimed with `tokens`, that the worker no longer owns.

    They were cancelled or deleted, or another worker that considered this one dead has rescued them.
    """
    tasks = tasks_table(schema)
    held = func.unnest(bigints("ids"), bigints("tokens")).table_valued("id", "token").render_derived("held")
    is_ours = held_as(schema, held.c.id, held.c.token)
    return (
        select(held.c.id, held.c.token)
        .select_from(held.outerjoin(tasks, is_ours))
        .where(tasks.c.id.is_(None))
    )
