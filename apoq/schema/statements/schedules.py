"""Writes and reads schedules, in the caller's transaction or a worker's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Double,
    FromClause,
    Select,
    SmallInteger,
    Text,
    and_,
    any_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import INTERVAL, JSONB, TIMESTAMP, insert
from sqlalchemy.sql.dml import ReturningDelete, ReturningInsert, ReturningUpdate
from sqlalchemy.types import BigInteger, Integer

from apoq.schema.models import schedule_class, schedules_table, tasks_table
from apoq.schema.statements.clock import now
from apoq.schema.statements.heartbeat import is_alive
from apoq.schema.statements.literals import EPOCH
from apoq.schema.statements.portable import portable
from apoq.schema.tables import workers_table

ADDED: Final = "added"
CODE: Final = "code"
"""The origins of a schedule: an application's call, or a declaration in its code."""

_TYPES: Final[dict[str, Any]] = {
    "queue": Text,
    "name": Text,
    "type": Text,
    "cron": Text,
    "timezone": Text,
    "every": INTERVAL,
    "catch_up": Text,
    "catch_up_limit": Integer,
    "not_before": INTERVAL,
    "jitter": INTERVAL,
    "overlap": Text,
    "priority": SmallInteger,
    "retry_limit": Integer,
    "retry_delay": INTERVAL,
    "timeout": INTERVAL,
    "expires_in": INTERVAL,
    "key": Text,
    "origin": Text,
    "release": TIMESTAMP(timezone=True),
}
_KEY: Final = ("queue", "name")
_FIXED: Final = (*_KEY, "type", "origin")
"""Columns that stay as they are when a schedule is written again."""


@cache
def write_schedule(schema: str | None, *, mapped: bool = False) -> ReturningInsert[Any]:
    """Add a schedule, or change the one that has its name; return the name if that was written.

    Nothing is written if the existing one has another type or origin, or if code of a newer release has
    declared it. A change of its times makes it start from `next_at` (seconds since 1970); any other change
    leaves its next tick as it is. As an ORM statement if `mapped`.
    """
    table = schedules_table(schema)
    new = insert(schedule_class(schema) if mapped else table).values(
        **{name: bindparam(f"schedule_{name}", type_=type_) for name, type_ in _TYPES.items()},
        data=cast(bindparam("schedule_data", type_=Text), JSONB),
        meta=cast(bindparam("schedule_meta", type_=Text), JSONB),
        next_at=_time("schedule_next_at"),
        created_at=func.now(),
    )
    changed: dict[str, Any] = {
        name: new.excluded[name] for name in (*_TYPES, "data", "meta") if name not in _FIXED
    }
    has_new_times = or_(
        *(table.c[name].is_distinct_from(new.excluded[name]) for name in ("cron", "timezone", "every"))
    )
    changed["next_at"] = case((has_new_times, new.excluded.next_at), else_=table.c.next_at)
    written = new.on_conflict_do_update(
        index_elements=[table.c[name] for name in _KEY],
        set_=changed,
        where=and_(
            table.c.type == new.excluded.type,
            table.c.origin == new.excluded.origin,
            or_(table.c.release.is_(None), table.c.release <= new.excluded.release),
        ),
    ).returning(table.c.name)
    return written.execution_options(dml_strategy="raw") if mapped else written


@cache
def look_up(schema: str | None) -> Select[Any]:
    """Return the `now` of the server, and the type, origin and times of a schedule, or NULLs for these.

    Times are in seconds since 1970.
    """
    table = schedules_table(schema)
    # Not now(), the start of the caller's transaction, which may be long ago.
    return select(
        func.date_part(EPOCH, func.clock_timestamp(), type_=Double).label("now"),
        *(func.max(table.c[name]).label(name) for name in ("type", "origin", "cron", "timezone")),
        func.date_part(EPOCH, func.max(table.c.every), type_=Double).label("every"),
    ).where(*_is(table))


@cache
def schedules(schema: str | None, *, by_name: bool = False) -> Select[Any]:
    """Return the schedules of the queue `schedule_queue` for `read_row`, or only `schedule_name`."""
    table = schedules_table(schema)
    return (
        select(*(portable(column.name, column) for column in table.c))
        .where(*(_is(table) if by_name else _is(table)[:1]))
        .order_by(table.c.name)
    )


@cache
def delete_schedule(schema: str | None, *, mapped: bool = False) -> ReturningDelete[Any]:
    """Delete the schedule `schedule_name` of `schedule_queue`, and return its name, if there is one."""
    table = schedules_table(schema)
    deleted = delete(schedule_class(schema) if mapped else table).where(*_is(table)).returning(table.c.name)
    return deleted.execution_options(synchronize_session=False)


