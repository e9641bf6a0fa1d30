"""Reads the first pending task of each priority, without locking it."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    CTE,
    Double,
    FromClause,
    Integer,
    Select,
    SmallInteger,
    Text,
    all_,
    any_,
    bindparam,
    cast,
    func,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.states import is_pending


def pending_priorities(schema: str | None) -> CTE:
    """Return the priorities of the queue's pending tasks, the highest first, and a NULL at the end.

    This is a loose index scan: one index lookup per priority, no matter how many tasks have it.
    https://wiki.postgresql.org/wiki/Loose_indexscan
    """
    tasks = tasks_table(schema)
    pending = tasks.c.queue == bindparam("from_queue", type_=Text), is_pending(tasks)
    highest = select(tasks.c.priority).where(*pending).order_by(tasks.c.priority.desc()).limit(1)
    found = select(highest.scalar_subquery().label("priority")).cte("priorities", recursive=True)
    lower = highest.where(tasks.c.priority < found.c.priority).scalar_subquery()
    return found.union_all(select(lower).where(found.c.priority.is_not(None)))


@cache
def survey(schema: str | None, *, known: bool = False, passes_over: bool = False) -> Select[Any]:
    """Return the first pending task of `from_queue` and `of_types` in each priority, the highest first.

    There are up to `at_most` rows with the priority, the task's `process_at` and id, the current time by the
    database's clock, and whether the task was rescued from a dead worker. If there are no tasks, there is one
    row with only the time. Times are in seconds since 1970. Each task is found by a scan from the beginning
    of the index, past dead entries and tasks of other types.

    `known`: read only the given `priorities`. `passes_over`: skip the tasks `passed_over`.
    """
    tasks = tasks_table(schema)
    priorities: FromClause = pending_priorities(schema)
    if known:
        given = cast(bindparam("priorities", type_=Text), ARRAY(SmallInteger))
        priorities = func.unnest(given).table_valued("priority").render_derived("priorities")
    conditions = [
        tasks.c.queue == bindparam("from_queue", type_=Text),
        is_pending(tasks),
        tasks.c.priority == priorities.c.priority,
        tasks.c.type == any_(bindparam("of_types", type_=ARRAY(Text))),
    ]
    if passes_over:
        conditions.append(tasks.c.id != all_(bigints("passed_over")))
    first = (
        select(tasks.c.process_at, tasks.c.id, (tasks.c.rescue_count > 0).label("is_rescued"))
        .where(*conditions)
        .order_by(tasks.c.process_at, tasks.c.id)
        .limit(1)
        .lateral("first")
    )
    # The rows are in the right order without sorting, because both kinds of `priorities` have the highest
    # first.
    found = (
        select(
            priorities.c.priority,
            func.date_part("epoch", first.c.process_at, type_=Double).label("process_at"),
            first.c.id,
            first.c.is_rescued,
        )
        .select_from(priorities.join(first, true()))
        .limit(bindparam("at_most", type_=Integer))
        .subquery("found")
    )
    now = select(func.date_part("epoch", func.clock_timestamp(), type_=Double).label("now")).subquery("clock")
    columns = found.c.priority, found.c.process_at, found.c.id, now.c.now, found.c.is_rescued
    return select(*columns).select_from(now.outerjoin(found, true()))
