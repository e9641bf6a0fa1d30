"""Writes completions, and reads back as much of the tasks as listeners need."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Delete, Executable, Update, select

from apoq.core.outcomes import Release
from apoq.events import COMPLETED, Events
from apoq.postgres.connections import compiled
from apoq.schema.models import tasks_table
from apoq.schema.statements.mark import with_edges
from apoq.schema.statements.portable import portable, read_row
from apoq.schema.statements.results import complete_last_with_result, complete_with_results
from apoq.schema.statements.settle import AS_COMPLETED, complete, complete_last, remove, remove_last
from apoq.tracing import untraced
from apoq.worker.execution.attempt import AnyAttempt


class Completion:
    """Marks tasks as completed, or deletes them if completed tasks aren't kept."""

    def __init__(self, events: Events, *, keep: bool) -> None:
        self._events = events
        self.keep = keep

    @property
    def has_listeners(self) -> bool:
        """Whether there are listeners to `task.completed`."""
        return self._events.has_listeners(COMPLETED)

    def statement(
        self,
        schema: str | None,
        *,
        full: bool,
        alike: bool,
        skips_locked: bool = False,
        linked: bool = False,
    ) -> Executable:
        """Return the statement that completes tasks and returns their ids, or their rows if `full`.

        `alike`: they have the same claim token. `skips_locked`: except those that another session has locked.
        Without `linked`, those that other tasks wait for are left out; with it, `is_followed` is returned.
        """
        write = complete if self.keep else remove
        statement = write(schema, alike=alike, skips_locked=skips_locked, linked=linked)
        return _returning(statement, schema, full=full, linked=linked)

    def statement_with_results(
        self, schema: str | None, *, full: bool, skips_locked: bool = False, linked: bool = False
    ) -> Executable:
        """Return the statement that completes tasks with `results`; see `statement`."""
        statement = complete_with_results(schema, skips_locked=skips_locked, linked=linked)
        return _returning(statement, schema, full=full, linked=linked)

    def write(
        self, connection: Connection, attempt: AnyAttempt, result: str | None
    ) -> Mapping[Any, Any] | None:
        """Complete a task, with its result if there is one, in a transaction that is about to be committed.

        Returns its id, or its row if there are listeners, and None if the worker no longer owns it. If other
        tasks wait for it, `is_followed` is true. Raises `Release` if the worker's lease has ended, because
        another worker may have begun the task.
        """
        if not attempt.lease.is_held:
            raise Release
        schema = attempt.from_queue.schema
        parameters: dict[str, Any] = {"task_id": attempt.id, "held_under": attempt.claim_token}
        if result is not None:
            statement: Update | Delete = complete_last_with_result(schema)
            parameters["result"] = result
        else:
            statement = complete_last(schema) if self.keep else remove_last(schema)
        if self.has_listeners:
            # On the processor's connection, which may have any DateStyle.
            with untraced():
                found = connection.execute(
                    _returning(statement, schema, full=True, is_ours=False), parameters
                )
            row = found.mappings().first()
            return self._write_linked(connection, schema, parameters) if row is None else read_row(row)
        # Each task needs one of these. As text, it takes half of the time that SQLAlchemy needs.
        text, _ = compiled(statement)
        with untraced():
            written = connection.exec_driver_sql(text, parameters)
        return {"id": attempt.id} if written.rowcount else self._write_linked(connection, schema, parameters)

    def _write_linked(
        self, connection: Connection, schema: str | None, parameters: dict[str, Any]
    ) -> Mapping[Any, Any] | None:
        """Complete a task that other tasks wait for."""
        if "result" in parameters:
            statement: Update | Delete = complete_last_with_result(schema, linked=True)
        else:
            statement = (complete_last if self.keep else remove_last)(schema, linked=True)
        returning = _returning(statement, schema, full=self.has_listeners, is_ours=False, linked=True)
        with untraced():
            # At SERIALIZABLE, a scan of the whole table would conflict with each other task of a group.
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            row = connection.execute(returning, parameters).mappings().first()
        return None if row is None else read_row(row)


def reported_columns(schema: str | None) -> list[ColumnElement[Any]]:
    """Return the columns that listeners get of an ended task: all except its data, which is known."""
    return [column for column in tasks_table(schema).c if column.key != "data"]


@cache
def _returning(
    statement: Update | Delete,
    schema: str | None,
    *,
    full: bool,
    is_ours: bool = True,
    linked: bool = False,
) -> Executable:
    tasks = tasks_table(schema)
    write = portable if not is_ours else _as_it_is
    is_removed = isinstance(statement, Delete) and full
    if not linked and not is_removed:
        columns = reported_columns(schema) if full else [tasks.c.id]
        return statement.returning(*(write(str(column.key), column) for column in columns))
    columns = reported_columns(schema) if full else [tasks.c.id, tasks.c.is_followed]
    if linked:
        found, ended = with_edges(statement, schema, columns)
    else:
        ended = statement.returning(*columns).cte("removed")
        found = select().select_from(ended)
    # A task that is deleted is reported as if it were marked as completed. Not by RETURNING, in which Citus
    # accepts no function that reads the clock.
    values = {**ended.c, **(AS_COMPLETED if is_removed else {})}
    names = [str(column.key) for column in columns]
    return found.add_columns(*(write(name, values[name]) for name in names))


def _as_it_is(name: str, value: ColumnElement[Any]) -> ColumnElement[Any]:
    return value.label(name)
