"""Finds and locks the tasks that a caller retries or cancels all at once, in the caller's transaction."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    Select,
    Text,
    any_,
    bindparam,
    exists,
    func,
    literal_column,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.types import Integer

from apoq.core.states import CANCELLABLE, FINAL, RUNNING
from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.expire import is_expired
from apoq.schema.statements.find import happened_at
from apoq.schema.statements.running import in_state
from apoq.schema.statements.states import has_running_state, is_in

_FILTERS: Final[dict[str, Callable[[FromClause], ColumnElement[bool]]]] = {
    "ids": lambda tasks: tasks.c.id == any_(bigints("ids")),
    "of_type": lambda tasks: tasks.c.type == bindparam("of_type", type_=Text),
    "of_unique_key": lambda tasks: tasks.c.unique_key == bindparam("of_unique_key", type_=Text),
    "error_class": lambda tasks: tasks.c.error["class"].as_string() == bindparam("error_class", type_=Text),
    "since": lambda tasks: happened_at(tasks.c) >= bindparam("since", type_=TIMESTAMP(timezone=True)),
}

Filters = frozenset[str]
"""The filters that are given; the names of their parameters."""

FILTERS: Final = tuple(_FILTERS)


@cache
def lock_ended(schema: str | None, state: str | None, filters: Filters) -> Select[Any]:
    """Lock and return up to `at_most` ended tasks of `from_queue`, the oldest first.

    Only tasks in the `state`, or in any final one if it is None, that match the filters, and whose ids are
    higher than `after_id`. Those that another session has locked are skipped.

    Returns their ids, their unique keys, and whether they can't run again (`is_kept`), because they have
    expired, or because another task holds the key.
    """
    tasks = tasks_table(schema)
    holder = tasks.alias("holder")
    key_is_taken = exists().where(
        holder.c.queue == tasks.c.queue,
        holder.c.held_unique_key == tasks.c.unique_key,
        or_(*(holder.c.state == literal_column(f"'{open_}'", Text) for open_ in CANCELLABLE)),
    )
    has_expired = func.coalesce(is_expired(tasks), False)
    is_its = is_in(tasks, *(FINAL if state is None else (state,)))
    return _lock(
        tasks,
        filters,
        is_its,
        tasks.c.id > bindparam("after_id", type_=BigInteger),
        returned=(tasks.c.unique_key, or_(has_expired, key_is_taken).label("is_kept")),
    )


@cache
def lock_open(schema: str | None, state: str, filters: Filters) -> Select[Any]:
    """Lock up to `at_most` tasks of `from_queue` in a `state` that isn't final, and return their ids.

    The oldest first, by filters as in `lock_ended`. Those that another session has locked are skipped, such
    as tasks that a worker is just claiming or completing.
    """
    tasks = tasks_table(schema)
    if state != RUNNING:
        is_its = in_state(schema, tasks, state)
    elif "ids" in filters:
        is_its = has_running_state(tasks)
    else:
        is_its = in_state(schema, tasks, RUNNING)
    return _lock(tasks, filters, is_its)


def _lock(
    tasks: Any,
    filters: Filters,
    *conditions: ColumnElement[bool],
    returned: tuple[ColumnElement[Any], ...] = (),
) -> Select[Any]:
    return (
        select(tasks.c.id, *returned)
        .where(
            tasks.c.queue == bindparam("from_queue", type_=Text),
            *conditions,
            *(_FILTERS[name](tasks) for name in _FILTERS if name in filters),
        )
        .order_by(tasks.c.id)
        .limit(bindparam("at_most", type_=Integer))
        .with_for_update(of=tasks, skip_locked=True)
    )
