"""Reads what became of a task."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import BigInteger, Select, bindparam, select

from apoq.schema.models import tasks_table


@cache
def ended(schema: str | None) -> Select[Any]:
    """Return the task `task_id` without its data, if it was claimed last with the token `held_under`.

    It waits for a transaction that has locked the task, so that its commit or rollback is known.
    """
    tasks = tasks_table(schema)
    columns = [column for column in tasks.c if column.key != "data"]
    return (
        select(*columns)
        .where(
            tasks.c.id == bindparam("task_id", type_=BigInteger),
            tasks.c.claim_token == bindparam("held_under", type_=BigInteger),
        )
        .with_for_update(read=True)
    )
