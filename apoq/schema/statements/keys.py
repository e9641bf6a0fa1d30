"""Reads which keys and pools are in use, for people to look at."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Integer,
    Select,
    Text,
    and_,
    bindparam,
    func,
    literal_column,
    select,
    union_all,
)
from sqlalchemy import true as always
from sqlalchemy.dialects.postgresql import ARRAY

from apoq.core.states import FAILED
from apoq.schema.models import tasks_table
from apoq.schema.statements.places import share_name, waits_for_place
from apoq.schema.tables import workers_table

COUNTED: Final = 1_000
"""Waiting tasks of a key are counted up to this number; one more means that there may be any number."""


@cache
def held_shares(schema: str | None) -> Select[Any]:
    """Return the keys and pools of which running tasks hold places, up to `at_most`, of `in_queue` if given.

    With the number of these tasks, the time since which the first of them runs, its id and its worker.
    """
    tasks, workers = tasks_table(schema), workers_table(schema)
    queue = bindparam("in_queue", type_=Text)
    found = []
    for kind, name in (("key", tasks.c.held_key), ("pool", tasks.c.held_pool_key)):
        first = func.array_agg(tasks.c.id).label("ids")
        found.append(
            select(
                tasks.c.queue,
                literal_column(f"'{kind}'", Text).label("kind"),
                name.label("name"),
                func.count().label("running"),
                func.min(tasks.c.claimed_at).label("since"),
                first,
            )
            .where(name.is_not(None), func.coalesce(queue, tasks.c.queue) == tasks.c.queue)
            .group_by(tasks.c.queue, name)
        )
    shares = union_all(*found).subquery("shares")
    first_task = tasks.alias("first_task")
    return (
        select(
            *shares.c,
            workers.c.host,
            workers.c.pid,
            func.clock_timestamp().label("now"),
        )
        .select_from(
            shares.outerjoin(first_task, first_task.c.id == shares.c.ids[1]).outerjoin(
                workers, workers.c.id == first_task.c.worker_id
            )
        )
        .order_by(shares.c.queue, shares.c.kind, shares.c.name)
        .limit(bindparam("at_most", type_=Integer))
    )


@cache
def count_blocked(schema: str | None) -> Select[Any]:
    """Count the tasks that wait for each of the `kinds` and `names` of `queue_names`, up to `COUNTED` + 1.

    With the time since which the first of these waits, by priority and time.
    """
    tasks = tasks_table(schema)
    given = (
        func.unnest(*(bindparam(name, type_=ARRAY(Text)) for name in ("queue_names", "kinds", "names")))
        .table_valued("queue", "kind", "name")
        .render_derived("given")
    )
    blocked = (
        select(tasks.c.waiting_since)
        .where(
            tasks.c.queue == given.c.queue,
            waits_for_place(tasks),
            tasks.c.waiting_for == given.c.kind,
            share_name(tasks) == given.c.name,
        )
        .limit(COUNTED + 1)
        .correlate(given)
        .subquery("blocked")
    )
    counted = select(
        func.count().label("waiting"), func.min(blocked.c.waiting_since).label("waiting_since")
    ).select_from(blocked)
    its = counted.correlate(given).lateral("its")
    return select(*given.c, *its.c, func.clock_timestamp().label("now")).select_from(
        given.join(its, always())
    )


@cache
def holders(schema: str | None) -> Select[Any]:
    """Return up to 5 running tasks that hold places of the `kind` and `name` of `from_queue`, and workers."""
    tasks, workers = tasks_table(schema), workers_table(schema)
    kind, name = bindparam("kind", type_=Text), bindparam("name", type_=Text)
    of_key = and_(kind == literal_column("'key'", Text), tasks.c.held_key == name)
    of_pool = and_(kind == literal_column("'pool'", Text), tasks.c.held_pool_key == name)
    found = [
        select(tasks.c.id, tasks.c.worker_id).where(
            tasks.c.queue == bindparam("from_queue", type_=Text), condition
        )
        for condition in (of_key, of_pool)
    ]
    held = union_all(*found).limit(5).subquery("held")
    return (
        select(held.c.id, workers.c.host, workers.c.pid)
        .select_from(held.outerjoin(workers, workers.c.id == held.c.worker_id))
        .order_by(held.c.id)
    )


@cache
def failed_of(schema: str | None) -> Select[tuple[int]]:
    """Return those of the tasks `ids` that have failed."""
    tasks = tasks_table(schema)
    return select(tasks.c.id).where(
        tasks.c.id == func.any(bindparam("ids", type_=ARRAY(BigInteger))), tasks.c.state == FAILED
    )
