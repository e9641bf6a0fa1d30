"""Cancels tasks, in the caller's transaction."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Text,
    any_,
    bindparam,
    cast,
    literal_column,
    null,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.dml import ReturningUpdate

from apoq.core.states import CANCELLABLE, CANCELLED, alternatives
from apoq.schema.models import task_class, tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.clock import now
from apoq.schema.statements.portable import portable

_CANCELLABLE: Final[ColumnElement[bool]] = literal_column(f"state IN {alternatives(CANCELLABLE)}", Boolean)

_RETURNED: Final = (
    *("id", "state", "cancelled_at", "error", "claimed_at", "held_unique_key"),
    *("waiting_since", "waiting_for", "is_followed"),
)


@cache
def cancel(schema: str | None, *, by_key: bool = False) -> ReturningUpdate[Any]:
    """Cancel the task `task_id` of `from_queue` unless it has ended, with an error that gives the `reason`.

    Or (`by_key`) the task that holds `task_unique_key`.

    A worker that runs the task can no longer write to it, because workers write only to running tasks.
    """
    tasks = tasks_table(schema)
    # The mapped class, not its table, so that the session updates its objects.
    return (
        update(task_class(schema))
        .where(
            tasks.c.held_unique_key == bindparam("task_unique_key", type_=Text)
            if by_key
            else tasks.c.id == bindparam("task_id", type_=BigInteger),
            tasks.c.queue == bindparam("from_queue", type_=Text),
            _CANCELLABLE,
        )
        .values(_as_cancelled())
        # claimed_at, because a task that was never claimed isn't running, so no worker has to be notified.
        .returning(*(portable(name, tasks.c[name]) for name in _RETURNED))
        .execution_options(synchronize_session="fetch")
    )


@cache
def cancel_many(schema: str | None) -> ReturningUpdate[Any]:
    """Cancel the tasks of `ids` that have not ended; see `cancel`."""
    tasks = tasks_table(schema)
    return (
        update(task_class(schema))
        .where(tasks.c.id == any_(bigints("ids")), _CANCELLABLE)
        .values(_as_cancelled())
        .returning(*(portable(name, tasks.c[name]) for name in _RETURNED))
        .execution_options(synchronize_session="fetch")
    )


def _as_cancelled() -> dict[str, Any]:
    return {
        "state": CANCELLED,
        "cancelled_at": now(),
        "error": cast(bindparam("reason", type_=Text), JSONB),
        "held_unique_key": null(),
        "waiting_since": null(),
        "waiting_for": null(),
    }
