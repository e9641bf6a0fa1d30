"""The windows of throttled tasks: in each, one task is added with a unique key."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Delete,
    Double,
    Select,
    Table,
    Text,
    any_,
    bindparam,
    delete,
    func,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, insert
from sqlalchemy.sql.dml import ReturningInsert
from sqlalchemy.types import Integer

from apoq.schema.statements.clock import in_utc, now
from apoq.schema.statements.literals import EPOCH
from apoq.schema.tables import throttles_table

_KEYS: Final = bindparam("task_unique_keys", type_=ARRAY(Text))


@cache
def open_windows(schema: str | None) -> Select[tuple[str]]:
    """Return those of `task_unique_keys` that have a window in `task_queue` now, without waiting."""
    table = throttles_table(schema)
    return select(table.c.key).where(*_has_keys(table), table.c.until > func.clock_timestamp())


@cache
def begin_windows(schema: str | None) -> ReturningInsert[Any]:
    """Begin a window for each of `task_unique_keys` that has none, and return these keys.

    Its length is `throttle`, and in seconds `throttle_seconds`.

    It waits for the end of other transactions that have just begun one. The keys must be sorted, so that
    callers don't deadlock.
    """
    table = throttles_table(schema)
    keys = func.unnest(_KEYS).table_valued("key").render_derived("keys")
    values = {
        "queue": bindparam("task_queue", type_=Text),
        "key": keys.c.key,
        "until": func.clock_timestamp() + bindparam("throttle", type_=INTERVAL),
    }
    new = insert(table).from_select(list(values), select(*values.values()))
    # Immutable functions, as Citus needs them.
    until = func.date_part(EPOCH, in_utc(new.excluded.until), type_=Double)
    begins = func.to_timestamp(until - bindparam("throttle_seconds", type_=Double))
    return new.on_conflict_do_update(
        index_elements=[table.c.queue, table.c.key],
        set_={"until": new.excluded.until},
        where=table.c.until <= begins,
    ).returning(table.c.key)


@cache
def end_windows(schema: str | None) -> Delete:
    """Delete the windows of `task_unique_keys`."""
    table = throttles_table(schema)
    return delete(table).where(*_has_keys(table))


@cache
def prune_windows(schema: str | None) -> Delete:
    """Delete up to `at_most` windows that are over, except the first `passed_over` (0 by default)."""
    table = throttles_table(schema)
    over = (
        select(table.c.queue, table.c.key)
        .where(table.c.until <= now())
        .order_by(table.c.until)
        .limit(bindparam("at_most", type_=Integer))
        .offset(bindparam("passed_over", 0, type_=Integer))
        .with_for_update(skip_locked=True)
        .cte("over")
    )
    return delete(table).where(tuple_(table.c.queue, table.c.key) == tuple_(over.c.queue, over.c.key))


def _has_keys(table: Table) -> tuple[ColumnElement[bool], ...]:
    return table.c.queue == bindparam("task_queue", type_=Text), table.c.key == any_(_KEYS)
