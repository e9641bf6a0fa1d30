"""Pick running tasks, for people to read: those that claims have noted, and those that none has.

Every claim notes what it takes. A running task without a note is one of a partial restore, say, or of a table
that was left out of a replication, and no index knows it. It is found among the first of those that have not
ended, in the order in which they are claimed, because it was claimed before most of them.
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
from apoq.schema.models import claims_table, tasks_table
from apoq.schema.statements.literals import RUNNING
from apoq.schema.statements.states import is_in, is_open, is_pending, runs

NOTED: Final = 100_000
"""Ids in notes that are looked up, at most."""

LOOKED_AT: Final = 1_000
"""Tasks of a queue that are looked at, at most, to find those that no claim has noted."""

LOOKED_AT_IN_ALL: Final = 100_000
"""The same, of all queues."""

_QUEUE: Final = bindparam("in_queue", None, type_=Text)


def is_running(schema: str | None, tasks: FromClause) -> ColumnElement[bool]:
    """Pick running tasks; those without a note in the queue `in_queue` alone, if it is given."""
    ids = union_all(_noted(schema).limit(NOTED).subquery().select(), _first_running(schema))
    return and_(tasks.c.id == any_(func.array(ids.scalar_subquery())), runs(tasks))


def is_noted(schema: str | None, tasks: FromClause) -> ColumnElement[bool]:
    """Tell whether a claim has noted a task."""
    return func.coalesce(tasks.c.id.in_(_noted(schema)), False)


def in_state(schema: str | None, tasks: FromClause, state: str) -> ColumnElement[bool]:
    """Pick the tasks of a state."""
    if state == states.PENDING:
        return is_pending(tasks)
    if state == states.RUNNING:
        return is_running(schema, tasks)
    return is_in(tasks, state)


def open_queues(schema: str | None) -> CTE:
    """Find the queues that have tasks which have not ended; in the end a null.

    One look into the index for each queue, however many tasks it has, as in `pending_priorities`.
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
        .order_by(tasks.c.priority.desc(), tasks.c.process_at, tasks.c.id)
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