@cache
def pause_schedule(schema: str | None) -> ReturningUpdate[Any]:
    """Pause a schedule, and return its name, unless it is paused already."""
    table = schedules_table(schema)
    paused = update(table).where(*_is(table), table.c.paused_at.is_(None)).returning(table.c.name)
    return paused.values(paused_at=now())


@cache
def resume_schedule(schema: str | None) -> ReturningUpdate[Any]:
    """Resume a schedule, and return its name, if it is paused."""
    table = schedules_table(schema)
    resumed = update(table).where(*_is(table), table.c.paused_at.is_not(None)).returning(table.c.name)
    return resumed.values(paused_at=null())


@cache
def add_now(schema: str | None) -> ReturningInsert[Any]:
    """Add a task of a schedule now, in addition to those of its ticks; return its id."""
    tasks, table = tasks_table(schema), schedules_table(schema)
    times = dict.fromkeys(("created_at", "tick_at"), func.now())
    values: dict[str, Any] = {**task_values(table, func.now()), **times}
    found = select(*values.values()).where(*_is(table))
    return insert(tasks).from_select(list(values), found).returning(tasks.c.id)


def task_values(table: FromClause, due: ColumnElement[Any]) -> dict[str, ColumnElement[Any]]:
    """Return the columns of a task that a schedule determines, if the task is due at this time."""
    copied = ("queue", "type", "data", "priority", "retry_limit", "retry_delay", "timeout", "meta", "key")
    return {
        **{name: table.c[name] for name in copied},
        "schedule": table.c.name,
        "process_at": due,
        "expires_at": due + table.c.expires_in,
    }


@cache
def lateness(schema: str | None) -> Select[Any]:
    """Return by how many seconds the latest schedule is late; negative or NULL if none is."""
    table = schedules_table(schema)
    late = func.date_part(EPOCH, func.now(), type_=Double) - func.date_part(
        EPOCH, func.min(table.c.next_at), type_=Double
    )
    return select(late).where(table.c.paused_at.is_(None))


@cache
def all_schedules(schema: str | None) -> Select[Any]:
    """Return up to `at_most` schedules, for people to look at: of all queues or names, or as given.

    They are those of `from_queue`, and those `named` so, if these are not NULL.

    The additional columns are `now`; whether a live worker works on the queue (`is_worked`), and whether one
    may have declared it (`is_declared`); and, of the last tick's task, its state (`last_state`) and since how
    many seconds it has been due (`last_due_for`).
    """
    table, tasks = schedules_table(schema), tasks_table(schema)
    workers = workers_table(schema).alias("its")
    alive = (
        select(workers.c.queues, workers.c.release)
        .where(is_alive(schema, workers.c.id))
        .cte("alive")
        .prefix_with("MATERIALIZED")  # once for all schedules
    )
    works = table.c.queue == any_(alive.c.queues)
    # If newer code still had it, that would have declared it again, under its own release.
    may_declare = or_(alive.c.release.is_(None), alive.c.release <= table.c.release)
    given = (("from_queue", table.c.queue), ("named", table.c.name))
    values = [(bindparam(name, type_=Text), column) for name, column in given]
    last = (
        select(tasks.c.state, tasks.c.process_at)
        .where(tasks.c.id == table.c.last_task_id, tasks.c.schedule == table.c.name)
        .lateral("last")
    )
    due_for = func.date_part(EPOCH, func.now(), type_=Double) - func.date_part(
        EPOCH, last.c.process_at, type_=Double
    )
    return (
        select(
            *table.c,
            func.now().label("now"),
            exists().where(works).label("is_worked"),
            exists().where(works, may_declare).label("is_declared"),
            last.c.state.label("last_state"),
            due_for.label("last_due_for"),
        )
        .select_from(table.outerjoin(last, true()))
        .where(*(or_(value.is_(None), column == value) for value, column in values))
        .order_by(table.c.queue, table.c.name)
        .limit(bindparam("at_most", type_=BigInteger))
    )


def is_orphan(row: Mapping[Any, Any]) -> bool:
    """Return whether the code of a schedule of `all_schedules` has lost it: live workers have newer code."""
    return bool(row["origin"] == CODE and row["is_worked"] and not row["is_declared"])


def _is(table: FromClause) -> tuple[ColumnElement[bool], ...]:
    return tuple(table.c[name] == bindparam(f"schedule_{name}", type_=Text) for name in _KEY)


def _time(name: str) -> ColumnElement[Any]:
    return func.to_timestamp(bindparam(name, type_=Double))
