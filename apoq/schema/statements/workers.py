"""Reads the workers, for people to look at."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import BigInteger, Select, Text, bindparam, func, select

from apoq.schema.statements.heartbeat import is_alive
from apoq.schema.statements.literals import seconds_between
from apoq.schema.tables import workers_table


@cache
def workers(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return up to `at_most` workers, those with the latest heartbeat first.

    The additional columns are the seconds since the worker's start (`up_for`) and its last heartbeat
    (`unseen_for`), and whether it is alive.
    """
    rows = workers_table(schema).alias("worker")
    since = {
        name: seconds_between(time, func.clock_timestamp()).label(name)
        for name, time in (("up_for", rows.c.started_at), ("unseen_for", rows.c.last_heartbeat_at))
    }
    return (
        select(*rows.c, *since.values(), is_alive(schema, rows.c.id).label("is_alive"))
        .order_by(rows.c.last_heartbeat_at.desc(), rows.c.id)
        .limit(bindparam("at_most", type_=BigInteger))
    )


@cache
def workers_on(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return how many live workers are on the host `worker_host`."""
    rows = workers_table(schema).alias("worker")
    return select(func.count()).where(
        rows.c.host == bindparam("worker_host", type_=Text), is_alive(schema, rows.c.id)
    )
