"""Times and intervals as numbers, for the caller's connection, with any DateStyle and IntervalStyle.

psycopg can read only one style of each as text. On apoq's own connections they are sent in binary format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import ColumnElement, Numeric, cast, extract
from sqlalchemy.dialects.postgresql import INTERVAL, TIMESTAMP

from apoq.postgres.loaders import read_length, read_time
from apoq.schema.models import schedules_table, tasks_table
from apoq.schema.statements.clock import in_utc
from apoq.schema.tables import progress_table

_READERS: Final = {TIMESTAMP: read_time, INTERVAL: read_length}
_COLUMNS: Final = {
    column.name: _READERS[type(column.type)]
    for table in (tasks_table(None), schedules_table(None), progress_table(None))
    for column in table.c
    if type(column.type) in _READERS
}
"""The columns of tasks, schedules and progress that are sent as numbers, and the functions that read them."""


def portable(name: str, value: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return the value of a column of a task, a schedule or a progress as an expression for `read_row`."""
    if name not in _COLUMNS:
        return value.label(name)
    if _COLUMNS[name] is read_time:
        return cast(extract("epoch", in_utc(value)), Numeric).label(name)
    # As in psycopg, a year of an interval is 365 days, not 365.25.
    seconds = cast(extract("epoch", value), Numeric) - cast(extract("year", value), Numeric) * 21_600
    return seconds.label(name)


def read_row(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values of columns that were selected by `portable`."""
    return {
        name: _COLUMNS[name](value) if value is not None and name in _COLUMNS else value
        for name, value in row.items()
    }
