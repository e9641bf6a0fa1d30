"""Deletes tasks that ended long ago, a bounded number at a time."""

from __future__ import annotations

from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    CTE,
    TIMESTAMP,
    ColumnElement,
    Delete,
    Select,
    Table,
    Text,
    and_,
    any_,
    bindparam,
    delete,
    exists,
    func,
    literal_column,
    or_,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.types import Integer

from apoq.core.states import CANCELLED, COMPLETED, FAILED, WAITING
from apoq.schema.models import tasks_table
from apoq.schema.statements.states import is_in
from apoq.schema.tables import limits_table, links_table, progress_table


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
def prune_completed_before(schema: str | None) -> Delete:
    """Delete as `prune_completed` does, but tasks that completed before the time `before`."""
    return _prune(schema, _old_completed(schema, _BEFORE))


@cache
def prune_failed_before(schema: str | None) -> Delete:
    """Delete as `prune_failed` does, but tasks that failed, or were cancelled, before the time `before`."""
    return _prune(schema, _old_failed(schema, _BEFORE))


@cache
def oldest_kept_completed(schema: str | None) -> Select[Any]:
    """Return when the last of the `number` newest completed tasks of `from_queue` completed.

    No row if there are fewer.
    """
    return _last_of_newest(_completed(schema))


@cache
def oldest_kept_failed(schema: str | None) -> Select[Any]:
    """Return the same of failed and cancelled tasks."""
    return _last_of_newest(_failed(schema))


@cache
def count_prunable_completed(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return how many tasks `prune_completed` would delete; `at_most` at most."""
    return _count(_old_completed(schema))


@cache
def count_prunable_failed(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return how many tasks `prune_failed` would delete; `at_most` at most."""
    return _count(_old_failed(schema))


_QUEUE: Final = bindparam("from_queue", type_=Text)
_KEPT: Final = func.now() - bindparam("keep", type_=INTERVAL)
_BEFORE: Final = bindparam("before", type_=TIMESTAMP(timezone=True))


class _Ended(NamedTuple):
    """Ended tasks, and when they ended: as an index has them."""

    tasks: Table
    are: ColumnElement[bool]
    at: ColumnElement[Any]


def _completed(schema: str | None) -> _Ended:
    tasks = tasks_table(schema)
    return _Ended(tasks, is_in(tasks, COMPLETED), tasks.c.completed_at)


def _failed(schema: str | None) -> _Ended:
    tasks = tasks_table(schema)
    # The Node.js original doesn't record when a task failed, but it was due at about that time.
    ended_at = func.coalesce(tasks.c.cancelled_at, tasks.c.failed_at, tasks.c.process_at)
    return _Ended(tasks, is_in(tasks, FAILED, CANCELLED), ended_at)


def _old_completed(schema: str | None, before: ColumnElement[Any] = _KEPT) -> Select[*tuple[Any, ...]]:
    return _old(_completed(schema), before)


def _old_failed(schema: str | None, before: ColumnElement[Any] = _KEPT) -> Select[*tuple[Any, ...]]:
    return _old(_failed(schema), before).where(~_holds_key(schema))


def _holds_key(schema: str | None) -> ColumnElement[bool]:
    """Return the condition that a failed task holds up the others of its key until it is retried."""
    tasks, limits = tasks_table(schema), limits_table(schema)
    holds = exists().where(limits.c.queue == tasks.c.queue, limits.c.type == tasks.c.type, limits.c.holds)
    return and_(tasks.c.key.is_not(None), is_in(tasks, FAILED), holds)


def _old(ended: _Ended, before: ColumnElement[Any]) -> Select[*tuple[Any, ...]]:
    return (
        select(ended.tasks.c.id)
        .where(
            ended.are,
            ended.tasks.c.queue == _QUEUE,
            ended.at < before,
            or_(ended.tasks.c.is_followed.is_not(true()), ~_is_waited_for(ended.tasks.schema)),
        )
        .order_by(ended.at)
        .limit(bindparam("at_most", type_=Integer))
    )


def _last_of_newest(ended: _Ended) -> Select[Any]:
    return (
        select(ended.at)
        .where(ended.are, ended.tasks.c.queue == _QUEUE)
        .order_by(ended.at.desc())
        .offset(bindparam("number", type_=Integer) - literal_column("1"))
        .limit(literal_column("1"))
    )


def _prune(schema: str | None, old: Select[*tuple[Any, ...]]) -> Delete:
    tasks = tasks_table(schema)
    # Several workers prune at the same time, and another session may be retrying one of these tasks.
    passed_over = bindparam("passed_over", 0, type_=Integer)
    its = old.add_columns(tasks.c.has_parts, tasks.c.is_followed)
    taken = its.offset(passed_over).with_for_update(of=tasks, skip_locked=True).cte("old")
    statement = delete(tasks).where(tasks.c.id == taken.c.id)
    return statement.add_cte(_delete_parts(schema, taken), *_delete_links(schema, taken))


def _delete_parts(schema: str | None, taken: CTE) -> CTE:
    """Delete the rows that other tables have of these tasks; not even look for them if there are none."""
    table = progress_table(schema)
    with_parts = select(taken.c.id).where(taken.c.has_parts)
    return delete(table).where(table.c.task_id == any_(func.array(with_parts.scalar_subquery()))).cte("parts")


def _delete_links(schema: str | None, taken: CTE) -> tuple[CTE, CTE]:
    """Delete the edges of these tasks to their parents, and to children that other programs have deleted.

    The other edges to their children stay, with their results, until these are deleted.
    """
    links, child = links_table(schema), tasks_table(schema).alias("child")
    with_parts = select(taken.c.id).where(taken.c.has_parts).scalar_subquery()
    gone = delete(links).where(links.c.child_id == any_(func.array(with_parts))).cte("gone")
    followed = select(taken.c.id).where(taken.c.is_followed).scalar_subquery()
    is_lost = select(child.c.id).where(child.c.id == links.c.child_id).scalar_subquery().is_(None)
    lost = delete(links).where(links.c.parent_id == any_(func.array(followed)), is_lost).cte("lost")
    return gone, lost


def _is_waited_for(schema: str | None) -> ColumnElement[bool]:
    tasks, links, child = tasks_table(schema), links_table(schema), tasks_table(schema).alias("child")
    # Not EXISTS, for which the planner may read all edges.
    found = (
        select(true())
        .where(
            links.c.parent_id == tasks.c.id,
            ~links.c.is_counted,
            child.c.id == links.c.child_id,
            child.c.state == literal_column(f"'{WAITING}'", Text),
        )
        .correlate(tasks)
        .limit(1)
    )
    return found.scalar_subquery().is_not(None)


def _count(old: Select[*tuple[Any, ...]]) -> Select[*tuple[Any, ...]]:
    return select(func.count()).select_from(old.subquery("old"))
