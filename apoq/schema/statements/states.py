"""Pick the tasks of a state, in words by which the planner finds its index.

No index names the state itself: see `Task`.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, FromClause, Text, and_, func, literal_column, or_

from apoq.schema.statements.literals import PENDING, RUNNING


def is_pending(tasks: FromClause) -> ColumnElement[bool]:
    """Pick pending tasks."""
    return and_(is_open(tasks), tasks.c.state == PENDING)


def is_open(tasks: FromClause) -> ColumnElement[bool]:
    """Pick tasks that are pending or running: those in the index that a claim reads."""
    return tasks.c.indexed_state.is_(None)


def runs(tasks: FromClause) -> ColumnElement[bool]:
    """Pick what is running of tasks that are picked by their ids.

    By coalesce, lest the planner take an index of running tasks, if somebody has made one: it looks small,
    and holds a dead entry for each task that was settled since the last vacuum.
    """
    return func.coalesce(tasks.c.state, literal_column("''", Text)) == RUNNING


def is_in(tasks: FromClause, *states: str) -> ColumnElement[bool]:
    """Pick tasks that are in one of these states; neither pending nor running ones, which no index names."""
    return or_(*(tasks.c.indexed_state == literal_column(f"'{state}'", Text) for state in states))
