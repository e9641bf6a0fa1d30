"""Makes `Task` and `Schedule` objects from values, without a query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from sqlalchemy.orm import make_transient_to_detached

from apoq.schema.models import ADD_OUTCOME, AddOutcome, Base, Schedule, Task, schedule_class, task_class

M = TypeVar("M", bound=Base)


def with_outcome(task: Task, outcome: AddOutcome) -> Task:
    """Return a task that `add` returns, with what the call did."""
    task.__dict__[ADD_OUTCOME] = outcome
    return task


def unsaved(schema: str | None, values: Mapping[str, Any]) -> Task:
    """Return a `Task` with these values that is not in the database."""
    made = task_class(schema).__new__(task_class(schema))
    task_class(schema).__init__(made)
    made.__dict__.update(values)
    return made


def detached(schema: str | None, row: Mapping[Any, Any]) -> Task:
    """Return a `Task` with the values of a row, as if it were loaded and detached from its session."""
    return _detached(task_class(schema), row)


def detached_schedule(schema: str | None, row: Mapping[Any, Any]) -> Schedule:
    """Return a `Schedule` in the same way."""
    return _detached(schedule_class(schema), row)


def _detached(mapped: type[M], row: Mapping[Any, Any]) -> M:
    made = mapped.__new__(mapped)
    # Without the validators, which check new values, not those from the database.
    mapped.__init__(made)
    made.__dict__.update(row)
    make_transient_to_detached(made)
    return made
