"""Pick the tasks of a state, in words by which the planner finds its index.

No index names the state itself: see `Task`.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import ColumnElement, FromClause, Text, and_, any_, func, literal_column, or_, select

from apoq import states
from apoq.model import claims_table
from apoq.statements.literals import PENDING, RUNNING

NOTED: Final = 100_000
"""Ids that are looked up, at most, to find what is running."""


def is_pending(tasks: FromClause) -> ColumnElement[bool]:
    """Pick pending tasks."""
    return and_(tasks.c.ended_as.is_(None), tasks.c.state == PENDING)


def is_running(schema: str | None, tasks: FromClause) -> ColumnElement[bool]:
    """Pick running tasks: of those that claims took lately, what has not been settled."""
    claims = claims_table(schema)
    taken = select(func.unnest(claims.c.task_ids)).limit(NOTED)
    return and_(tasks.c.id == any_(func.array(taken.scalar_subquery())), runs(tasks))


def runs(tasks: FromClause) -> ColumnElement[bool]:
    """Pick what is running of tasks that are picked by their ids.

    By coalesce, lest the planner take an index of running tasks, if somebody has made one: it looks small,
    and holds a dead entry for each task that was settled since the last vacuum.
    """
    return func.coalesce(tasks.c.state, literal_column("''", Text)) == RUNNING


def ended_as(tasks: FromClause, *ends: str) -> ColumnElement[bool]:
    """Pick tasks that have ended in one of these states."""
    return or_(*(tasks.c.ended_as == literal_column(f"'{state}'", Text) for state in ends))


def in_state(schema: str | None, tasks: FromClause, state: str) -> ColumnElement[bool]:
    """Pick the tasks of a state."""
    if state == states.PENDING:
        return is_pending(tasks)
    if state == states.RUNNING:
        return is_running(schema, tasks)
    return ended_as(tasks, state)
