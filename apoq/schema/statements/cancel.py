"""Cancel a task, in the transaction of whoever executes this."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import BigInteger, Boolean, ColumnElement, Text, bindparam, cast, func, literal_column, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.dml import ReturningUpdate

from apoq.core.states import CANCELLABLE, CANCELLED, alternatives
from apoq.schema.models import task_class, tasks_table
from apoq.schema.statements.portable import portable

_CANCELLABLE: Final[ColumnElement[bool]] = literal_column(f"state IN {alternatives(CANCELLABLE)}", Boolean)

_RETURNED: Final = ("id", "state", "cancelled_at", "error", "claimed_at")


@cache
def cancel(schema: str | None) -> ReturningUpdate[Any]:
    """Cancel the task `task_id` of `from_queue`, unless it has ended, with an error that says why.

    A worker that runs it finds its token worth nothing: it writes to running tasks only.
    """
    tasks = tasks_table(schema)
    # The mapped class, not its table, so that a session knows of the change.
    return (
        update(task_class(schema))
        .where(
            tasks.c.id == bindparam("task_id", type_=BigInteger),
            tasks.c.queue == bindparam("from_queue", type_=Text),
            _CANCELLABLE,
        )
        .values(
            state=CANCELLED,
            cancelled_at=func.clock_timestamp(),
            error=cast(bindparam("reason", type_=Text), JSONB),
        )
        # claimed_at, for who has never been claimed isn't running.
        .returning(*(portable(name, tasks.c[name]) for name in _RETURNED))
        .execution_options(synchronize_session="fetch")
    )
