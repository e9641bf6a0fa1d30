"""Finds tasks for a page of a list, in the order of an index, however many tasks there are.

Each statement reads at most `per_level` index entries of each queue, or of each level of a queue.
A row has what `apoq.monitor.browse` needs to filter and to order tasks, and `read_briefs` reads the details
of those that are shown.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    FromClause,
    Integer,
    Select,
    Text,
    any_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    null,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP

from apoq.core.states import CANCELLED, COMPLETED, FAILED, WAITING
from apoq.schema.models import schedules_table, tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.levels import level
from apoq.schema.statements.schedules import all_schedules
from apoq.schema.statements.states import has_running_state, is_in, is_pending
from apoq.schema.statements.survey import pending_levels
from apoq.schema.tables import claims_table, progress_table

INLINE: Final = 2_000
"""Bytes of stored data or of an error that PostgreSQL keeps in the row, so that it reads no other block."""

MAX_LEVELS: Final = 20
"""How many levels of a queue are looked at."""

_EDGE_ID: Final = bindparam("edge_id", type_=BigInteger)
_EDGE_TIME: Final = bindparam("edge_time", type_=TIMESTAMP(timezone=True))
_PER_LEVEL: Final = bindparam("per_level", type_=BigInteger)


@cache
def browse_completed(schema: str | None) -> Select[Any]:
    """Return the tasks of `in_queues` that completed at `edge_time` or earlier, the last ones."""
    tasks = tasks_table(schema)
    return _ended(tasks, is_in(tasks, COMPLETED), tasks.c.completed_at)


@cache
def browse_failed(schema: str | None) -> Select[Any]:
    """Return the failed and cancelled tasks of `in_queues` that ended at `edge_time` or earlier."""
    tasks = tasks_table(schema)
    ended_at = func.coalesce(tasks.c.cancelled_at, tasks.c.failed_at, tasks.c.process_at)
    return _ended(tasks, is_in(tasks, FAILED, CANCELLED), ended_at)


@cache
def browse_pending(schema: str | None) -> Select[Any]:
    """Return pending tasks of `in_queues` that are due after `edge_time` and `edge_id`, the first ones.

    With `from_now`, only tasks that are not due yet; with `until_now`, only due ones.
    """
    tasks, queues = tasks_table(schema), _queues()
    all_levels = pending_levels(schema, queues.c.queue)
    some = select(all_levels.c.level).where(all_levels.c.level.is_not(None)).limit(MAX_LEVELS)
    levels = some.correlate(queues).lateral("levels")
    place = tuple_(tasks.c.process_at, tasks.c.id)
    found = (
        select(*_light(tasks, tasks.c.process_at, levels.c.level))
        .where(
            tasks.c.queue == queues.c.queue,
            level(tasks) == levels.c.level,
            is_pending(tasks),
            place > tuple_(_EDGE_TIME, _EDGE_ID),
            tasks.c.process_at > _bound("from_now", "-infinity"),
            tasks.c.process_at <= _bound("until_now", "infinity"),
        )
        .order_by(tasks.c.process_at, tasks.c.id)
        .limit(_PER_LEVEL)
        .correlate(queues, levels)
        .lateral("found")
    )
    return select(*found.c).select_from(queues.join(levels, true()).join(found, true()))


@cache
def browse_waiting(schema: str | None) -> Select[Any]:
    """Return waiting tasks of `in_queues` with an id lower than `edge_id`, the newest ones."""
    tasks, queues = tasks_table(schema), _queues()
    found = (
        select(*_light(tasks, tasks.c.created_at))
        .where(tasks.c.queue == queues.c.queue, is_in(tasks, WAITING), tasks.c.id < _EDGE_ID)
        .order_by(tasks.c.id.desc())
        .limit(_PER_LEVEL)
        .correlate(queues)
        .lateral("found")
    )
    return select(*found.c).select_from(queues.join(found, true()))


@cache
def browse_running(schema: str | None) -> Select[Any]:
    """Return running tasks of all queues: those among `per_level` ids in the log of claims."""
    tasks = tasks_table(schema)
    noted = select(func.unnest(claims_table(schema).c.task_ids)).limit(_PER_LEVEL).subquery()
    is_noted = tasks.c.id == any_(func.array(select(noted).scalar_subquery()))
    return select(*_light(tasks, tasks.c.claimed_at)).where(is_noted, has_running_state(tasks))


@cache
def browse_all(schema: str | None) -> Select[Any]:
    """Return the newest tasks with an id lower than `edge_id`, of all queues and states."""
    tasks = tasks_table(schema)
    return (
        select(*_light(tasks, tasks.c.created_at))
        .where(tasks.c.id < _EDGE_ID)
        .order_by(tasks.c.id.desc())
        .limit(_PER_LEVEL)
    )


@cache
def count_in_state(schema: str | None, state: str) -> Select[Any]:
    """Count the tasks of `in_queues` in a state that an index has, among `counted` entries of the index."""
    tasks, queues = tasks_table(schema), _queues()
    is_shared = state in {FAILED, CANCELLED}
    its_index = is_in(tasks, FAILED, CANCELLED) if is_shared else is_in(tasks, state)
    counted = bindparam("counted", type_=BigInteger)
    # Nothing that the index doesn't have: it isn't sorted, because sorting would read the rows.
    entry = (
        select((tasks.c.indexed_state == state if is_shared else true()).label("is_its"))
        .where(tasks.c.queue == queues.c.queue, its_index)
        .limit(counted)
        .correlate(queues)
        .lateral("entry")
    )
    found = select(entry.c.is_its).select_from(queues.join(entry, true())).limit(counted).subquery("found")
    number: Select[Any] = select(func.count().filter(found.c.is_its).label("number"))
    return number.add_columns(func.count().label("examined")).select_from(found)


@cache
def find_holders(schema: str | None) -> Select[Any]:
    """Return the tasks of `in_queues` that hold the unique key `held_key`, one for each queue at most."""
    tasks = tasks_table(schema)
    return select(*_light(tasks, tasks.c.created_at)).where(
        tasks.c.queue == any_(bindparam("in_queues", type_=ARRAY(Text))),
        tasks.c.held_unique_key == bindparam("held_key", type_=Text),
    )


@cache
def read_briefs(schema: str | None) -> Select[Any]:
    """Return what a list shows of the tasks `ids`, with short data only, and the beginning of the error."""
    tasks = tasks_table(schema)
    excerpt = bindparam("excerpt", type_=Integer)
    names = (
        *("id", "queue", "type", "state", "priority", "attempt", "fail_count", "retry_limit"),
        *("created_at", "process_at", "claimed_at", "completed_at", "failed_at", "cancelled_at"),
        *("unique_key", "key", "schedule", "waiting_for"),
    )
    size = func.pg_column_size(tasks.c.data, type_=BigInteger)
    return select(
        *(tasks.c[name] for name in names),
        case((size < INLINE, cast(tasks.c.data, Text))).label("data"),
        size.label("data_size"),
        func.left(tasks.c.error["class"].as_string(), excerpt).label("error_class"),
        func.left(tasks.c.error["message"].as_string(), excerpt).label("error_message"),
    ).where(tasks.c.id == any_(bigints("ids")))


@cache
def read_errors(schema: str | None) -> Select[Any]:
    """Return the errors of the tasks `ids`, for grouping: with the end of the traceback."""
    tasks = tasks_table(schema)
    error = {name: tasks.c.error[name].as_string() for name in ("class", "message", "traceback")}
    return select(
        *(tasks.c.id, tasks.c.queue, tasks.c.type, tasks.c.failed_at),
        error["class"].label("class"),
        func.left(error["message"], bindparam("excerpt", type_=Integer)).label("message"),
        func.right(error["traceback"], literal_column("4000", Integer)).label("traceback"),
        func.clock_timestamp().label("now"),
    ).where(tasks.c.id == any_(bigints("ids")))


@cache
def read_task(schema: str | None) -> Select[Any]:
    """Return everything about the task `task_id`; its data and result only up to `largest` stored bytes."""
    tasks, progress = tasks_table(schema), progress_table(schema)
    largest = bindparam("largest", type_=BigInteger)

    def text(column: ColumnElement[Any]) -> ColumnElement[Any]:
        return case((func.pg_column_size(column) <= largest, cast(column, Text)))

    long = ("data", "meta", "result")
    found = select(
        *(column for column in tasks.c if column.name not in (*long, "error")),
        *(text(tasks.c[name]).label(name) for name in long),
        *(func.pg_column_size(tasks.c[name], type_=BigInteger).label(f"{name}_size") for name in long),
        case((func.pg_column_size(tasks.c.error) <= largest, tasks.c.error)).label("error"),
        *(progress.c[name].label(f"progress_{name}") for name in ("done", "total", "note", "at")),
        func.clock_timestamp().label("now"),
    )
    its = tasks.outerjoin(progress, progress.c.task_id == tasks.c.id)
    return found.select_from(its).where(tasks.c.id == bindparam("task_id", type_=BigInteger))


@cache
def browse_schedules(schema: str | None) -> Select[Any]:
    """Return up to `at_most` schedules that follow `after_name` of `after_queue`; see `all_schedules`."""
    table = schedules_table(schema)
    edge = tuple_(bindparam("after_queue", type_=Text), bindparam("after_name", type_=Text))
    return all_schedules(schema).where(tuple_(table.c.queue, table.c.name) > edge)


def _queues() -> FromClause:
    names = func.unnest(bindparam("in_queues", type_=ARRAY(Text)), type_=Text)
    return select(names.label("queue")).subquery("queues")


def _bound(name: str, otherwise: str) -> ColumnElement[Any]:
    """Return the current time if the parameter is true, otherwise an infinite time."""
    infinite = cast(literal_column(f"'{otherwise}'", Text), TIMESTAMP(timezone=True))
    return case((bindparam(name, type_=Boolean), func.now()), else_=infinite)


def _ended(tasks: Any, condition: ColumnElement[bool], at: ColumnElement[Any]) -> Select[Any]:
    queues = _queues()
    found = (
        select(*_light(tasks, at))
        .where(tasks.c.queue == queues.c.queue, condition, at <= _EDGE_TIME)
        .order_by(at.desc())
        .limit(_PER_LEVEL)
        .correlate(queues)
        .lateral("found")
    )
    return select(*found.c).select_from(queues.join(found, true()))


def _light(
    tasks: Any, at: ColumnElement[Any], its_level: ColumnElement[Any] | None = None
) -> tuple[ColumnElement[Any], ...]:
    error_class = tasks.c.error["class"].as_string()
    return (
        tasks.c.id,
        at.label("at"),
        (cast(null(), Integer) if its_level is None else its_level).label("level"),
        *(tasks.c[name] for name in ("queue", "state", "type", "unique_key", "key", "fail_count")),
        case((bindparam("with_error", type_=Boolean), error_class)).label("error_class"),
    )
