"""Writes the outcomes of tasks, as long as the worker still owns them."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Delete,
    Text,
    Update,
    and_,
    any_,
    bindparam,
    case,
    cast,
    delete,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, JSONB
from sqlalchemy.sql.selectable import TableValuedAlias
from sqlalchemy.types import BigInteger, Double, Integer

from apoq.core.states import CANCELLED, COMPLETED, FAILED
from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.states import has_running_state

LOCK_TIMEOUT: Final = "500ms"
"""The time that a worker waits for a lock: less than PostgreSQL's `deadlock_timeout`, which is one second."""


def _literal(text: str) -> ColumnElement[str]:
    # Not a parameter, because each parameter costs the driver time, and this value is always the same.
    return literal_column(f"'{text}'", Text)


def _rows(**columns: type) -> TableValuedAlias:
    """Return rows from bound arrays of the same length."""
    arrays = [
        bigints(f"{name}s") if type_ is BigInteger else bindparam(f"{name}s", type_=ARRAY(type_))
        for name, type_ in columns.items()
    ]
    return func.unnest(*arrays).table_valued(*columns).render_derived("settled")


def _held(schema: str | None, task_id: ColumnElement[Any], token: ColumnElement[int]) -> ColumnElement[bool]:
    """Return the condition that a task still has the token with which it was claimed; limit waits for locks.

    A worker that has lost a task, to a rescue, to another worker or to a cancellation, finds no row.
    """
    # Without a timeout, a caller who cancels one of the tasks and doesn't commit would block all others. And
    # if a caller and a worker lock the same rows in a different order, the worker's statement must fail, not
    # the caller's. In a subquery, set_config is executed once, before any row is checked.
    within = func.set_config(_literal("lock_timeout"), _literal(LOCK_TIMEOUT), literal_column("true"))
    return and_(held_as(schema, task_id, token), select(within).scalar_subquery().is_not(None))


def _held_batch(schema: str | None, *, alike: bool) -> ColumnElement[bool]:
    """Return the condition that a task of `ids` still has its token of `tokens`, or (`alike`) `held_under`.

    Most batches have a single token, because most tasks are claimed only once. Then no join is needed, which
    saves a sixth of the server's time.
    """
    if alike:
        return _held(schema, any_(bigints("ids")), bindparam("held_under", type_=BigInteger))
    rows = _rows(id=BigInteger, token=BigInteger)
    return _held(schema, rows.c.id, rows.c.token)


def _held_last(schema: str | None) -> ColumnElement[bool]:
    """Return the condition for one task that is still held, in a transaction that is about to be committed.

    It uses plain values, not arrays, so that the server plans it once per connection, not for each task.
    """
    held = held_as(schema, bindparam("task_id", type_=BigInteger), bindparam("held_under", type_=BigInteger))
    # The row is locked until the commit, so a worker that freezes before it must be disconnected. This is set
    # here and not by RETURNING, to avoid a result that would have to be read.
    unless_frozen = func.set_config(
        _literal("idle_in_transaction_session_timeout"), _literal("5s"), literal_column("true")
    )
    return and_(held, unless_frozen.is_not(None))


def held_as(
    schema: str | None, task_id: ColumnElement[Any], token: ColumnElement[int]
) -> ColumnElement[bool]:
    """Return the condition that a task has this id, still has this token, and is running."""
    tasks = tasks_table(schema)
    return and_(
        tasks.c.id == task_id,
        tasks.c.claim_token == token,
        has_running_state(tasks),
    )


AS_COMPLETED: Final[dict[str, ColumnElement[Any]]] = {
    "state": _literal(COMPLETED),
    # Not now(), the start of the transaction of `task.session`. The time is the same for the whole batch, so
    # that the index for pruning stores it once for many tasks, and takes a quarter of the space.
    "completed_at": func.statement_timestamp(),
}
"""The values that a completion writes to a task."""


@cache
def complete(schema: str | None, *, alike: bool = False) -> Update:
    """Mark the tasks of `ids`, claimed with `tokens` (`alike`: all with `held_under`), as completed."""
    return update(tasks_table(schema)).where(_held_batch(schema, alike=alike)).values(AS_COMPLETED)


@cache
def complete_last(schema: str | None) -> Update:
    """Mark the task `task_id`, claimed with the token `held_under`, as completed, last in its transaction."""
    return update(tasks_table(schema)).where(_held_last(schema)).values(AS_COMPLETED)


@cache
def remove(schema: str | None, *, alike: bool = False) -> Delete:
    """Delete completed tasks instead of marking them, if completed tasks aren't kept; see `complete`."""
    return delete(tasks_table(schema)).where(_held_batch(schema, alike=alike))


@cache
def remove_last(schema: str | None) -> Delete:
    """Delete the task `task_id`, claimed with the token `held_under`, last in its transaction."""
    return delete(tasks_table(schema)).where(_held_last(schema))


@cache
def settle(schema: str | None) -> Update:
    """Write a `Settlement` to each task of `ids`, claimed with `tokens`."""
    tasks = tasks_table(schema)
    rows = _rows(
        id=BigInteger,
        token=BigInteger,
        state=Text,
        attempt=Integer,
        fail_count=Integer,
        delay=Double,
        error=Text,
    )
    now = func.clock_timestamp()
    second = literal_column("interval '1 second'", INTERVAL)
    return (
        update(tasks)
        .where(_held(schema, rows.c.id, rows.c.token))
        .values(
            state=rows.c.state,
            attempt=rows.c.attempt,
            fail_count=rows.c.fail_count,
            process_at=case(
                (rows.c.delay.is_not(None), now + rows.c.delay * second), else_=tasks.c.process_at
            ),
            completed_at=case((rows.c.state == COMPLETED, now), else_=tasks.c.completed_at),
            cancelled_at=case((rows.c.state == CANCELLED, now), else_=tasks.c.cancelled_at),
            failed_at=case(
                (or_(rows.c.fail_count > tasks.c.fail_count, rows.c.state == FAILED), now),
                else_=tasks.c.failed_at,
            ),
            error=func.coalesce(cast(rows.c.error, JSONB), tasks.c.error),
        )
    )
