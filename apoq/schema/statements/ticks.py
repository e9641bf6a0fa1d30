"""Turns the ticks of schedules into tasks, in a worker's transaction.

All times are seconds since 1970, and lists are arrays: one statement is for many schedules.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    FromClause,
    Integer,
    Select,
    Table,
    Text,
    Update,
    bindparam,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql.dml import ReturningInsert
from sqlalchemy.sql.selectable import TableValuedAlias

from apoq.core.schedules import SKIP
from apoq.core.states import PENDING, RUNNING, WAITING
from apoq.schema.models import schedules_table, tasks_table
from apoq.schema.statements.literals import EPOCH, MAX_INTEGER_MINUS_ONE
from apoq.schema.statements.schedules import task_values


@cache
def next_ticks(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return one row: the server's `now`, and when the first schedule of `queues` is due, if there is one.

    The third column is when the first one is due that isn't due now. The schedules whose queues are in
    `passed_queues` and names in `passed_names` are left out.
    """
    queues = _array("queues", Text, "queue")
    now = func.now()
    earliest = _first(schema, queues).lateral("earliest")
    later = _first(schema, queues, schedules_table(schema).c.next_at > now).lateral("later")
    return select(
        _epoch(now).label("now"),
        func.min(_epoch(earliest.c.next_at)).label("earliest"),
        func.min(_epoch(later.c.next_at)).label("later"),
    ).select_from(queues.outerjoin(earliest, true()).outerjoin(later, true()))


@cache
def lock_due(schema: str | None) -> Select[Any]:
    """Lock and return up to `at_most` schedules of `queues` that are due at `at`, or now if that is NULL.

    Schedules that another session has locked are skipped, so each is ticked by one worker at a time.
    """
    table = schedules_table(schema)
    queues = _array("queues", Text, "queue")
    now = func.coalesce(func.to_timestamp(bindparam("at", type_=Double)), func.now())
    at_most = bindparam("at_most", type_=BigInteger)
    texts = ("queue", "name", "cron", "timezone", "catch_up", "catch_up_limit")
    times = ("every", "not_before", "jitter", "next_at")
    due = (
        select(*(table.c[name] for name in (*texts, *times)))
        .where(*_is_active(table, queues), table.c.next_at <= now)
        .order_by(table.c.next_at)
        .limit(at_most)
        .with_for_update(skip_locked=True)
        .lateral("due")
    )
    return (
        select(
            *(due.c[name] for name in texts),
            *(_epoch(due.c[name]).label(name) for name in times),
            _epoch(now).label("now"),
        )
        .select_from(queues.join(due, true()))
        # Ends the scans early, so that no row is locked without being taken.
        .limit(at_most)
    )


@cache
def add_ticks(schema: str | None) -> ReturningInsert[Any]:
    """Add a task for each tick, given by its `queues`, `names`, `ticks` and `due_times`; return their ids.

    With ``overlap="skip"``, a tick is left out if the last tick's task has not ended. The schedules must be
    locked: this statement then sees the tasks of all earlier ticks.
    """
    table, tasks = schedules_table(schema), tasks_table(schema)
    ticks = _ticks("ticks", "due_times")
    last = tasks.alias("last")
    is_busy = exists().where(
        last.c.id == table.c.last_task_id,
        last.c.schedule == table.c.name,
        last.c.state.in_([literal_column(f"'{state}'", Text) for state in (PENDING, WAITING, RUNNING)]),
    )
    values: dict[str, Any] = {
        **task_values(table, func.to_timestamp(ticks.c.due_times)),
        "tick_at": func.to_timestamp(ticks.c.ticks),
        "created_at": func.now(),
    }
    found = (
        select(*values.values())
        .select_from(ticks.join(table, _is_of(ticks, table)))
        .where(or_(table.c.overlap != literal_column(f"'{SKIP}'", Text), ~is_busy))
        .order_by(ticks.c.ticks)
    )
    return (
        insert(tasks).from_select(list(values), found).returning(tasks.c.id, tasks.c.queue, tasks.c.schedule)
    )


@cache
def move_on(schema: str | None) -> Update:
    """Write what has become of locked schedules, given by `queues` and `names`, and when they are due next.

    `last_ticks` and `task_ids` are NULL if there were none, and `skipped` is the number of skipped ticks.
    """
    table = schedules_table(schema)
    ticks = _ticks("last_ticks", "next_times", "task_ids", "skipped")
    return (
        update(table)
        .where(_is_of(ticks, table))
        .values(
            next_at=func.to_timestamp(ticks.c.next_times),
            last_tick_at=func.coalesce(func.to_timestamp(ticks.c.last_ticks), table.c.last_tick_at),
            last_task_id=func.coalesce(ticks.c.task_ids, table.c.last_task_id),
            # Another program may have written any number, and an overflow would stop every tick.
            skipped_count=func.least(table.c.skipped_count, MAX_INTEGER_MINUS_ONE) + ticks.c.skipped,
        )
    )


_ARRAYS: Final[dict[str, Any]] = {
    "queues": Text,
    "names": Text,
    "ticks": Double,
    "due_times": Double,
    "last_ticks": Double,
    "next_times": Double,
    "task_ids": BigInteger,
    "skipped": Integer,
}


def _ticks(*names: str) -> TableValuedAlias:
    columns = ("queues", "names", *names)
    arrays = (bindparam(name, type_=ARRAY(_ARRAYS[name])) for name in columns)
    return func.unnest(*arrays).table_valued(*columns).render_derived("ticks")


def _array(name: str, type_: Any, column: str) -> TableValuedAlias:
    return func.unnest(bindparam(name, type_=ARRAY(type_))).table_valued(column).render_derived(name)


def _is_of(ticks: FromClause, table: FromClause) -> ColumnElement[bool]:
    return (table.c.queue == ticks.c.queues) & (table.c.name == ticks.c.names)


def _first(schema: str | None, queues: FromClause, *conditions: ColumnElement[bool]) -> Select[Any]:
    table = schedules_table(schema)
    found = select(table.c.next_at).where(*_is_active(table, queues), *conditions)
    return found.order_by(table.c.next_at).limit(literal_column("1"))


def _is_active(table: Table, queues: FromClause) -> tuple[ColumnElement[bool], ...]:
    passed = (
        func.unnest(
            bindparam("passed_queues", type_=ARRAY(Text)), bindparam("passed_names", type_=ARRAY(Text))
        )
        .table_valued("queue", "name")
        .render_derived("passed")
    )
    is_passed = exists().where(passed.c.queue == table.c.queue, passed.c.name == table.c.name)
    return table.c.queue == queues.c.queue, table.c.paused_at.is_(None), ~is_passed


def _epoch(value: ColumnElement[Any]) -> ColumnElement[float]:
    return func.date_part(EPOCH, value, type_=Double)
