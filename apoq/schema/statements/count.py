"""Count what is in a queue: exactly up to a bound, and not beyond.

However large the tables are, each of these reads a bounded number of index entries, for statistics that are
asked for every few seconds must never become the database's main work.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    ScalarSelect,
    Select,
    Subquery,
    Table,
    Text,
    bindparam,
    cast,
    column,
    func,
    literal,
    literal_column,
    select,
    table,
    true,
    union,
    union_all,
)
from sqlalchemy.dialects.postgresql import INTERVAL

from apoq.core.states import CANCELLED, COMPLETED, FAILED, WAITING
from apoq.schema.models import tasks_table, workers_table
from apoq.schema.statements.literals import seconds_between
from apoq.schema.statements.running import is_noted, is_running, open_queues
from apoq.schema.statements.states import is_in, is_pending
from apoq.schema.statements.survey import pending_priorities

COUNTED: Final = 10_000
"""What is counted exactly; one more than that says that there may be any number."""

_QUEUE: Final = bindparam("from_queue", type_=Text)
_AT_MOST: Final = bindparam("at_most", type_=BigInteger)


@cache
def queues(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Answer the names of queues that have tasks or workers, `at_most` so many, in the order of the alphabet.

    By one look into an index for each queue, however many tasks it has.
    """
    tasks, workers = tasks_table(schema), workers_table(schema)
    found = union(
        select(open_queues(schema).c.queue).limit(_AT_MOST).subquery().select(),
        _names(schema, "waiting", is_in(tasks, WAITING)),
        _names(schema, "completed", is_in(tasks, COMPLETED)),
        _names(schema, "ended", is_in(tasks, FAILED, CANCELLED)),
        select(func.unnest(workers.c.queues, type_=Text)),
    ).subquery("found")
    name: ColumnElement[str] = found.c[0]
    return select(name.label("queue")).where(name.is_not(None)).order_by(name).limit(_AT_MOST)


