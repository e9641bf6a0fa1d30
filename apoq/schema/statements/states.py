"""Conditions on the state of a task, written so that the planner uses the right index.

No index contains the state itself; see `Task`.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, FromClause, Text, and_, func, literal_column, or_

from apoq.schema.statements.literals import PENDING, RUNNING


def is_pending(tasks: FromClause) -> ColumnElement[bool]:
    """Return the condition that a task is pending."""
    return and_(is_open(tasks), tasks.c.state == PENDING)


def is_open(tasks: FromClause) -> ColumnElement[bool]:
    """Return the condition that a task is pending or running: those are in the index that a claim reads."""
    return tasks.c.indexed_state.is_(None)


def has_running_state(tasks: FromClause) -> ColumnElement[bool]:
    """Return the condition that a task, which is selected by its id, is running.

    To select running tasks without ids, use `is_running`, which reads the log of claims. Coalesce prevents
    the planner from using an index of running tasks, if a user has created one: it seems small, but has a
    dead entry for each task that was settled since the last vacuum.
    """
    return func.coalesce(tasks.c.state, literal_column("''", Text)) == RUNNING


def is_in(tasks: FromClause, *states: str) -> ColumnElement[bool]:
    """Return the condition that a task is in one of these states; not for pending or running tasks.

    No index can tell pending tasks from running ones.
    """
    return or_(*(tasks.c.indexed_state == literal_column(f"'{state}'", Text) for state in states))
