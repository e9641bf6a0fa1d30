"""Adds tasks, in the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Final

from psycopg import sql
from sqlalchemy import (
    BigInteger,
    Insert,
    Select,
    SmallInteger,
    Table,
    Text,
    bindparam,
    cast,
    column,
    extract,
    func,
    insert,
    inspect,
    select,
)
from sqlalchemy.dialects.postgresql import INTERVAL, JSONB, TIMESTAMP
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import Integer

from apoq.core.options import has_expiry
from apoq.core.states import PENDING
from apoq.postgres.loaders import read_json, read_microseconds
from apoq.schema.models import Task, task_class, tasks_table
from apoq.schema.statements.clock import in_utc


def _given() -> dict[str, ColumnElement[Any]]:
    # NULL stands for the default of the column.
    return {
        "queue": bindparam("task_queue", type_=Text),
        "type": bindparam("task_type", type_=Text),
        "priority": bindparam("task_priority", type_=SmallInteger),
        # Not now(), the start of the caller's transaction, which may be long ago: a delay counts from the
        # call.
        "process_at": func.coalesce(
            bindparam("task_process_at", None, type_=TIMESTAMP(timezone=True)),
            func.clock_timestamp() + bindparam("task_delay", None, type_=INTERVAL),
        ),
        "retry_limit": bindparam("task_retry_limit", type_=Integer),
        "retry_delay": bindparam("task_retry_delay", type_=INTERVAL),
        "timeout": bindparam("task_timeout", type_=INTERVAL),
        "meta": cast(bindparam("task_meta", type_=Text), JSONB),
        "key": bindparam("task_key", type_=Text),
    }


def _given_expiry() -> ColumnElement[Any]:
    return func.coalesce(
        bindparam("task_expires_at", None, type_=TIMESTAMP(timezone=True)),
        func.clock_timestamp() + bindparam("task_expires_in", None, type_=INTERVAL),
    )


def given_values(*, expires: bool = True) -> dict[str, ColumnElement[Any]]:
    """Return the given options, which are parameters, by column; without `expires_at` unless `expires`."""
    given = _given()
    given["process_at"] = func.coalesce(given["process_at"], func.now())
    return {**given, "expires_at": _given_expiry()} if expires else given


# A statement on the mapped class, not on its table, is needed if the session has listeners to ORM statements:
# zope.sqlalchemy commits a session only after one. "raw" lets us choose the names of the parameters.


@cache
def enqueue(schema: str | None, *, mapped: bool = True, given: frozenset[str] | None = None) -> Insert:
    """Add one task and return the values that only the server knows; as an ORM statement if `mapped`.

    `given`: the parameters that it has; by default, all but those of a task that expires. Each parameter
    takes time to convert, and most tasks have few.
    """
    data = cast(bindparam("task_data", type_=Text), JSONB)
    table = tasks_table(schema)
    values = given_values(expires=given is not None)
    if given is not None:
        values = {name: value for name, value in values.items() if not _PARAMETERS[name].isdisjoint(given)}
        values.setdefault("process_at", func.now())  # not the column's default, which no frozen clock reaches
    statement = (
        insert(task_class(schema) if mapped else table)
        .values(**values, created_at=func.now(), data=data)
        .returning(*returned_values(table, expires="expires_at" in values))
    )
    return statement.execution_options(dml_strategy="raw") if mapped else statement


_PARAMETERS: Final[dict[str, frozenset[str]]] = {
    **{name: frozenset({f"task_{name}"}) for name in _given()},
    "process_at": frozenset({"task_process_at", "task_delay"}),
    "expires_at": frozenset({"task_expires_at", "task_expires_in"}),
}
"""The parameters of which a column's value is made, by column."""


def returned_values(table: Table, *, expires: bool) -> list[ColumnElement[Any]]:
    """Return the columns that `added_row` takes."""
    # As numbers, to be independent of the session's DateStyle; these times can't be infinite.
    names = ("created_at", "process_at", *(("expires_at",) if expires else ()))
    return [table.c.id, *(microseconds(table.c[name]) for name in names)]


