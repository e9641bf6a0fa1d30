"""Pauses: queues, or types of their tasks, from which no claim takes tasks."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    FromClause,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    case,
    delete,
    false,
    func,
    literal_column,
    or_,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, TIMESTAMP, Insert, insert
from sqlalchemy.sql.dml import ReturningDelete

from apoq.schema.statements.limits import limited
from apoq.schema.statements.literals import EPOCH
from apoq.schema.tables import pauses_table

ALL_TYPES: Final = ""
"""Instead of a type: the whole queue is paused."""


@cache
def pause(schema: str | None) -> Insert:
    """Pause the type `paused_type` of `from_queue`; if it is paused already, change the reason and the end.

    The pause ends at `until`, or after `length`, or, if both are NULL, never.
    """
    pauses = pauses_table(schema)
    ends_at = func.coalesce(
        bindparam("until", type_=TIMESTAMP(timezone=True)),
        func.clock_timestamp() + bindparam("length", type_=INTERVAL),
    )
    new = insert(pauses).values(
        queue=bindparam("from_queue", type_=Text),
        type=bindparam("paused_type", type_=Text),
        paused_at=func.clock_timestamp(),
        paused_by=literal_column("session_user", Text),
        reason=bindparam("reason", type_=Text),
        resume_at=ends_at,
    )
    has_ended = pauses.c.resume_at <= new.excluded.paused_at
    return new.on_conflict_do_update(
        index_elements=[pauses.c.queue, pauses.c.type],
        set_={
            "paused_at": case((has_ended, new.excluded.paused_at), else_=pauses.c.paused_at),
            **{name: new.excluded[name] for name in ("paused_by", "reason", "resume_at")},
        },
    )


@cache
def resume(schema: str | None) -> ReturningDelete[tuple[str]]:
    """End the pause of the type `paused_type` of `from_queue`; return its queue, if there was one."""
    pauses = pauses_table(schema)
    is_meant = and_(
        pauses.c.queue == bindparam("from_queue", type_=Text),
        pauses.c.type == bindparam("paused_type", type_=Text),
    )
    return delete(pauses).where(is_meant, _is_on(pauses)).returning(pauses.c.queue)


@cache
def pauses(schema: str | None) -> Select[Any]:
    """Return up to `at_most` pauses that have not ended, or all if it is NULL, with the time as `now`.

    Those of `first_queues` come first, and of them those of whole queues.
    """
    table = pauses_table(schema)
    is_first = table.c.queue == any_(bindparam("first_queues", type_=ARRAY(Text)))
    return (
        select(*table.c, func.clock_timestamp().label("now"))
        .where(_is_on(table))
        .order_by(is_first.desc(), and_(is_first, table.c.type == ALL_TYPES).desc(), *table.primary_key)
        .limit(bindparam("at_most", type_=BigInteger))
    )


def paused(schema: str | None, *, with_limited: bool = False) -> CTE:
    """Return the pauses that are on, each with its `queue` and `type`.

    `with_limited`: together with the queues and types that have a limit.
    """
    table = pauses_table(schema)
    found = select(table.c.queue, table.c.type).where(_is_on(table))
    either = union_all(found, limited(schema)) if with_limited else found
    return either.cte("paused").prefix_with("MATERIALIZED")


def is_paused(
    paused: FromClause, queue: ColumnElement[str], type_: ColumnElement[str]
) -> ColumnElement[bool]:
    """Return the condition that this type of a queue is among those that are `paused`."""
    is_meant = paused.c.queue == queue, paused.c.type == type_
    # Not EXISTS, which the planner may turn into a join that changes the order of the queues.
    found = select(true()).where(*is_meant).limit(literal_column("1")).correlate_except(paused)
    return func.coalesce(found.scalar_subquery(), false())


def next_resumes(schema: str | None, queues: FromClause) -> Select[Any]:
    """Return the paused queues with the time at which the first of their pauses ends, if any does."""
    table = pauses_table(schema)
    ends_at = func.min(table.c.resume_at)
    return (
        select(table.c.queue, func.date_part(EPOCH, ends_at).label("ends_at"))
        .where(table.c.queue.in_(select(queues.c.queue)), table.c.resume_at > func.clock_timestamp())
        .group_by(table.c.queue)
    )


def _is_on(table: FromClause) -> ColumnElement[bool]:
    return or_(table.c.resume_at.is_(None), table.c.resume_at > func.now())
