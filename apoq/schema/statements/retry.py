"""Retries tasks that have ended, in the caller's transaction."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Double,
    FromClause,
    Text,
    bindparam,
    case,
    func,
    literal_column,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL
from sqlalchemy.sql.dml import ReturningUpdate

from apoq.core.states import FINAL, PENDING, WAITING, alternatives
from apoq.schema.models import task_class, tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.clock import epoch_now, now
from apoq.schema.statements.expire import is_expired
from apoq.schema.statements.links import PARENTS
from apoq.schema.statements.literals import ZERO
from apoq.schema.statements.portable import portable

_RESET: Final[dict[str, Any]] = {
    "state": PENDING,
    "attempt": 0,
    "fail_count": 0,
    "rescue_count": 0,
    "completed_at": null(),
    "failed_at": null(),
    "cancelled_at": null(),
    "result": null(),
}
"""The columns of a task that runs again with all of its attempts."""

_ENDED: Final[ColumnElement[bool]] = literal_column(f"state IN {alternatives(FINAL)}", Boolean)


@cache
def retry(schema: str | None, *, takes_key: bool = False) -> ReturningUpdate[Any]:
    """Make the task `task_id` of `from_queue`, if it has ended, pending again with all of its attempts.

    If it has `blockers`, it waits for these parents instead. An expired task is left as it is. A task keeps
    its token, which never decreases, and its last error until the next one. A task with a unique key is left
    as it is, unless `takes_key`: then its key must have been reserved.
    """
    tasks = tasks_table(schema)
    # Not now(), the start of the caller's transaction, which may be long ago: a delay counts from the call.
    delay = bindparam("task_delay", type_=INTERVAL)
    process_at = func.coalesce(func.statement_timestamp() + delay, func.now())
    new = {
        **_RESET,
        **_blocked(tasks),
        "process_at": select(process_at).scalar_subquery(),
        "held_unique_key": tasks.c.unique_key if takes_key else null(),
    }
    # The mapped class, not its table, so that the session updates its objects.
    return (
        update(task_class(schema))
        .where(
            tasks.c.id == bindparam("task_id", type_=BigInteger),
            tasks.c.queue == bindparam("from_queue", type_=Text),
            *_may_run_again(tasks),
            tasks.c.unique_key.is_not(None) if takes_key else tasks.c.unique_key.is_(None),
        )
        .values(new)
        .returning(*(portable(name, tasks.c[name]) for name in ("id", "is_followed", *new)))
        .execution_options(synchronize_session="fetch")
    )


@cache
def retry_many(schema: str | None) -> ReturningUpdate[Any]:
    """Make the tasks of `ids` pending again, if they have ended, each due in its number of `delays`, seconds.

    They hold their unique keys, which must have been reserved. See `retry`.
    """
    tasks = tasks_table(schema)
    rows = (
        func.unnest(bigints("ids"), bindparam("delays", type_=ARRAY(Double)))
        .table_valued("id", "delay")
        .render_derived("retried")
    )
    new = {
        **_RESET,
        **_blocked(tasks),
        "process_at": func.to_timestamp(epoch_now() + rows.c.delay),
        "held_unique_key": tasks.c.unique_key,
    }
    return (
        update(task_class(schema))
        .where(tasks.c.id == rows.c.id, *_may_run_again(tasks))
        .values(new)
        .returning(*(portable(name, tasks.c[name]) for name in ("id", "is_followed", *new)))
        .execution_options(synchronize_session="fetch")
    )


def _may_run_again(tasks: FromClause) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that a task has ended, and has not expired, so that it would not start."""
    return _ENDED, or_(tasks.c.expires_at.is_(None), ~is_expired(tasks))


def _blocked(tasks: FromClause) -> dict[str, ColumnElement[Any]]:
    """Return the state of a task that runs again, or waits for its parents again."""
    is_blocked = func.coalesce(tasks.c.blockers, ZERO) > ZERO
    return {
        "state": case((is_blocked, _text(WAITING)), else_=_text(PENDING)),
        "waiting_since": case((is_blocked, now())),
        "waiting_for": case((is_blocked, _text(PARENTS))),
    }


def _text(state: str) -> ColumnElement[str]:
    return literal_column(f"'{state}'", Text)
