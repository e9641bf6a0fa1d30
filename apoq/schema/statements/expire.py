"""Ends expired tasks that no worker claims."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Text, Update, any_, bindparam, cast, func, null, or_, select, update
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import Integer

from apoq.core.states import CANCELLED, WAITING
from apoq.schema.models import tasks_table
from apoq.schema.statements.clock import now
from apoq.schema.statements.states import is_in, is_pending


@cache
def expire(schema: str | None) -> Update:
    """Cancel up to `at_most` expired tasks of `in_queues` that have not started, with the error `reason`.

    It skips the first `passed_over` of them (0 by default). A worker that claims an expired task cancels it
    by itself. This is for those that are not claimed, because their queue is paused, for example.
    """
    tasks = tasks_table(schema)
    found = (
        select(tasks.c.id)
        .where(
            or_(is_pending(tasks), is_in(tasks, WAITING)),
            tasks.c.queue == any_(bindparam("in_queues", type_=ARRAY(Text))),
            is_expired(tasks),
        )
        .limit(bindparam("at_most", type_=Integer))
        .offset(bindparam("passed_over", 0, type_=Integer))
        .with_for_update(skip_locked=True)
        .cte("found")
    )
    return (
        update(tasks)
        .where(tasks.c.id == any_(func.array(select(found.c.id).scalar_subquery())))
        .values(
            state=CANCELLED,
            cancelled_at=now(),
            error=cast(bindparam("reason", type_=Text), JSONB),
            held_unique_key=null(),
            waiting_since=null(),
            waiting_for=null(),
        )
    )


def is_expired(tasks: Any) -> ColumnElement[bool]:
    """Return the condition that a task doesn't start any more."""
    expired: ColumnElement[bool] = tasks.c.expires_at <= now()
    return expired
