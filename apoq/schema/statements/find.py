"""Find tasks for people to read, without looking through a whole table."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    Subquery,
    Table,
    Text,
    any_,
    bindparam,
    cast,
    func,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP

from apoq.schema.models import UPCOMING, tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.running import in_state

LOOKED_AT: Final = 100_000
"""Tasks that `find` looks at, at most, for no index knows of types and of when tasks were added."""


@cache
def find(schema: str | None, state: str | None) -> Select[*tuple[Any, ...]]:
    """Answer up to `at_most` tasks of a `state` (None: any), the newest first, their data cut off.

    Those with an id of `up_to_id` at most, and, where these aren't null, of the queue `in_queue`, of the type
    `of_type` and added at or after `since`. Of those that an index finds, only the newest `LOOKED_AT` are
    looked at; `horizon` tells how far that is. Of data, `excerpt` characters are answered.
    """
    recent = _recent(schema, state)
    return (
        select(
            *(column for column in recent.c if column.name != "data"),
            func.left(cast(recent.c.data, Text), bindparam("excerpt", type_=Integer)).label("data"),
            func.clock_timestamp().label("now"),
        )
        .where(*_filters(recent.c))
        .order_by(recent.c.id.desc())
        .limit(bindparam("at_most", type_=BigInteger))
    )


@cache
def horizon(schema: str | None, state: str | None) -> Select[*tuple[Any, ...]]:
    """Answer how many tasks `find` looks at, with the same parameters, and the lowest id of them."""
    recent = _recent(schema, state)
    return select(func.count().label("looked_at"), func.min(recent.c.id).label("lowest_id"))


@cache
def find_ids(schema: str | None, state: str) -> Select[*tuple[Any, ...]]:
    """Answer ids and queues of up to `at_most` tasks of a `state`, the oldest first; filters as in `find`."""
    tasks = tasks_table(schema)
    return (
        select(tasks.c.id, tasks.c.queue)
        .where(in_state(schema, tasks, state), *_filters(tasks.c))
        .order_by(tasks.c.id)
        .limit(bindparam("at_most", type_=BigInteger))
    )


@cache
def find_queues(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Answer ids and queues of those tasks of `ids` that exist."""
    tasks = tasks_table(schema)
    return select(tasks.c.id, tasks.c.queue).where(tasks.c.id == any_(bigints("ids"))).order_by(tasks.c.id)


@cache
def details(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Answer all that is known of the task `task_id`, its data as text, and what time it is."""
    tasks = tasks_table(schema)
    return select(
        *(column for column in _columns(tasks) if column.name != "data"),
        cast(tasks.c.data, Text).label("data"),
        func.clock_timestamp().label("now"),
    ).where(tasks.c.id == bindparam("task_id", type_=BigInteger))


def _columns(tasks: Table) -> list[ColumnElement[Any]]:
    return [column for column in tasks.c if column.name not in UPCOMING]


def _recent(schema: str | None, state: str | None) -> Subquery:
    # Bounded here, before the filters that no index serves. A state's index begins with the queue.
    tasks = tasks_table(schema)
    by_index = (
        [] if state is None else [in_state(schema, tasks, state), _given("in_queue", Text, tasks.c.queue)]
    )
    return (
        select(*_columns(tasks))
        .where(tasks.c.id <= bindparam("up_to_id", type_=BigInteger), *by_index)
        .order_by(tasks.c.id.desc())
        .limit(LOOKED_AT)
        .subquery("recent")
    )


def _filters(columns: Any) -> tuple[ColumnElement[bool], ...]:
    since = bindparam("since", type_=TIMESTAMP(timezone=True))
    return (
        _given("in_queue", Text, columns.queue),
        _given("of_type", Text, columns.type),
        or_(since.is_(None), columns.created_at >= since),
    )


def _given(name: str, kind: Any, column: ColumnElement[Any]) -> ColumnElement[bool]:
    """Compare a column with a parameter, unless that is null."""
    value = bindparam(name, type_=kind)
    return or_(value.is_(None), column == value)
