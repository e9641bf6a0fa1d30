"""Look at the workers, for people to read."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import BigInteger, Select, bindparam, func, select

from apoq.schema.models import workers_table
from apoq.schema.statements.heartbeat import alive
from apoq.schema.statements.literals import seconds_between


@cache
def workers(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return up to `at_most` workers, those that were seen last first.

    With the seconds since they started (`up_for`) and were seen (`unseen_for`), and whether they are alive.
    """
    rows = workers_table(schema).alias("worker")
    since = {
        name: seconds_between(time, func.clock_timestamp()).label(name)
        for name, time in (("up_for", rows.c.started_at), ("unseen_for", rows.c.last_heartbeat_at))
    }
    return (
        select(*rows.c, *since.values(), alive(schema, rows.c.id).label("is_alive"))
        .order_by(rows.c.last_heartbeat_at.desc(), rows.c.id)
        .limit(bindparam("at_most", type_=BigInteger))
    )
