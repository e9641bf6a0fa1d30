"""Write what became of tasks, as long as they are this worker's to write to."""

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
from apoq.schema.statements.states import runs

LOCK_TIMEOUT: Final = "500ms"
"""How long a worker waits for a lock: less than PostgreSQL's `deadlock_timeout`, which is a second."""


def _literal(text: str) -> ColumnElement[str]:
    # Not a parameter: each costs the driver time, and these are always the same.
    return literal_column(f"'{text}'", Text)


def _rows(**columns: type) -> TableValuedAlias:
    """Turn arrays of the same length, bound as parameters, into rows."""
    arrays = [
        bigints(f"{name}s") if type_ is BigInteger else bindparam(f"{name}s", type_=ARRAY(type_))
        for name, type_ in columns.items()
    ]
    return func.unnest(*arrays).table_valued(*columns).render_derived("settled")


def _held(schema: str | None, task_id: ColumnElement[Any], token: ColumnElement[int]) -> ColumnElement[bool]:
    """Pick the tasks that are still held under the token with which they were claimed.

    A worker that has lost a task - to the sweep, to another worker, to a cancellation - finds no row.
    """
    # A caller who cancels one of them and doesn't commit would hold up all the others; and where callers and
    # workers lock the same rows in another order, who is not to fail is the caller. A subquery of its own is
    # executed once, before any row is looked at.
    within = func.set_config(_literal("lock_timeout"), _literal(LOCK_TIMEOUT), literal_column("true"))
    return and_(held_as(schema, task_id, token), select(within).scalar_subquery().is_not(None))


def _held_batch(schema: str | None, *, alike: bool) -> ColumnElement[bool]:
    """Pick the tasks of `ids` that are held under `tokens`; `alike`: under one token, `held_under`.

    So are most batches, for most tasks are claimed once. Then there is nothing to join, which takes a sixth
    of the server's time.
    """
    if alike:
        return _held(schema, any_(bigints("ids")), bindparam("held_under", type_=BigInteger))
    rows = _rows(id=BigInteger, token=BigInteger)
    return _held(schema, rows.c.id, rows.c.token)


def _held_last(schema: str | None) -> ColumnElement[bool]:
    """Pick one task that is still held, in a transaction that is about to be committed.

    By plain values, not by arrays: the server makes the plan once for a connection, and not for each task.
    """
    held = held_as(schema, bindparam("task_id", type_=BigInteger), bindparam("held_under", type_=BigInteger))
    # Until the commit, the row is locked: a worker that is frozen before it must not keep it so.
    # Set here, and not by RETURNING, lest there be an answer to read.
    unless_frozen = func.set_config(
        _literal("idle_in_transaction_session_timeout"), _literal("5s"), literal_column("true")
    )
    return and_(held, unless_frozen.is_not(None))


def held_as(
    schema: str | None, task_id: ColumnElement[Any], token: ColumnElement[int]
) -> ColumnElement[bool]:
    """Pick the task of this id, if it is still held under this token."""
    tasks = tasks_table(schema)
    return and_(
        tasks.c.id == task_id,
        tasks.c.claim_token == token,
        runs(tasks),
    )


AS_COMPLETED: Final[dict[str, ColumnElement[Any]]] = {
    "state": _literal(COMPLETED),
    # Not now(), which would be when the transaction of `task.session` began. The same for all of a batch,
    # so the index by which they are pruned keeps it once for many of them, and takes a quarter of the room.
    "completed_at": func.statement_timestamp(),
}
"""What a completion writes to a task."""


@cache
def complete(schema: str | None, *, alike: bool = False) -> Update:
    """Mark the tasks of `ids`, held under `tokens`, as completed; `alike`: all under `held_under`."""
    return update(tasks_table(schema)).where(_held_batch(schema, alike=alike)).values(AS_COMPLETED)


@cache
def complete_last(schema: str | None) -> Update:
    """Mark the task `task_id`, held under `held_under`, as completed: last in its transaction."""
    return update(tasks_table(schema)).where(_held_last(schema)).values(AS_COMPLETED)


@cache
def remove(schema: str | None, *, alike: bool = False) -> Delete:
    """Delete the tasks of `ids`, held as for `complete`: completed, where completed ones aren't kept."""
    return delete(tasks_table(schema)).where(_held_batch(schema, alike=alike))


@cache
def remove_last(schema: str | None) -> Delete:
    """Delete the task `task_id`, held under `held_under`: last in its transaction."""
    return delete(tasks_table(schema)).where(_held_last(schema))


@cache
def settle(schema: str | None) -> Update:
    """Write a `Settlement` to each task of `ids`, held under `tokens`."""
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
