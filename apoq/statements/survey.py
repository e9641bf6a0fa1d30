"""Look over what is pending, without touching it."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import CTE, Double, Select, Text, any_, bindparam, func, select, true
from sqlalchemy.dialects.postgresql import ARRAY

from apoq.model import tasks_table
from apoq.statements.states import is_pending


def pending_priorities(schema: str | None) -> CTE:
    """Find the priorities that pending tasks of the queue have, the highest first.

    A loose index scan: one look into the index for each priority, however many tasks have it.
    https://wiki.postgresql.org/wiki/Loose_indexscan
    """
    tasks = tasks_table(schema)
    pending = tasks.c.queue == bindparam("from_queue", type_=Text), is_pending(tasks)
    highest = select(tasks.c.priority).where(*pending).order_by(tasks.c.priority.desc()).limit(1)
    found = select(highest.scalar_subquery().label("priority")).cte("priorities", recursive=True)
    lower = highest.where(tasks.c.priority < found.c.priority).scalar_subquery()
    return found.union_all(select(lower).where(found.c.priority.is_not(None)))


@cache
def survey(schema: str | None) -> Select[Any]:
    """Answer the priorities of the pending tasks of `from_queue`, and the first task `of_types` in each.

    For each priority, and in the end for none (null): the first task's `process_at` and id (null: there is
    none of these types), now by the database's clock, and whether that task was taken from a dead worker;
    times in seconds since 1970. Each is found from the beginning of the index, past all that is dead or of
    other types.
    """
    tasks = tasks_table(schema)
    priorities = pending_priorities(schema)
    first = (
        select(tasks.c.process_at, tasks.c.id, (tasks.c.rescue_count > 0).label("is_rescued"))
        .where(
            tasks.c.queue == bindparam("from_queue", type_=Text),
            is_pending(tasks),
            tasks.c.priority == priorities.c.priority,
            tasks.c.type == any_(bindparam("of_types", type_=ARRAY(Text))),
        )
        .order_by(tasks.c.process_at, tasks.c.id)
        .limit(1)
        .lateral("first")
    )
    return select(
        priorities.c.priority,
        func.date_part("epoch", first.c.process_at, type_=Double).label("process_at"),
        first.c.id,
        func.date_part("epoch", func.clock_timestamp(), type_=Double).label("now"),
        first.c.is_rescued,
    ).select_from(priorities.outerjoin(first, true()))
