"""Writes the outcomes of tasks, as long as the worker still owns them."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Delete,
    FromClause,
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
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.sql.selectable import TableValuedAlias
from sqlalchemy.types import BigInteger, Double, Integer

from apoq.core.states import CANCELLED, COMPLETED, FAILED
from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.clock import epoch_now, now
from apoq.schema.statements.literals import PENDING
from apoq.schema.statements.states import has_running_state


def _literal(text: str) -> ColumnElement[str]:
    # Not a parameter, because each parameter costs the driver time, and this value is always the same.
    return literal_column(f"'{text}'", Text)


def rows_of(name: str, **columns: type) -> TableValuedAlias:
    """Return rows from bound arrays of the same length, which have the names of the columns, with an s."""
    arrays = [
        bigints(f"{name}s") if type_ is BigInteger else bindparam(f"{name}s", type_=ARRAY(type_))
        for name, type_ in columns.items()
    ]
    return func.unnest(*arrays).table_valued(*columns).render_derived(name)


def _held_batch(schema: str | None, *, alike: bool, skips_locked: bool) -> ColumnElement[bool]:
    """Return the condition that a task of `ids` still has its token of `tokens`, or (`alike`) `held_under`.

    A worker that has lost a task, to a rescue, to another worker or to a cancellation, finds no row.

    Most batches have a single token, because most tasks are claimed only once. Then no join is needed, which
    saves a sixth of the server's time.
    """
    if skips_locked:
        return is_picked(schema, alike=alike)
    return _has_token(tasks_table(schema), alike=alike)


def _has_token(tasks: FromClause, *, alike: bool) -> ColumnElement[bool]:
    if alike:
        return held(tasks, any_(bigints("ids")), bindparam("held_under", type_=BigInteger))
    rows = rows_of("claimed", id=BigInteger, token=BigInteger)
    return held(tasks, rows.c.id, rows.c.token)


def is_picked(schema: str | None, *, alike: bool) -> ColumnElement[bool]:
    """Return the condition that a task was locked by this statement, which waits for no other session.

    The lock writes a tenth more to the log of the server, for each task.
    """
    its = tasks_table(schema).alias("held")
    picked = select(its.c.id).where(_has_token(its, alike=alike)).with_for_update(of=its, skip_locked=True)
    return tasks_table(schema).c.id == any_(func.array(picked.scalar_subquery()))


def is_held_last(schema: str | None) -> ColumnElement[bool]:
    """Return the condition for one task that is still held, in a transaction that is about to be committed.

    It uses plain values, not arrays, so that the server plans it once per connection, not for each task.
    """
    is_held = held_as(
        schema, bindparam("task_id", type_=BigInteger), bindparam("held_under", type_=BigInteger)
    )
    # The row is locked until the commit, so a worker that freezes before it must be disconnected. This is set
    # here and not by RETURNING, to avoid a result that would have to be read. In a subquery, because Citus
    # accepts a volatile function only there.
    unless_frozen = func.set_config(
        _literal("idle_in_transaction_session_timeout"), _literal("5s"), literal_column("true")
    )
    return and_(is_held, select(unless_frozen).scalar_subquery().is_not(None))


def held_as(
    schema: str | None, task_id: ColumnElement[Any], token: ColumnElement[int]
) -> ColumnElement[bool]:
    """Return the condition that a task of a schema is held; see `held`."""
    return held(tasks_table(schema), task_id, token)


def held(tasks: FromClause, task_id: ColumnElement[Any], token: ColumnElement[int]) -> ColumnElement[bool]:
    """Return the condition that a row of `tasks` has this id, still has this token, and is running."""
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
    "held_unique_key": null(),
}
"""The values that a completion writes to a task."""


@cache
def complete(
    schema: str | None, *, alike: bool = False, skips_locked: bool = False, linked: bool = False
) -> Update:
    """Mark the tasks of `ids`, claimed with `tokens` (`alike`: all with `held_under`), as completed.

    `skips_locked`: leave out those that another session has locked, instead of waiting for it. Without
    `linked`, those that other tasks wait for are left out: their edges must be written as well.
    """
    condition = _held_batch(schema, alike=alike, skips_locked=skips_locked)
    return unless_followed(update(tasks_table(schema)).where(condition), schema, linked).values(AS_COMPLETED)


@cache
def complete_last(schema: str | None, *, linked: bool = False) -> Update:
    """Mark the task `task_id`, claimed with the token `held_under`, as completed, last in its transaction."""
    statement = update(tasks_table(schema)).where(is_held_last(schema))
    return unless_followed(statement, schema, linked).values(AS_COMPLETED)


@cache
def remove(
    schema: str | None, *, alike: bool = False, skips_locked: bool = False, linked: bool = False
) -> Delete:
    """Delete completed tasks instead of marking them, if completed tasks aren't kept; see `complete`.

    Without `linked`, those that have edges are left out.
    """
    condition = _held_batch(schema, alike=alike, skips_locked=skips_locked)
    return _unless_linked(delete(tasks_table(schema)).where(condition), schema, linked)


@cache
def remove_last(schema: str | None, *, linked: bool = False) -> Delete:
    """Delete the task `task_id`, claimed with the token `held_under`, last in its transaction."""
    return _unless_linked(delete(tasks_table(schema)).where(is_held_last(schema)), schema, linked)


def unless_followed(statement: Update, schema: str | None, linked: bool) -> Update:
    """Return a completion that leaves out tasks that other tasks wait for, unless `linked`."""
    return statement if linked else statement.where(tasks_table(schema).c.is_followed.is_not(true()))


def _unless_linked(statement: Delete, schema: str | None, linked: bool) -> Delete:
    tasks = tasks_table(schema)
    if linked:
        return statement
    return statement.where(tasks.c.is_followed.is_not(true()), tasks.c.has_parts.is_not(true()))


@cache
def settle(schema: str | None, *, skips_locked: bool = False) -> Update:
    """Write a `Settlement` to each task of `ids`, claimed with `tokens`; see `complete`."""
    tasks = tasks_table(schema)
    rows = rows_of(
        "settled",
        id=BigInteger,
        token=BigInteger,
        state=Text,
        attempt=Integer,
        fail_count=Integer,
        delay=Double,
        error=Text,
    )
    is_held = held(tasks, rows.c.id, rows.c.token)
    if skips_locked:
        # With the token as well, because a batch may have several claims of a task.
        is_held = and_(is_held, is_picked(schema, alike=False))
    # In seconds: to add an interval to a time depends on the session's time zone.
    process_at = func.to_timestamp(epoch_now() + rows.c.delay)
    return (
        update(tasks)
        .where(is_held)
        .values(
            state=rows.c.state,
            attempt=rows.c.attempt,
            fail_count=rows.c.fail_count,
            process_at=case((rows.c.delay.is_not(None), process_at), else_=tasks.c.process_at),
            completed_at=case((rows.c.state == COMPLETED, now()), else_=tasks.c.completed_at),
            cancelled_at=case((rows.c.state == CANCELLED, now()), else_=tasks.c.cancelled_at),
            failed_at=case(
                (or_(rows.c.fail_count > tasks.c.fail_count, rows.c.state == FAILED), now()),
                else_=tasks.c.failed_at,
            ),
            error=func.coalesce(cast(rows.c.error, JSONB), tasks.c.error),
            held_unique_key=case((rows.c.state == PENDING, tasks.c.held_unique_key)),
        )
    )