@cache
def count(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Count the tasks of `from_queue` by their state, up to one more than `COUNTED` of each.

    Pending ones are `ready` (due) or `scheduled` (due later), and `lag` is for how many seconds the first has
    been due. Failed and cancelled ones share a bound: more than `COUNTED` of both, and either may be more.
    `minute` and `hour` are how many completed in the last of them, and `minute_began` and `hour_began` how
    many seconds ago the first
    of those did. For what is running, see `count_running`.
    """
    tasks = tasks_table(schema)
    # For each priority, or else the future tasks of a higher one would be walked through to find due ones.
    priorities = pending_priorities(schema)
    pending = select(tasks.c.process_at).where(
        tasks.c.queue == _QUEUE, is_pending(tasks), tasks.c.priority == priorities.c.priority
    )
    due = pending.where(tasks.c.process_at <= func.now())
    later = pending.where(tasks.c.process_at > func.now())

    def of_each(
        tasks_of_one: Select[*tuple[Any, ...]], at_most: int = COUNTED + 1
    ) -> Select[*tuple[Any, ...]]:
        # The limit also keeps the planner from making one scan of them all.
        level = tasks_of_one.limit(at_most).lateral("level")
        return select(level.c.process_at).select_from(priorities.join(level, true()))

    waiting = select(tasks.c.id).where(tasks.c.queue == _QUEUE, is_in(tasks, WAITING))

    first = of_each(due.order_by(tasks.c.process_at), 1).subquery("first")
    lag = select(_seconds_since(func.min(first.c.process_at))).scalar_subquery()

    completed = select(tasks.c.completed_at).where(tasks.c.queue == _QUEUE, is_in(tasks, COMPLETED))
    latest = completed.order_by(tasks.c.completed_at.desc()).limit(COUNTED + 1)

    def lately(span: str) -> Subquery:
        since = func.now() - cast(literal_column(f"'1 {span}'"), INTERVAL)
        found = latest.where(tasks.c.completed_at > since).subquery()
        began = _seconds_since(func.min(found.c.completed_at))
        return (
            select(func.count().label(span), began.label(f"{span}_began")).select_from(found).subquery(span)
        )

    minute, hour = lately("minute"), lately("hour")
    ended = _ended(schema).limit(COUNTED + 1).subquery()
    failures = select(
        *(func.count().filter(ended.c.state == state).label(state) for state in (FAILED, CANCELLED))
    ).subquery("failures")
    return select(
        _up_to_bound(of_each(due)).label("ready"),
        _up_to_bound(of_each(later)).label("scheduled"),
        _up_to_bound(waiting).label("waiting"),
        lag.label("lag"),
        _up_to_bound(completed).label("completed"),
        *failures.c,
        *minute.c,
        *hour.c,
    ).select_from(failures.join(minute, true()).join(hour, true()))


@cache
def count_types(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Count tasks of `from_queue` by state and type: `COUNTED` that are due first, or ended last, at most."""
    tasks = tasks_table(schema)
    mine = select(tasks.c.state, tasks.c.type).where(tasks.c.queue == _QUEUE)
    ended = _ended(schema)
    completed = mine.where(is_in(tasks, COMPLETED)).order_by(tasks.c.completed_at.desc())
    pending = mine.where(is_pending(tasks))
    pending = pending.order_by(tasks.c.priority.desc(), tasks.c.process_at, tasks.c.id)
    found = union_all(
        *(each.limit(COUNTED).subquery().select() for each in (pending, completed, ended))
    ).subquery("found")
    return (
        select(found.c.state, found.c.type, func.count().label("number"))
        .group_by(found.c.state, found.c.type)
        .order_by(found.c.type)
    )


@cache
def count_running(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Count what is running by queue, type and worker, up to one more than `COUNTED` in all.

    And by whether a claim has noted it.
    """
    tasks = tasks_table(schema)
    held = (
        select(tasks.c.queue, tasks.c.type, tasks.c.worker_id, is_noted(schema, tasks).label("is_noted"))
        .where(is_running(schema, tasks))
        .limit(COUNTED + 1)
        .subquery("held")
    )
    return select(*held.c, func.count().label("number")).group_by(*held.c)


@cache
def table_size(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Answer how many rows the task table has, by the planner's estimate, and its bytes on the disk."""
    classes = table("pg_class", column("oid"), column("reltuples", Double), schema="pg_catalog")
    return select(
        cast(classes.c.reltuples, BigInteger).label("rows"),
        func.pg_total_relation_size(classes.c.oid, type_=BigInteger).label("bytes"),
    ).where(classes.c.oid == oid(tasks_table(schema)))


def oid(table: Table) -> ColumnElement[int]:
    """Answer the id of a table in PostgreSQL's catalogue."""
    name = func.concat_ws(".", func.quote_ident(literal(table.schema, Text)), func.quote_ident(table.name))
    return func.to_regclass(name, type_=BigInteger)


def _names(schema: str | None, name: str, condition: ColumnElement[bool]) -> Select[*tuple[Any, ...]]:
    """Find the queues that an index has: one look for each, as for priorities in `pending_priorities`."""
    tasks = tasks_table(schema)
    first = select(tasks.c.queue).where(condition).order_by(tasks.c.queue).limit(1)
    found = select(first.scalar_subquery().label("queue")).cte(name, recursive=True)
    following = first.where(tasks.c.queue > found.c.queue).scalar_subquery()
    found = found.union_all(select(following).where(found.c.queue.is_not(None)))
    return select(found.c.queue).limit(_AT_MOST).subquery().select()


def _ended(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Find the failed and cancelled tasks of a queue, those that ended last first."""
    tasks = tasks_table(schema)
    ended_at = func.coalesce(tasks.c.cancelled_at, tasks.c.failed_at, tasks.c.process_at)
    return (
        select(tasks.c.state, tasks.c.type)
        .where(tasks.c.queue == _QUEUE, is_in(tasks, FAILED, CANCELLED))
        .order_by(ended_at.desc())
    )


def _up_to_bound(found: Select[*tuple[Any, ...]]) -> ScalarSelect[int]:
    return select(func.count()).select_from(found.limit(COUNTED + 1).subquery()).scalar_subquery()


def _seconds_since(time: ColumnElement[Any]) -> ColumnElement[float | None]:
    return seconds_between(time, func.now())
