"""Deletes tasks that ended long ago, a bounded number at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    Delete,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    delete,
    exists,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.types import Integer

from apoq.core.states import CANCELLED, COMPLETED, FAILED
from apoq.schema.models import limits_table, progress_table, tasks_table
from apoq.schema.statements.states import is_in


@cache
def prune_completed(schema: str | None) -> Delete:
    """Delete up to `at_most` tasks of `from_queue` that completed longer than `keep` ago.

    It deletes the oldest ones, but skips the first `passed_over` of them (0 by default).
    """
    return _prune(schema, _old_completed(schema))


@cache
def prune_failed(schema: str | None) -> Delete:
    """Delete up to `at_most` tasks of `from_queue` that failed, or were cancelled, longer than `keep` ago."""
    return _prune(schema, _old_failed(schema))


@cache
def count_prunable_completed(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return how many tasks `prune_completed` would delete; `at_most` at most."""
    return _count(_old_completed(schema))


@cache
def count_prunable_failed(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return how many tasks `prune_failed` would delete; `at_most` at most."""
    return _count(_old_failed(schema))


def _old_completed(schema: str | None) -> Select[*tuple[Any, ...]]:
    tasks = tasks_table(schema)
    return _old(schema, is_in(tasks, COMPLETED), tasks.c.completed_at)


def _old_failed(schema: str | None) -> Select[*tuple[Any, ...]]:
    tasks = tasks_table(schema)
    # The Node.js original doesn't record when a task failed, but it was due at about that time.
    ended_at = func.coalesce(tasks.c.cancelled_at, tasks.c.failed_at, tasks.c.process_at)
    return _old(schema, is_in(tasks, FAILED, CANCELLED), ended_at).where(~_holds_key(schema))


def _holds_key(schema: str | None) -> ColumnElement[bool]:
    """Return the condition that a failed task holds up the others of its key until it is retried."""
    tasks, limits = tasks_table(schema), limits_table(schema)
    holds = exists().where(limits.c.queue == tasks.c.queue, limits.c.type == tasks.c.type, limits.c.holds)
    return and_(tasks.c.key.is_not(None), is_in(tasks, FAILED), holds)


def _old(
    schema: str | None, ended: ColumnElement[bool], ended_at: ColumnElement[object]
) -> Select[*tuple[Any, ...]]:
    tasks = tasks_table(schema)
    return (
        select(tasks.c.id)
        .where(
            ended,
            tasks.c.queue == bindparam("from_queue", type_=Text),
            ended_at < func.now() - bindparam("keep", type_=INTERVAL),
        )
        .order_by(ended_at)
        .limit(bindparam("at_most", type_=Integer))
    )


def _prune(schema: str | None, old: Select[*tuple[Any, ...]]) -> Delete:
    tasks = tasks_table(schema)
    # Several workers prune at the same time, and another session may be retrying one of these tasks.
    passed_over = bindparam("passed_over", 0, type_=Integer)
    its = old.add_columns(tasks.c.has_parts)
    taken = its.offset(passed_over).with_for_update(skip_locked=True).cte("old")
    return delete(tasks).where(tasks.c.id == taken.c.id).add_cte(_delete_parts(schema, taken))


def _delete_parts(schema: str | None, taken: CTE) -> CTE:
    """Delete the rows that other tables have of these tasks; not even look for them if there are none."""
    table = progress_table(schema)
    with_parts = select(taken.c.id).where(taken.c.has_parts)
    return delete(table).where(table.c.task_id == any_(func.array(with_parts.scalar_subquery()))).cte("parts")


def _count(old: Select[*tuple[Any, ...]]) -> Select[*tuple[Any, ...]]:
    return select(func.count()).select_from(old.subquery("old"))
