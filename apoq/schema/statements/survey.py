"""Reads the first pending task of each level, without locking it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Double,
    FromClause,
    Integer,
    Select,
    all_,
    any_,
    bindparam,
    cast,
    false,
    func,
    null,
    select,
    true,
)

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.levels import level
from apoq.schema.statements.limits import limited
from apoq.schema.statements.literals import EPOCH, ZERO
from apoq.schema.statements.pauses import next_resumes
from apoq.schema.statements.queues import given_names, given_queues
from apoq.schema.statements.states import is_pending


class First(NamedTuple):
    """The first pending task of a level."""

    level: int
    process_at: float
    """In seconds since 1970."""
    id: int
    is_rescued: bool


def pending_levels(schema: str | None, queue: ColumnElement[str]) -> CTE:
    """Return the levels of a queue's pending tasks, the highest first, and a NULL at the end.

    This is a loose index scan: one index lookup per level, no matter how many tasks have it.
    https://wiki.postgresql.org/wiki/Loose_indexscan
    """
    tasks = tasks_table(schema)
    highest = (
        select(level(tasks))
        .where(tasks.c.queue == queue, is_pending(tasks))
        .order_by(level(tasks).desc())
        .limit(1)
        .correlate_except(tasks)
    )
    found = select(highest.scalar_subquery().label("level")).cte("levels", recursive=True, nesting=True)
    lower = highest.where(level(tasks) < found.c.level).scalar_subquery()
    return found.union_all(select(lower).where(found.c.level.is_not(None)))


@cache
def survey(schema: str | None, *, known: bool = False, passes_over: bool = False) -> Select[Any]:
    """Return the first pending task of the given `queues` in each level, the highest first.

    Paused queues are left out, and paused types. Instead, there is a row without a level that has the time
    at which the first of a queue's pauses ends by itself, if one does. For a queue that has a limit, or has
    types with one, there is a row without a level and without a time.

    The rows of a queue are together: up to `at_most` for each, with the current time by the database's clock,
    the queue, the level, the task's `process_at` and id, and whether the task was rescued from a dead
    worker. If there are no tasks at all, there is one row with only the time. Times are in seconds since
    1970. Each task is found by a scan from the beginning of the index, past dead entries and tasks of other
    types.

    `known`: read only the given `levels`. `passes_over`: skip the tasks `passed_over`.
    """
    tasks = tasks_table(schema)
    queues = given_queues(schema)
    levels: FromClause = pending_levels(schema, queues.c.queue)
    if known:
        levels = func.unnest(queues.c.levels).table_valued("level").render_derived("levels")
    conditions = [
        tasks.c.queue == queues.c.queue,
        is_pending(tasks),
        level(tasks) == levels.c.level,
        tasks.c.type == any_(queues.c.types),
    ]
    if passes_over:
        conditions.append(tasks.c.id != all_(bigints("passed_over")))
    first = (
        select(tasks.c.process_at, tasks.c.id, (tasks.c.rescue_count > ZERO).label("is_rescued"))
        .where(*conditions)
        .order_by(tasks.c.process_at, tasks.c.id)
        .limit(1)
        .correlate(queues, levels)
        .lateral("first")
    )
    # The rows are in the right order without sorting, because both kinds of `levels` have the highest
    # first.
    of_queue = (
        select(
            levels.c.level,
            func.date_part(EPOCH, first.c.process_at, type_=Double).label("process_at"),
            first.c.id,
            first.c.is_rescued,
        )
        .select_from(levels.join(first, true()))
        .limit(bindparam("at_most", type_=Integer))
        .correlate(queues)
        .lateral("of_queue")
    )
    pending = select(queues.c.queue, *of_queue.c).select_from(queues.join(of_queue, true()))
    found = pending.union_all(_resumes(schema), _limited(schema)).subquery("found")
    now = select(func.date_part(EPOCH, func.clock_timestamp(), type_=Double).label("now")).subquery("clock")
    columns = found.c.queue, found.c.level, found.c.process_at, found.c.id, found.c.is_rescued
    return select(now.c.now, *columns).select_from(now.outerjoin(found, true()))


def _resumes(schema: str | None) -> Select[Any]:
    ends = next_resumes(schema, given_names()).subquery("resumes")
    return select(ends.c.queue, cast(null(), Integer), ends.c.ends_at, cast(null(), BigInteger), false())


def _limited(schema: str | None) -> Select[Any]:
    its = limited(schema).subquery("limited")
    names = given_names()
    return select(
        its.c.queue, cast(null(), Integer), cast(null(), Double), cast(null(), BigInteger), false()
    ).where(its.c.queue.in_(select(names.c.queue)))


class Survey(NamedTuple):
    """The result of `survey`."""

    now: float
    """The current time."""
    firsts: dict[str, list[First]]
    """The first tasks of each queue that has any."""
    resumes: dict[str, float]
    """When the first pause of a queue ends."""
    limited: set[str]
    """The queues that have a limit, or types with one."""


def surveyed(rows: Iterable[Any]) -> Survey:
    """Return the result of `survey` from its rows."""
    now = 0.0
    found: dict[str, list[First]] = {}
    resumes: dict[str, float] = {}
    limited_queues: set[str] = set()
    for now, queue, *first in rows:  # noqa: B007 - it is the same in all rows
        if queue is None:
            continue
        level, at, *_ = first
        if level is not None:
            found.setdefault(queue, []).append(First(*first))
        elif at is not None:
            resumes[queue] = at
        else:
            limited_queues.add(queue)
    return Survey(now, found, resumes, limited_queues)
