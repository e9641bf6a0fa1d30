"""Finds and locks the tasks that a caller retries or cancels all at once, in the caller's transaction."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    Table,
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

from apoq.core.states import CANCELLABLE, COMPLETED, FINAL, PENDING, RUNNING
from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.expire import is_expired
from apoq.schema.statements.levels import level
from apoq.schema.statements.running import in_state
from apoq.schema.statements.states import has_running_state, is_in

Filters = frozenset[str]
"""The filters that are given; the names of their parameters."""

FILTERS: Final = (
    *("ids", "of_type", "of_key", "of_unique_key", "of_either_key", "error_class", "since", "until"),
    *("due_until", "due_after", "fails_from"),
)


@cache
def lock_ended(schema: str | None, state: str | None, filters: Filters) -> Select[Any]:
    """Lock and return up to `at_most` ended tasks of `from_queue`, in the order in which they ended.

    Only tasks in the `state`, or in any final one if it is None, that match the filters; without the first
    `looked_at` of them. Those that another session has locked are skipped.

    Returns their ids, their unique keys, and whether they can't run again (`is_kept`), because they have
    expired, or because another task holds the key.
    """
    tasks = tasks_table(schema)
    holder = tasks.alias("holder")
    key_is_taken = exists().where(
        holder.c.queue == tasks.c.queue,
        holder.c.held_unique_key == tasks.c.unique_key,
        holder.c.held_unique_key.is_not(None),  # so that a hashed subplan can use the index, too
        or_(*(holder.c.state == literal_column(f"'{open_}'", Text) for open_ in CANCELLABLE)),
    )
    has_expired = func.coalesce(is_expired(tasks), False)
    is_its = is_in(tasks, *(FINAL if state is None else (state,)))
    returned = tasks.c.unique_key, or_(has_expired, key_is_taken).label("is_kept")
    # By the order of the state's index, so that its first entries are enough.
    order = () if state is None else (_happened_at(tasks, state),)
    found = _lock(tasks, state, filters, is_its, order, returned)
    return found.offset(bindparam("looked_at", type_=BigInteger))


@cache
def lock_open(schema: str | None, state: str, filters: Filters) -> Select[Any]:
    """Lock up to `at_most` tasks of `from_queue` in a `state` that isn't final, and return their ids.

    By filters as in `lock_ended`; pending ones in the order in which they are claimed. Those that another
    session has locked are skipped, such as tasks that a worker is just claiming or completing.
    """
    tasks = tasks_table(schema)
    is_its = in_state(schema, tasks, state)
    if state == RUNNING and "ids" in filters:
        is_its = has_running_state(tasks)
    # By the order of the index, so that its first entries are enough.
    order = (level(tasks).desc(), tasks.c.process_at) if state == PENDING else ()
    return _lock(tasks, state, filters, is_its, order)


def _lock(
    tasks: Table,
    state: str | None,
    filters: Filters,
    is_its: ColumnElement[bool],
    order: tuple[ColumnElement[Any], ...],
    returned: tuple[ColumnElement[Any], ...] = (),
) -> Select[Any]:
    either = bindparam("of_either_key", type_=Text)
    happened_at = _happened_at(tasks, state)
    conditions = {
        "ids": tasks.c.id == any_(bigints("ids")),
        "of_type": tasks.c.type == bindparam("of_type", type_=Text),
        "of_key": tasks.c.key == bindparam("of_key", type_=Text),
        "of_unique_key": tasks.c.unique_key == bindparam("of_unique_key", type_=Text),
        "error_class": tasks.c.error["class"].as_string() == bindparam("error_class", type_=Text),
        "of_either_key": or_(tasks.c.key == either, tasks.c.unique_key == either),
        "since": happened_at >= bindparam("since", type_=TIMESTAMP(timezone=True)),
        "until": happened_at <= bindparam("until", type_=TIMESTAMP(timezone=True)),
        "due_until": tasks.c.process_at <= bindparam("due_until", type_=TIMESTAMP(timezone=True)),
        "due_after": tasks.c.process_at > bindparam("due_after", type_=TIMESTAMP(timezone=True)),
        "fails_from": tasks.c.fail_count >= bindparam("fails_from", type_=Integer),
    }
    return (
        select(tasks.c.id, *returned)
        .where(
            tasks.c.queue == bindparam("from_queue", type_=Text),
            is_its,
            *(conditions[name] for name in FILTERS if name in filters),
        )
        .order_by(*order, tasks.c.id)
        .limit(bindparam("at_most", type_=BigInteger))
        .with_for_update(of=tasks, skip_locked=True)
    )


def _happened_at(tasks: Table, state: str | None) -> ColumnElement[Any]:
    """Return what `happened_at` of `find` returns for this state, as the state's index has it."""
    if state == COMPLETED:
        return tasks.c.completed_at
    if state in FINAL:
        return func.coalesce(tasks.c.cancelled_at, tasks.c.failed_at, tasks.c.process_at)
    return func.coalesce(tasks.c.claimed_at, tasks.c.created_at) if state == RUNNING else tasks.c.created_at