def added_row(parameters: Mapping[str, Any], returned: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the row that `enqueue` added; to read all of it from the server would cost a sixth of `add`."""
    return {
        **_DEFAULTS,
        "queue": parameters["task_queue"],
        "type": parameters["task_type"],
        "data": read_json(parameters["task_data"]),
        "priority": parameters["task_priority"],
        "retry_limit": parameters["task_retry_limit"],
        "retry_delay": parameters["task_retry_delay"],
        "timeout": parameters["task_timeout"],
        "meta": None if parameters["task_meta"] is None else read_json(parameters["task_meta"]),
        "key": parameters["task_key"],
        "unique_key": parameters.get("task_unique_key"),
        "held_unique_key": parameters.get("task_unique_key"),
        "unique_until_end": parameters.get("unique_until_end"),
        "id": returned["id"],
        "created_at": read_microseconds(returned["created_at"]),
        "process_at": read_microseconds(returned["process_at"]),
        "expires_at": read_microseconds(returned["expires_at"]) if has_expiry(parameters) else None,
    }


def microseconds(time: ColumnElement[Any]) -> ColumnElement[int]:
    """Return a time for `added_row`, as a number that doesn't depend on the session."""
    return cast(extract("epoch", in_utc(time)) * 1_000_000, BigInteger).label(time.key)


_DEFAULTS: Final[dict[str, Any]] = {
    **dict.fromkeys(inspect(Task).columns.keys()),
    "state": PENDING,
    "fail_count": 0,
    "attempt": 0,
    "rescue_count": 0,
    "claim_token": 0,
    "prefetched": False,
}
"""The values of a new task by its columns' defaults. The generated column is None while it is pending."""


@cache
def enqueue_many(schema: str | None, *, expires: bool = False) -> Insert:
    """Add a task for each line of a text: the line is its data as JSON; all tasks have the same options.

    `expires` as for `enqueue`.
    """
    # One text for all tasks: in an array, each of them would have to be quoted. Separated by newlines, which
    # JSON escapes as \\n: PostgreSQL splits lines faster than the elements of an array.
    lines = func.string_to_table(bindparam("task_data", type_=Text), "\n")
    documents = lines.table_valued(column("document", Text)).render_derived("documents")
    values = {**given_values(expires=expires), "created_at": func.now()}
    return (
        insert(task_class(schema))
        .from_select([*values, "data"], select(*values.values(), cast(documents.c.document, JSONB)))
        .execution_options(dml_strategy="raw")
    )


@cache
def copied_values(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the given options of a task as texts for COPY; no row if the role can't use COPY.

    Options that aren't given are NULL. PostgreSQL refuses COPY to roles that are subject to row-level
    security.
    """
    values = {**_given(), "expires_at": _given_expiry()}
    # In a format that doesn't depend on the session's DateStyle and time zone.
    for name in ("process_at", "expires_at"):
        values[name] = func.to_char(func.timezone("UTC", values[name]), _TIME)
    refused = func.row_security_active(_table(schema).as_string())
    return select(*(cast(value, Text).label(name) for name, value in values.items())).where(~refused)


@cache
def copy_many(schema: str | None, *given: str) -> sql.Composed:
    """Add a task for each line that follows, in COPY's text format; see `copy_lines`.

    The lines have only the given columns: reading all columns from each line takes the server a tenth longer
    than using their defaults.
    """
    columns = sql.SQL(", ").join(map(sql.Identifier, [*given, "data"]))
    return sql.SQL("COPY {} ({}) FROM STDIN").format(_table(schema), columns)


def copy_lines(given: Iterable[str], documents: Iterable[str]) -> Iterator[str]:
    """Yield the lines for `copy_many`, with the given columns and each task's data as JSON."""
    start = "".join(text.translate(_ESCAPES) + "\t" for text in given)
    for document in documents:
        # Tabs and newlines are already escaped in JSON.
        yield start + document.replace("\\", r"\\") + "\n"


_TIME = 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'
_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def _table(schema: str | None) -> sql.Identifier:
    name = tasks_table(schema).name
    return sql.Identifier(name) if schema is None else sql.Identifier(schema, name)
