"""Find running tasks that no claim has noted, as after a restore of the task table alone."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Integer,
    Select,
    SmallInteger,
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
from apoq.schema.statements.heartbeat import alive
from apoq.schema.statements.notes import is_noted
from apoq.schema.statements.states import is_open, runs


@cache
def next_level(schema: str | None) -> Select[Any]:
    """Return the queue and priority that follow `queue` and `priority`, of tasks that have not ended, if any.

    In the order of the queues' names, and in each from the highest priority to the lowest.
    """
    tasks = tasks_table(schema)
    queue, priority = bindparam("queue", type_=Text), bindparam("priority", type_=SmallInteger)
    found = select(tasks.c.queue, tasks.c.priority).where(is_open(tasks))
    lower = (
        found.where(tasks.c.queue == queue, tasks.c.priority < priority)
        .order_by(tasks.c.priority.desc())
        .limit(1)
        .subquery("lower")
    )
    following = (
        found.where(tasks.c.queue > queue)
        .order_by(tasks.c.queue, tasks.c.priority.desc())
        .limit(1)
        .subquery("following")
    )
    either = union_all(select(*lower.c), select(*following.c)).subquery("either")
    return select(*either.c).limit(1)


@cache
def unnoted(schema: str | None) -> Select[Any]:
    """Walk through `at_most` tasks of a `queue` and `priority` that have not ended, behind a `time` and `id`.

    Returns a row for each that is running, was noted by no claim, and belongs to no worker that is alive, and
    one for the last task of the walk: its id, its token, its time, how many tasks there were until then, and
    whether it is one of the former. Times are text, as the session writes them.
    """
    tasks = tasks_table(schema)
    time = cast(bindparam("time", type_=Text), TIMESTAMP(timezone=True))
    walk = (
        select(
            tasks.c.id,
            tasks.c.claim_token.label("token"),
            tasks.c.process_at,
            tasks.c.worker_id,
            runs(tasks).label("is_running"),
            func.row_number().over(order_by=(tasks.c.process_at, tasks.c.id)).label("number"),
        )
        .where(
            is_open(tasks),
            tasks.c.queue == bindparam("queue", type_=Text),
            tasks.c.priority == bindparam("priority", type_=SmallInteger),
            tuple_(tasks.c.process_at, tasks.c.id) > tuple_(time, bindparam("id", type_=BigInteger)),
        )
        .order_by(tasks.c.process_at, tasks.c.id)
        .limit(bindparam("at_most", type_=Integer))
        .cte("walk")
    )
    is_unnoted = (walk.c.is_running & ~is_noted(schema, walk.c.id) & ~alive(schema, walk.c.worker_id)).label(
        "is_unnoted"
    )
    last = select(func.max(walk.c.number)).scalar_subquery()
    return (
        select(
            walk.c.id, walk.c.token, cast(walk.c.process_at, Text).label("time"), walk.c.number, is_unnoted
        )
        .where(or_(is_unnoted, walk.c.number == last))
        .order_by(walk.c.number)
    )
