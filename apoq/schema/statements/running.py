"""Selects running tasks for people to look at: those in the log of claims, and those that are missing there.

Every claim records its tasks. A running task can be in no claim after a partial restore, for example, or if
the table of claims was left out of a replication. No index has such tasks. They are found among the first
tasks that have not ended, in the order of claiming, because they were claimed before most others.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    CTE,
    ColumnElement,
    FromClause,
    Select,
    Subquery,
    Text,
    and_,
    any_,
    bindparam,
    func,
    or_,
    select,
    true,
    union_all,
)

from apoq.core import states
from apoq.schema.models import tasks_table
from apoq.schema.statements.levels import level
from apoq.schema.statements.literals import RUNNING
from apoq.schema.statements.states import has_running_state, is_in, is_open, is_pending
from apoq.schema.tables import claims_table

NOTED: Final = 100_000
"""Maximum number of ids in claims that are looked up."""

LOOKED_AT: Final = 1_000
"""Maximum number of tasks of a queue that are read to find those that are in no claim."""

LOOKED_AT_IN_ALL: Final = 100_000
"""The same maximum for all queues together."""

_QUEUE: Final = bindparam("in_queue", None, type_=Text)


def is_running(schema: str | None, tasks: FromClause) -> ColumnElement[bool]:
    """Return the condition that a task is running, for tasks that aren't selected by id.

    It uses the log of claims. A running task that is in no claim is found only in the queue `in_queue`, if
    that is given. For tasks that are selected by id, use `has_running_state`.
    """
    ids = union_all(_noted(schema).limit(NOTED).subquery().select(), _first_running(schema))
    return and_(tasks.c.id == any_(func.array(ids.scalar_subquery())), has_running_state(tasks))


def is_noted(schema: str | None, tasks: FromClause) -> ColumnElement[bool]:
    """Return the condition that a task is in any claim."""
    return func.coalesce(tasks.c.id.in_(_noted(schema)), False)


def in_state(schema: str | None, tasks: FromClause, state: str) -> ColumnElement[bool]:
    """Return the condition that a task is in a state."""
    if state == states.PENDING:
        return is_pending(tasks)
    if state == states.RUNNING:
        return is_running(schema, tasks)
    return is_in(tasks, state)


def open_queues(schema: str | None) -> CTE:
    """Return the queues that have pending or running tasks, and a NULL at the end.

    It takes one index lookup per queue, no matter how many tasks the queue has, as in `pending_levels`.
    """
    tasks = tasks_table(schema)
    first = select(tasks.c.queue).where(is_open(tasks)).order_by(tasks.c.queue).limit(1)
    found = select(first.scalar_subquery().label("queue")).cte("open_queues", recursive=True)
    following = first.where(tasks.c.queue > found.c.queue).scalar_subquery()
    return found.union_all(select(following).where(found.c.queue.is_not(None)))


def _noted(schema: str | None) -> Select[tuple[int]]:
    return select(func.unnest(claims_table(schema).c.task_ids))


def _first_running(schema: str | None) -> Select[tuple[int]]:
    looked_at = _first_open(schema)
    return select(looked_at.c.id).where(looked_at.c.state == RUNNING)


def _first_open(schema: str | None) -> Subquery:
    tasks, queues = tasks_table(schema), open_queues(schema)
    first = (
        select(tasks.c.id, tasks.c.state)
        .where(tasks.c.queue == queues.c.queue, is_open(tasks))
        .order_by(level(tasks).desc(), tasks.c.process_at, tasks.c.id)
        .limit(LOOKED_AT)
        .lateral("first")
    )
    return (
        select(first.c.id, first.c.state)
        .select_from(queues.join(first, true()))
        .where(or_(_QUEUE.is_(None), queues.c.queue == _QUEUE))
        .limit(LOOKED_AT_IN_ALL)
        .subquery("looked_at")
    )
