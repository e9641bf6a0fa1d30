"""How completions are written, and how much of the tasks is read back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Delete, Executable, Update

from apoq.core.outcomes import Release
from apoq.events import COMPLETED, Events
from apoq.postgres.connections import compiled
from apoq.schema.models import tasks_table
from apoq.schema.statements.portable import portable, read_row
from apoq.schema.statements.settle import AS_COMPLETED, complete, complete_last, remove, remove_last
from apoq.worker.execution.attempt import AnyAttempt


class Completion:
    """Writes completions: tasks are marked, or deleted where completed ones aren't kept."""

    def __init__(self, events: Events, *, keep: bool) -> None:
        self._events = events
        self.keep = keep

    @property
    def is_heard(self) -> bool:
        """Tell whether somebody listens to completions."""
        return self._events.heard(COMPLETED)

    def statement(self, schema: str | None, *, full: bool, alike: bool) -> Executable:
        """Complete the tasks of `ids`; answer their ids, or their whole rows. `alike`: their tokens are."""
        write = complete if self.keep else remove
        return _returning(write(schema, alike=alike), schema, full=full)

    def write(self, connection: Connection, attempt: AnyAttempt) -> Mapping[Any, Any] | None:
        """Complete a task in a transaction that is about to be committed; answer None where it was lost.

        Otherwise its id, or its whole row where somebody listens. Raises `Release` where the worker's lease
        has ended: others may have begun with the task.
        """
        if not attempt.lease.is_held:
            raise Release
        schema = attempt.from_queue.schema
        parameters = {"task_id": attempt.id, "held_under": attempt.claim_token}
        statement = complete_last(schema) if self.keep else remove_last(schema)
        if self.is_heard:
            # On the processor's connection, which may be of any DateStyle.
            found = connection.execute(_returning(statement, schema, full=True, is_ours=False), parameters)
            row = found.mappings().first()
            return None if row is None else read_row(row)
        # Each task has one of these, and nothing is read back: as text, it takes half of SQLAlchemy's time.
        text, _ = compiled(statement)
        written = connection.exec_driver_sql(text, parameters)
        return {"id": attempt.id} if written.rowcount else None


def told(schema: str | None) -> list[ColumnElement[Any]]:
    """Return the columns of a task that has ended, for those who listen: all but its data, which is known."""
    return [column for column in tasks_table(schema).c if column.key != "data"]


@cache
def _returning(
    statement: Update | Delete, schema: str | None, *, full: bool, is_ours: bool = True
) -> Executable:
    tasks = tasks_table(schema)
    columns: dict[str, ColumnElement[Any]] = {
        str(column.key): column for column in (told(schema) if full else [tasks.c.id])
    }
    if isinstance(statement, Delete):
        # What is deleted is told of as it would stand there.
        columns |= {name: value for name, value in AS_COMPLETED.items() if name in columns}
    write = portable if not is_ours else _as_it_is
    return statement.returning(*(write(name, value) for name, value in columns.items()))


def _as_it_is(name: str, value: ColumnElement[Any]) -> ColumnElement[Any]:
    return value.label(name)
