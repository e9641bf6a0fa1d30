"""Find out which tasks a worker has lost."""

from __future__ import annotations

from functools import cache

from sqlalchemy import Select, func, select

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.settle import held_as


@cache
def lost(schema: str | None) -> Select[tuple[int, int]]:
    """Answer which of the tasks `ids`, claimed under `tokens`, are held under them no more.

    They were cancelled, or deleted, or taken by another worker that took this one for dead.
    """
    tasks = tasks_table(schema)
    held = func.unnest(bigints("ids"), bigints("tokens")).table_valued("id", "token").render_derived("held")
    is_ours = held_as(schema, held.c.id, held.c.token)
    return (
        select(held.c.id, held.c.token)
        .select_from(held.outerjoin(tasks, is_ours))
        .where(tasks.c.id.is_(None))
    )
