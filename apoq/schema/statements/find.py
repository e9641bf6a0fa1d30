"""Finds tasks for people to look at, without reading a whole table."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Integer,
    Select,
    Subquery,
    Table,
    Text,
    any_,
    bindparam,
    case,
    cast,
    func,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP

from apoq.core.states import CANCELLED, COMPLETED, FAILED, RUNNING
from apoq.schema.models import INTERNAL, tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.running import in_state
from apoq.schema.tables import progress_table, workers_table

LOOKED_AT: Final = 100_000
"""How many tasks `find` examines, because no index has the types, the errors, or all the times of tasks."""

LARGE: Final = ("data", "result")
"""Columns that may be large, and that `details` returns as text."""

TRACEBACK_END: Final = 4_000
"""How many characters of a traceback `failed_tasks` returns: its end has the innermost frames."""


@cache
def find(schema: str | None, state: str | None) -> Select[*tuple[Any, ...]]:
    """Return up to `at_most` tasks of a `state` (None: of any), the newest first.

    Only tasks with an id of `up_to_id` at most. A filter that is null is not applied: `in_queue`, `of_type`,
    `error_class` (the class of the last error) and `since` (see `happened_at`). With `is_retrying`, only
    tasks that have failed before and wait for their next attempt. Of the tasks that an index finds, only the
    newest `LOOKED_AT` are examined; `horizon` returns how far that is. Data is cut to `excerpt` characters.
    """
    recent = _recent(schema, state)
    return (
        select(
            *(column for column in recent.c if column.name != "data"),
            func.left(cast(recent.c.data, Text), bindparam("excerpt", type_=Integer)).label("data"),
            func.clock_timestamp().label("now"),
        )
        .where(*_filters(recent.c))
        .order_by(recent.c.id.desc())
        .limit(bindparam("at_most", type_=BigInteger))
    )


@cache
def horizon(schema: str | None, state: str | None) -> Select[*tuple[Any, ...]]:
    """Return how many tasks `find` examines with the same parameters, and the lowest id of them."""
    recent = _recent(schema, state)
    return select(func.count().label("looked_at"), func.min(recent.c.id).label("lowest_id"))


@cache
def find_ids(schema: str | None, state: str) -> Select[*tuple[Any, ...]]:
    """Return ids and queues of up to `at_most` tasks of a `state`, the oldest first; filters as in `find`."""
    tasks = tasks_table(schema)
    return (
        select(tasks.c.id, tasks.c.queue)
        .where(in_state(schema, tasks, state), *_filters(tasks.c))
        .order_by(tasks.c.id)
        .limit(bindparam("at_most", type_=BigInteger))
    )


@cache
def failed_tasks(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the newest `at_most` tasks that failed permanently: what is needed to group them.

    With the error's `class`, its `message` cut to `excerpt` characters, and the end of its `traceback`.
    """
    tasks = tasks_table(schema)
    error = {name: tasks.c.error[name].as_string() for name in ("class", "message", "traceback")}
    excerpt = bindparam("excerpt", type_=Integer)
    return (
        select(
            *(tasks.c.id, tasks.c.queue, tasks.c.type, tasks.c.failed_at),
            error["class"].label("class"),
            func.left(error["message"], excerpt).label("message"),
            func.right(error["traceback"], TRACEBACK_END).label("traceback"),
            func.clock_timestamp().label("now"),
        )
        .where(in_state(schema, tasks, FAILED), *_filters(tasks.c))
        .order_by(tasks.c.id.desc())
        .limit(bindparam("at_most", type_=BigInteger))
    )


@cache
def find_queues(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the ids and queues of those tasks of `ids` that exist."""
    tasks = tasks_table(schema)
    return select(tasks.c.id, tasks.c.queue).where(tasks.c.id == any_(bigints("ids"))).order_by(tasks.c.id)


@cache
def details(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return everything that is stored about the task `task_id`.

    With its data and its result as text, its progress, the database's time (`now`), and the host and the pid
    of the worker that claimed it last, if that worker still has a row.
    """
    tasks, workers, progress = tasks_table(schema), workers_table(schema), progress_table(schema)
    return (
        select(
            *(column for column in _columns(tasks) if column.name not in LARGE),
            *(cast(tasks.c[name], Text).label(name) for name in LARGE),
            *(progress.c[name].label(f"progress_{name}") for name in ("done", "total", "note", "at")),
            workers.c.host.label("worker_host"),
            workers.c.pid.label("worker_pid"),
            func.clock_timestamp().label("now"),
        )
        .select_from(
            tasks.outerjoin(workers, workers.c.id == tasks.c.worker_id).outerjoin(
                progress, progress.c.task_id == tasks.c.id
            )
        )
        .where(tasks.c.id == bindparam("task_id", type_=BigInteger))
    )


def happened_at(columns: Any) -> ColumnElement[Any]:
    """Return the time that `since` is compared with: of what happened last to a task in its state.

    When it ended; if it is running, when it was claimed; otherwise, when it was added.
    """
    ended_at = func.coalesce(columns.cancelled_at, columns.failed_at, columns.process_at)
    return case(
        (columns.state == COMPLETED, columns.completed_at),
        (or_(columns.state == FAILED, columns.state == CANCELLED), ended_at),
        (columns.state == RUNNING, func.coalesce(columns.claimed_at, columns.created_at)),
        else_=columns.created_at,
    )


def _columns(tasks: Table) -> list[ColumnElement[Any]]:
    return [column for column in tasks.c if column.name not in INTERNAL]


def _recent(schema: str | None, state: str | None) -> Subquery:
    # The limit comes before the filters that have no index. The index of a state begins with the queue.
    tasks = tasks_table(schema)
    by_index = (
        [] if state is None else [in_state(schema, tasks, state), _given("in_queue", Text, tasks.c.queue)]
    )
    return (
        select(*(column for column in _columns(tasks) if column.name != "result"))
        .where(tasks.c.id <= bindparam("up_to_id", type_=BigInteger), *by_index)
        .order_by(tasks.c.id.desc())
        .limit(LOOKED_AT)
        .subquery("recent")
    )


def _filters(columns: Any) -> tuple[ColumnElement[bool], ...]:
    since = bindparam("since", type_=TIMESTAMP(timezone=True))
    is_retrying = bindparam("is_retrying", False, type_=Boolean)
    error_class = bindparam("error_class", None, type_=Text)
    return (
        _given("in_queue", Text, columns.queue),
        _given("of_type", Text, columns.type),
        or_(since.is_(None), happened_at(columns) >= since),
        or_(~is_retrying, columns.fail_count > 0),
        or_(error_class.is_(None), columns.error["class"].as_string() == error_class),
    )


def _given(name: str, kind: Any, column: ColumnElement[Any]) -> ColumnElement[bool]:
    """Compare a column with a parameter, unless the parameter is null."""
    value = bindparam(name, type_=kind)
    return or_(value.is_(None), column == value)
