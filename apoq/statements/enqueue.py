"""Add tasks, in the transaction of whoever executes these."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import Insert, SmallInteger, Text, bindparam, cast, column, func, insert, select
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
    }


# Both insert into the mapped class, not its table: zope.sqlalchemy commits a session only when it has seen
# an ORM statement. "raw" leaves the parameters' names to us.


@cache
def enqueue(schema: str | None) -> Insert:
    """Add one task, and answer its row."""
    data = cast(bindparam("task_data", type_=Text), JSONB)
    return (
        insert(task_class(schema))
        .values(**_values(), data=data)
        .returning(*tasks_table(schema).c)
        .execution_options(dml_strategy="raw")
    )


@cache
def enqueue_many(schema: str | None) -> Insert:
    """Add a task for each element of a JSON array; all their options are the same."""
    # One text with all of them: an array of texts would have to be quoted, one by one.
    array = cast(bindparam("task_data", type_=Text), JSONB)
    documents = (
        func.jsonb_array_elements(array).table_valued(column("document", JSONB)).render_derived("documents")
    )
    values = _values()
    return (
        insert(task_class(schema))
        .from_select([*values, "data"], select(*values.values(), documents.c.document))
        .execution_options(dml_strategy="raw")
    )
