"""Checks whether a worker holds tasks."""

from __future__ import annotations

from functools import cache

from sqlalchemy import Select, Uuid, any_, bindparam, exists, func, select

from apoq.schema.models import tasks_table
from apoq.schema.statements.states import has_running_state
from apoq.schema.tables import claims_table


@cache
def holds_tasks(schema: str | None) -> Select[tuple[bool]]:
    """Return whether the worker `by_worker` has claimed tasks that have not been settled yet."""
    tasks, claims = tasks_table(schema), claims_table(schema)
    ids = select(func.unnest(claims.c.task_ids)).where(
        claims.c.worker_id == bindparam("by_worker", type_=Uuid)
    )
    held = select(tasks.c.id).where(
        tasks.c.id == any_(func.array(ids.scalar_subquery())), has_running_state(tasks)
    )
    return select(exists(held).label("holds_tasks"))
