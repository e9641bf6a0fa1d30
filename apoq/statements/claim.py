"""Take due tasks, so that nobody else does."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    CTE,
    Select,
    Text,
    Uuid,
    any_,
    bindparam,
    extract,
    func,
    literal_column,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql.dml import ReturningUpdate
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import BigInteger

from apoq.model import tasks_table
from apoq.states import PENDING, RUNNING

_QUEUE = bindparam("from_queue", type_=Text)
_TYPES = bindparam("of_types", type_=ARRAY(Text))

# Literals, not parameters: only then can the planner be sure that a partial index serves.
_PENDING: ColumnElement[str] = literal_column(f"'{PENDING}'", Text)
_RUNNING: ColumnElement[str] = literal_column(f"'{RUNNING}'", Text)


def _priorities(schema: str | None) -> CTE:
    """Find the priorities that pending tasks of the queue have, the highest first.

    A loose index scan: one look into the index for each priority, however many tasks have it.
    https://wiki.postgresql.org/wiki/Loose_indexscan
    """
    tasks = tasks_table(schema)
    pending = tasks.c.queue == _QUEUE, tasks.c.state == _PENDING
    highest = select(tasks.c.priority).where(*pending).order_by(tasks.c.priority.desc()).limit(1)
    found = select(highest.scalar_subquery().label("priority")).cte("priorities", recursive=True)
    lower = highest.where(tasks.c.priority < found.c.priority).scalar_subquery()
    return found.union_all(select(lower).where(found.c.priority.is_not(None)))


@cache
def claim(schema: str | None) -> ReturningUpdate[Any]:
    """Mark up to `at_most` due tasks of `from_queue` and `of_types` as running, and answer them in no order.

    The attempt is counted here, and not when it ends: one that kills its worker counts as well.
    """
    tasks = tasks_table(schema)
    priorities = _priorities(schema)
    limit = bindparam("at_most", type_=BigInteger)
    # One index scan for each priority: future tasks of a higher priority are not walked through to find
    # due ones of a lower. The outer limit ends the scans early, so no row is locked without being taken.
    due = (
        select(tasks.c.id)
        .where(
            tasks.c.queue == _QUEUE,
            tasks.c.state == _PENDING,
            tasks.c.priority == priorities.c.priority,
            tasks.c.process_at <= func.now(),
            tasks.c.type == any_(_TYPES),
        )
        .order_by(tasks.c.process_at, tasks.c.id)
        .limit(limit)
        # Others claim at the same time: what they hold is passed over, not waited for.
        .with_for_update(skip_locked=True)
        .lateral("due")
    )
    picked = select(due.c.id).select_from(priorities.join(due, true())).limit(limit).cte("picked")
    return (
        update(tasks)
        .where(tasks.c.id == picked.c.id)
        .values(
            state=_RUNNING,
            token=tasks.c.token + 1,
            attempt=tasks.c.attempt + 1,
            worker_id=bindparam("by_worker", type_=Uuid),
            claimed_at=func.now(),
        )
        .returning(
            tasks.c.id,
            tasks.c.type,
            tasks.c.data,
            tasks.c.priority,
            tasks.c.created_at,
            tasks.c.process_at,
            tasks.c.attempt,
            tasks.c.fail_count,
            tasks.c.token,
            tasks.c.retry_limit,
            tasks.c.retry_delay,
        )
    )


@cache
def next_due(schema: str | None) -> Select[Any]:
    """Answer in how many seconds the next pending task of `from_queue` is due; null where there is none."""
    tasks = tasks_table(schema)
    priorities = _priorities(schema)
    first = (
        select(tasks.c.process_at)
        .where(
            tasks.c.queue == _QUEUE,
            tasks.c.state == _PENDING,
            tasks.c.priority == priorities.c.priority,
            # What is due already waits for a worker of its type: it is no reason to wake up.
            tasks.c.process_at > func.now(),
            tasks.c.process_at < literal_column("'infinity'::timestamptz"),
        )
        .order_by(tasks.c.process_at)
        .limit(1)
        .lateral("first")
    )
    return select(extract("epoch", func.min(first.c.process_at) - func.clock_timestamp())).select_from(
        priorities.join(first, true())
    )
