"""Limits: of queues, of types, and of concurrency keys."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Delete,
    FromClause,
    Integer,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    delete,
    func,
    literal_column,
    or_,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP, Insert, insert
from sqlalchemy.sql.dml import ReturningInsert
from sqlalchemy.types import Boolean

from apoq.schema.tables import limits_table

NONE: Final[ColumnElement[str]] = literal_column("''", Text)
"""Instead of a type or a key."""


@cache
def declare(schema: str | None) -> ReturningInsert[Any]:
    """Write the limit that the code of a release declares for `limited_type` of `from_queue`.

    Returns a row unless a later release has declared another one. A limit that was set by `set_limit` stays
    in force.
    """
    limits = limits_table(schema)
    new = _insert(
        limits,
        declared=bindparam("at_most", type_=Integer),
        is_of_key=bindparam("is_of_key", type_=Boolean),
        is_strict=bindparam("is_strict", type_=Boolean),
        holds=bindparam("holds", type_=Boolean),
        release=bindparam("limit_release", type_=TIMESTAMP(timezone=True)),
    )
    values = "declared", "is_of_key", "is_strict", "holds"
    changed = {name: new.excluded[name] for name in (*values, "changed_at", "changed_by")}
    is_later = or_(limits.c.release.is_(None), limits.c.release <= new.excluded.release)
    is_same = and_(*(limits.c[name].is_not_distinct_from(new.excluded[name]) for name in values))
    return new.on_conflict_do_update(
        index_elements=[*limits.primary_key],
        set_=changed | {"release": func.greatest(limits.c.release, new.excluded.release)},
        where=or_(is_later, is_same),
    ).returning(limits.c.queue)


@cache
def set_limit(schema: str | None) -> Insert:
    """Let at most `at_most` tasks of `limited_type` or `limited_key` of `from_queue` run at once.

    NULL: as many as the code declares.
    """
    limits = limits_table(schema)
    new = _insert(limits, at_most=bindparam("at_most", type_=Integer))
    names = "at_most", "changed_at", "changed_by"
    return new.on_conflict_do_update(
        index_elements=[*limits.primary_key], set_={name: new.excluded[name] for name in names}
    )


@cache
def remove_unused(schema: str | None) -> Delete:
    """Delete the limits of `from_queue` that are neither set nor declared."""
    limits = limits_table(schema)
    return delete(limits).where(
        limits.c.queue == bindparam("from_queue", type_=Text),
        limits.c.at_most.is_(None),
        limits.c.declared.is_(None),
    )


@cache
def all_limits(schema: str | None) -> Select[Any]:
    """Return all limits of the queue `from_queue`, or of all queues if it is NULL."""
    limits = limits_table(schema)
    queue = bindparam("from_queue", type_=Text)
    return (
        select(*limits.c, in_force(limits).label("in_force"))
        .where(or_(queue.is_(None), limits.c.queue == queue))
        .order_by(*limits.primary_key)
    )


@cache
def find_limit(schema: str | None) -> Select[Any]:
    """Return the limit of `limited_type` or `limited_key` of `from_queue`."""
    limits = limits_table(schema)
    return all_limits(schema).where(
        limits.c.type == bindparam("limited_type", type_=Text),
        limits.c.key == bindparam("limited_key", type_=Text),
    )


@cache
def browse_limits(schema: str | None) -> Select[Any]:
    """Return up to `at_most` limits that follow `after_key` of `after_type` of `after_queue`."""
    limits = limits_table(schema)
    edge = tuple_(*(bindparam(f"after_{name}", type_=Text) for name in ("queue", "type", "key")))
    return (
        all_limits(schema)
        .add_columns(func.clock_timestamp().label("now"))
        .where(tuple_(*limits.primary_key) > edge)
        .limit(bindparam("at_most", type_=Integer))
    )


@cache
def limits_of(schema: str | None) -> Select[Any]:
    """Return the limits in force of `from_queue`: its own, and those of its types and of the keys `keys`."""
    limits = limits_table(schema)
    return select(
        limits.c.type,
        limits.c.key,
        in_force(limits),
        limits.c.is_of_key,
        limits.c.is_strict,
        limits.c.holds,
    ).where(
        limits.c.queue == bindparam("from_queue", type_=Text),
        in_force(limits).is_not(None),
        or_(
            limits.c.key == NONE,
            and_(limits.c.type == NONE, limits.c.key == any_(bindparam("keys", type_=ARRAY(Text)))),
        ),
    )


def limited(schema: str | None) -> Select[tuple[str, str]]:
    """Return the queues and types that have a limit of their own, each with its `queue` and `type`.

    The type is an empty text for a whole queue.
    """
    limits = limits_table(schema)
    return select(limits.c.queue, limits.c.type).where(
        limits.c.key == NONE, ~limits.c.is_of_key, in_force(limits).is_not(None)
    )


def in_force(limits: FromClause) -> ColumnElement[int | None]:
    """Return the number of a limit: what was set, or else what the code declares."""
    return func.coalesce(limits.c.at_most, limits.c.declared)


def _insert(limits: Any, **values: ColumnElement[Any]) -> Insert:
    return insert(limits).values(
        queue=bindparam("from_queue", type_=Text),
        type=bindparam("limited_type", type_=Text),
        key=bindparam("limited_key", type_=Text),
        changed_at=func.clock_timestamp(),
        changed_by=literal_column("session_user", Text),
        **values,
    )
