"""Take back what dead workers held."""

from __future__ import annotations

from functools import cache

from sqlalchemy import Text, Update, Uuid, all_, bindparam, cast, func, literal_column, select, update
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import BigInteger, Integer

from apoq.model import tasks_table
from apoq.statements.heartbeat import alive
from apoq.states import PENDING, RUNNING


@cache
def rescue(schema: str | None) -> Update:
    """Make running tasks that no live worker holds pending again, as one more failure; `at_most` so many.

    Asked in this way round, a worker whose row is gone counts as dead too. Whether a task has attempts
    left is decided by the worker that claims it next, which knows its type's limit.
    """
    tasks = tasks_table(schema)
    held = tasks.alias("held")
    orphans = (
        select(held.c.id)
        .where(held.c.state == literal_column(f"'{RUNNING}'", Text), ~alive(schema, held.c.worker_id))
        .order_by(held.c.id)
        .limit(bindparam("at_most", type_=Integer))
        # Other workers sweep too, and a settle may be under way.
        .with_for_update(skip_locked=True)
        .cte("orphans")
    )
    return (
        update(tasks)
        .where(tasks.c.id == orphans.c.id)
        .values(
            state=literal_column(f"'{PENDING}'", Text),
            fail_count=tasks.c.fail_count + 1,
            failed_at=func.clock_timestamp(),
            error=cast(bindparam("reason", type_=Text), JSONB),
        )
    )


@cache
def give_back(schema: str | None) -> Update:
    """Make tasks pending again that a live worker claimed without learning of it: all of its but `held`."""
    tasks = tasks_table(schema)
    return (
        update(tasks)
        .where(
            tasks.c.state == literal_column(f"'{RUNNING}'", Text),
            tasks.c.worker_id == bindparam("by_worker", type_=Uuid),
            tasks.c.id != all_(bindparam("held", type_=ARRAY(BigInteger))),
        )
        .values(state=literal_column(f"'{PENDING}'", Text), attempt=tasks.c.attempt - 1)
    )
