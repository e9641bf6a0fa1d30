"""Write down what a claim takes, and forget it when nothing of it is held any more."""

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

from apoq.schema.models import claims_table, tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.states import runs


def note(schema: str | None, taken: FromClause) -> Insert:
    """Write down the ids of what the claim `number` of the worker `by_worker` has `taken`, if any.

    Without a number, nothing: for a claim and what becomes of it in one transaction.
    """
    by_worker, number = bindparam("by_worker", type_=Uuid), bindparam("number", None, type_=BigInteger)
    ids = func.array_agg(taken.c.id)
    row = select(by_worker, number, ids).having(ids.is_not(None), number.is_not(None))
    return insert(claims_table(schema)).from_select(["worker_id", "number", "task_ids"], row)


def noted(schema: str | None, tasks: FromClause, by: ColumnElement[bool]) -> ColumnElement[bool]:
    """Pick the tasks that these claims have written down."""
    ids = select(func.unnest(claims_table(schema).c.task_ids)).where(by)
    return tasks.c.id == any_(func.array(ids.scalar_subquery()))


def is_noted(schema: str | None, task_id: ColumnElement[int]) -> ColumnElement[bool]:
    """Return whether any claim has written down this task."""
    ids = select(func.unnest(claims_table(schema).c.task_ids).label("id")).subquery("noted")
    return exists().where(ids.c.id == task_id)


@cache
def forget_settled(schema: str | None) -> Delete:
    """Delete the notes `done` of the worker `by_worker`: it has settled all that they name."""
    claims = claims_table(schema)
    return delete(claims).where(
        claims.c.worker_id == bindparam("by_worker", type_=Uuid),
        claims.c.number == any_(bigints("done")),
    )


def forget_claims(schema: str | None, of: ColumnElement[bool], *of_tasks: ColumnElement[bool]) -> Delete:
    """Delete notes, but for those that name a task, or one `of_tasks`, that still runs under their worker."""
    claims, tasks = claims_table(schema), tasks_table(schema)
    holds = exists().where(
        tasks.c.id == any_(claims.c.task_ids),
        tasks.c.worker_id == claims.c.worker_id,
        runs(tasks),
        *of_tasks,
    )
    return delete(claims).where(of, ~holds)
