"""Add tasks, in the transaction of whoever executes these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from psycopg import sql
from sqlalchemy import Insert, Select, SmallInteger, Text, bindparam, cast, column, func, insert, select
from sqlalchemy.dialects.postgresql import INTERVAL, JSONB, TIMESTAMP
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import Integer

from apoq.model import task_class, tasks_table


def _values() -> dict[str, ColumnElement[Any]]:
    # now() is when the caller's transaction began, which may be long ago: a delay counts from the call.
    process_at = func.coalesce(
        bindparam("task_process_at", type_=TIMESTAMP(timezone=True)),
        func.clock_timestamp() + bindparam("task_delay", type_=INTERVAL),
        func.now(),
    )
    return {
        "queue": bindparam("task_queue", type_=Text),
        "type": bindparam("task_type", type_=Text),
        "priority": bindparam("task_priority", type_=SmallInteger),
        "process_at": process_at,
        "retry_limit": bindparam("task_retry_limit", type_=Integer),
        "retry_delay": bindparam("task_retry_delay", type_=INTERVAL),
        "timeout": bindparam("task_timeout", type_=INTERVAL),
    }


# Both insert into the mapped class, not its table: zope.sqlalchemy commits a session only when it has seen
# an ORM statement. "raw" leaves the parameters' names to us.


@cache
def enqueue(schema: str | None) -> Insert:
    """Add one task, and answer its row."""
    data = cast(bindparam("task_data", type_=Text), JSONB)
    return (
        insert(task_class(schema))
        .values(**_values(), created_at=func.now(), data=data)
        .returning(*tasks_table(schema).c)
        .execution_options(dml_strategy="raw")
    )


@cache
def enqueue_many(schema: str | None) -> Insert:
    """Add a task for each line of a text, its data in JSON; all their options are the same."""
    # One text with all of them: an array of texts would have to be quoted, one by one. And lines, which
    # JSON writes as \\n in its strings: PostgreSQL takes them apart faster than the elements of an array.
    lines = func.string_to_table(bindparam("task_data", type_=Text), "\n")
    documents = lines.table_valued(column("document", Text)).render_derived("documents")
    values = {**_values(), "created_at": func.now()}
    return (
        insert(task_class(schema))
        .from_select([*values, "data"], select(*values.values(), cast(documents.c.document, JSONB)))
        .execution_options(dml_strategy="raw")
    )


@cache
def copied_values(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Answer what `enqueue_many` writes beside the data, as texts for COPY; no row where it may not COPY.

    PostgreSQL refuses a COPY to roles that are subject to row-level security.
    """
    values = _values()
    # In a form that is read alike whatever the session's DateStyle and time zone.
    values["process_at"] = func.to_char(func.timezone("UTC", values["process_at"]), _TIME)
    refused = func.row_security_active(_table(schema).as_string())
    return select(*(cast(value, Text).label(name) for name, value in values.items())).where(~refused)


@cache
def copy_many(schema: str | None) -> sql.Composed:
    """Add a task for each line that follows, in COPY's text form; see `copy_lines`."""
    columns = sql.SQL(", ").join(map(sql.Identifier, [*_values(), "data"]))
    return sql.SQL("COPY {} ({}) FROM STDIN").format(_table(schema), columns)


def copy_lines(values: Mapping[str, str | None], documents: Iterable[str]) -> Iterator[str]:
    """Make the lines for `copy_many`, of the row of `copied_values` and each task's data in JSON."""
    start = "".join(
        r"\N" + "\t" if text is None else text.translate(_ESCAPES) + "\t" for text in values.values()
    )
    for document in documents:
        # JSON escapes a tab or a newline by itself.
        yield start + document.replace("\\", r"\\") + "\n"


_TIME = 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'
_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def _table(schema: str | None) -> sql.Identifier:
    name = tasks_table(schema).name
    return sql.Identifier(name) if schema is None else sql.Identifier(schema, name)
