"""The log of claims: a claim records its tasks, and is deleted once the worker holds none of them."""

from __future__ import annotations

from functools import cache

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Delete,
    FromClause,
    Insert,
    Uuid,
    any_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
)

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.states import has_running_state
from apoq.schema.tables import claims_table


def note(schema: str | None, taken: FromClause) -> Insert:
    """Record the ids of the tasks that claim `number` of the worker `by_worker` has `taken`, if any."""
    by_worker, number = bindparam("by_worker", type_=Uuid), bindparam("number", type_=BigInteger)
    ids = func.array_agg(taken.c.id)
    row = select(by_worker, number, ids).having(ids.is_not(None))
    return insert(claims_table(schema)).from_select(["worker_id", "number", "task_ids"], row)


@cache
def note_tasks(schema: str | None) -> Insert:
    """Record that claim `number` of the worker `by_worker` has taken the tasks `ids`."""
    return note_ids(schema)


def note_ids(schema: str | None) -> Insert:
    """Return `note_tasks` to be a part of a statement."""
    return insert(claims_table(schema)).values(
        worker_id=bindparam("by_worker", type_=Uuid),
        number=bindparam("number", type_=BigInteger),
        task_ids=bigints("ids"),
    )


def noted(schema: str | None, tasks: FromClause, by: ColumnElement[bool]) -> ColumnElement[bool]:
    """Return the condition that a task is in one of the claims selected `by` a condition."""
    ids = select(func.unnest(claims_table(schema).c.task_ids)).where(by)
    return tasks.c.id == any_(func.array(ids.scalar_subquery()))


def is_noted(schema: str | None, task_id: ColumnElement[int]) -> ColumnElement[bool]:
    """Return the condition that a task is in any claim."""
    ids = select(func.unnest(claims_table(schema).c.task_ids).label("id")).subquery("noted")
    return exists().where(ids.c.id == task_id)


@cache
def forget_settled(schema: str | None) -> Delete:
    """Delete the claims `done` of the worker `by_worker`, which has settled all of their tasks."""
    claims = claims_table(schema)
    return delete(claims).where(
        claims.c.worker_id == bindparam("by_worker", type_=Uuid),
        claims.c.number == any_(bigints("done")),
    )


def forget_claims(schema: str | None, of: ColumnElement[bool], *of_tasks: ColumnElement[bool]) -> Delete:
    """Delete claims, except those with a task (one selected by `of_tasks`) that their worker still holds."""
    claims, tasks = claims_table(schema), tasks_table(schema)
    holds = exists().where(
        tasks.c.id == any_(claims.c.task_ids),
        tasks.c.worker_id == claims.c.worker_id,
        has_running_state(tasks),
        *of_tasks,
    )
    return delete(claims).where(of, ~holds)
