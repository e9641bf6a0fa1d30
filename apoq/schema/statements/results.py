"""Writes the results of tasks together with their completion, and reads them."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import Select, Text, Update, and_, bindparam, cast, select, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import BigInteger

from apoq.schema.models import tasks_table
from apoq.schema.statements.settle import (
    AS_COMPLETED,
    held,
    is_held_last,
    is_picked,
    rows_of,
    unless_followed,
)


@cache
def complete_with_results(schema: str | None, *, skips_locked: bool = False, linked: bool = False) -> Update:
    """Mark the tasks of `ids`, claimed with `tokens`, as completed with these `results`; see `complete`."""
    tasks = tasks_table(schema)
    rows = rows_of("completed", id=BigInteger, token=BigInteger, result=Text)
    condition = held(tasks, rows.c.id, rows.c.token)
    if skips_locked:
        condition = and_(condition, is_picked(schema, alike=False))
    completion = unless_followed(update(tasks).where(condition), schema, linked)
    return completion.values({**AS_COMPLETED, "result": cast(rows.c.result, JSONB)})


@cache
def complete_last_with_result(schema: str | None, *, linked: bool = False) -> Update:
    """Mark the task `task_id`, claimed with the token `held_under`, as completed with this `result`.

    The last statement of its transaction; see `complete_last`.
    """
    result = cast(bindparam("result", type_=Text), JSONB)
    completion = unless_followed(update(tasks_table(schema)).where(is_held_last(schema)), schema, linked)
    return completion.values({**AS_COMPLETED, "result": result})


@cache
def read_result(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the type, the state, the result and the error of the task `task_id` of `from_queue`.

    The result and the error as text, which every kind of connection returns alike. A result that is kept is
    not NULL, even if the processor has returned None.
    """
    tasks = tasks_table(schema)
    return select(
        tasks.c.type,
        tasks.c.state,
        cast(tasks.c.result, Text).label("result"),
        cast(tasks.c.error, Text).label("error"),
    ).where(
        tasks.c.id == bindparam("task_id", type_=BigInteger),
        tasks.c.queue == bindparam("from_queue", type_=Text),
    )
