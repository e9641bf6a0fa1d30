"""How completions are written, and how much of the tasks is read back."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Executable, func, literal_column

from apoq.events import COMPLETED as TASK_COMPLETED
from apoq.events import Events
from apoq.model import tasks_table
from apoq.statements.settle import complete, remove
from apoq.states import COMPLETED


class Completion:
    """Writes completions: tasks are marked, or deleted where completed ones aren't kept."""

    def __init__(self, events: Events, *, keep: bool) -> None:
        self._events = events
        self._keep = keep

    def statement(self, schema: str | None) -> Executable:
        """Complete the tasks of `ids`; answer their ids, or their whole rows where somebody listens."""
        return _statement(schema, self._keep, self._events.heard(TASK_COMPLETED))

    def last_statement(self, schema: str | None) -> Executable:
        """Complete the task of `ids` in a transaction that is about to be committed."""
        return _statement(schema, self._keep, self._events.heard(TASK_COMPLETED), _UNLESS_FROZEN)


_UNLESS_FROZEN = func.set_config("idle_in_transaction_session_timeout", "5s", True)
"""Until the commit, the row is locked: a worker that is frozen before it must not keep it so."""


@cache
def _statement(schema: str | None, keep: bool, full: bool, *more: ColumnElement[Any]) -> Executable:
    tasks = tasks_table(schema)
    columns: list[ColumnElement[Any]] = [*tasks.c] if full else [tasks.c.id]
    if keep:
        return complete(schema).returning(*columns, *more)
    # What is deleted is told of as it would stand there.
    ended: dict[str, ColumnElement[Any]] = {
        "state": literal_column(f"'{COMPLETED}'").label("state"),
        "completed_at": func.clock_timestamp().label("completed_at"),
    }
    return remove(schema).returning(*[ended.get(column.key or "", column) for column in columns], *more)
