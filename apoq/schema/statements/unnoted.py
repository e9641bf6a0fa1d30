"""Finds running tasks that are in no claim, such as after a restore of the task table alone."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Integer,
    Select,
    Text,
    bindparam,
    cast,
    func,
    or_,
    select,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP

from apoq.schema.models import tasks_table
from apoq.schema.statements.heartbeat import is_alive
from apoq.schema.statements.levels import level
from apoq.schema.statements.notes import is_noted
from apoq.schema.statements.states import has_running_state, is_open


@cache
def next_level(schema: str | None) -> Select[Any]:
    """Return the queue and level after `queue` and `level` that have pending or running tasks, if any.

    Queues are ordered by name, and the levels of a queue from the highest to the lowest.
    """
    tasks = tasks_table(schema)
    queue, last = bindparam("queue", type_=Text), bindparam("level", type_=Integer)
    found = select(tasks.c.queue, level(tasks).label("level")).where(is_open(tasks))
    lower = (
        found.where(tasks.c.queue == queue, level(tasks) < last)
        .order_by(level(tasks).desc())
        .limit(1)
        .subquery("lower")
    )
    following = (
        found.where(tasks.c.queue > queue)
        .order_by(tasks.c.queue, level(tasks).desc())
        .limit(1)
        .subquery("following")
    )
    either = union_all(select(*lower.c), select(*following.c)).subquery("either")
    return select(*either.c).limit(1)


@cache
def unnoted(schema: str | None) -> Select[Any]:
    """Read the next `at_most` pending or running tasks of a `queue` and `level`, behind a `time` and `id`.

    Returns a row for each task that is running, is in no claim, and belongs to no living worker, and a row
    for the last task that was read. The columns are its id, its token, its time, the number of tasks that
    were read until then, and whether it is one of the former tasks. Times are text in the session's format.
    """
    tasks = tasks_table(schema)
    time = cast(bindparam("time", type_=Text), TIMESTAMP(timezone=True))
    walk = (
        select(
            tasks.c.id,
            tasks.c.claim_token.label("token"),
            tasks.c.process_at,
            tasks.c.worker_id,
            has_running_state(tasks).label("is_running"),
            func.row_number().over(order_by=(tasks.c.process_at, tasks.c.id)).label("number"),
        )
        .where(
            is_open(tasks),
            tasks.c.queue == bindparam("queue", type_=Text),
            level(tasks) == bindparam("level", type_=Integer),
            tuple_(tasks.c.process_at, tasks.c.id) > tuple_(time, bindparam("id", type_=BigInteger)),
        )
        .order_by(tasks.c.process_at, tasks.c.id)
        .limit(bindparam("at_most", type_=Integer))
        .cte("walk")
    )
    # In this order: most running tasks belong to a living worker, and to look for a task reads all claims.
    is_unnoted = (
        walk.c.is_running & ~is_alive(schema, walk.c.worker_id) & ~is_noted(schema, walk.c.id)
    ).label("is_unnoted")
    last = select(func.max(walk.c.number)).scalar_subquery()
    return (
        select(
            walk.c.id, walk.c.token, cast(walk.c.process_at, Text).label("time"), walk.c.number, is_unnoted
        )
        .where(or_(is_unnoted, walk.c.number == last))
        .order_by(walk.c.number)
    )
