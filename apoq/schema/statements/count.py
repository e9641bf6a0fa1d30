"""Counts the tasks in a queue: exactly up to a bound, and no further.

However large the tables are, each of these statements reads a bounded number of index entries, because
statistics that are queried every few seconds must not become the main load of the database.
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
    and_,
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
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL

from apoq.core.states import CANCELLED, COMPLETED, FAILED, WAITING
from apoq.schema.models import tasks_table
from apoq.schema.statements.heartbeat import is_alive
from apoq.schema.statements.levels import level
from apoq.schema.statements.literals import seconds_between
from apoq.schema.statements.running import is_noted, is_running, open_queues
from apoq.schema.statements.states import is_in, is_pending
from apoq.schema.statements.survey import pending_levels
from apoq.schema.tables import workers_table

COUNTED: Final = 10_000
"""Counts are exact up to this number; a count of one more means that there may be any number."""

_QUEUE: Final = bindparam("from_queue", type_=Text)
_AT_MOST: Final = bindparam("at_most", type_=BigInteger)


@cache
def queues(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the names of up to `at_most` queues that have tasks or workers, in alphabetical order.

    This takes one index lookup for each queue, however many tasks it has.
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
    """Count the tasks of `from_queue` by state, up to one more than `COUNTED` of each state.

    A pending task is `ready` if it is due. If it is due later, it is `retrying` if an attempt has failed, and
    otherwise `scheduled`. `lag` is for how many seconds the oldest ready task has been due, and `oldest_type`
    its type. Scheduled and retrying tasks share a bound, and so do failed and cancelled ones: if both numbers
    together exceed `COUNTED`, each of them may be larger. `minute` and `hour` are the numbers of tasks that
    completed in the last minute and hour, and `minute_began` and `hour_began` say how many seconds ago the
    first of those did. `count_running` counts running tasks.
    """
    tasks = tasks_table(schema)
    # For each level: otherwise, all future tasks of a higher one would be read to find due ones.
    levels = pending_levels(schema, bindparam("from_queue", type_=Text))
    pending = select(tasks.c.process_at, tasks.c.type, tasks.c.fail_count).where(
        tasks.c.queue == _QUEUE, is_pending(tasks), level(tasks) == levels.c.level
    )
    due = pending.where(tasks.c.process_at <= func.now())
    later = pending.where(tasks.c.process_at > func.now())

    def of_each(
        tasks_of_one: Select[*tuple[Any, ...]], at_most: int = COUNTED + 1
    ) -> Select[*tuple[Any, ...]]:
        # The limit also prevents the planner from reading all of them in one scan.
        of_level = tasks_of_one.limit(at_most).lateral("of_level")
        return select(*of_level.c).select_from(levels.join(of_level, true()))

    waiting = select(tasks.c.id).where(tasks.c.queue == _QUEUE, is_in(tasks, WAITING))

    first = of_each(due.order_by(tasks.c.process_at), 1).subquery("first")
    oldest = select(first).order_by(first.c.process_at).limit(1).subquery("oldest")
    lag = select(_seconds_since(oldest.c.process_at)).scalar_subquery()
    oldest_type = select(oldest.c.type).scalar_subquery()

    future = of_each(later).limit(COUNTED + 1).subquery("future")
    has_failed = future.c.fail_count > 0
    upcoming = select(
        func.count().filter(~has_failed).label("scheduled"), func.count().filter(has_failed).label("retrying")
    ).select_from(future)
    upcoming_counts = upcoming.subquery("upcoming")

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
        *upcoming_counts.c,
        _up_to_bound(waiting).label("waiting"),
        lag.label("lag"),
        oldest_type.label("oldest_type"),
        _up_to_bound(completed).label("completed"),
        *failures.c,
        *minute.c,
        *hour.c,
    ).select_from(failures.join(minute, true()).join(hour, true()).join(upcoming_counts, true()))


@cache
def count_types(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Count the tasks of `from_queue` by state and type.

    At most `COUNTED` tasks of each kind are counted: the pending ones that are due first, some waiting ones,
    and the completed, failed and cancelled ones that ended last.
    """
    tasks = tasks_table(schema)
    mine = select(tasks.c.state, tasks.c.type).where(tasks.c.queue == _QUEUE)
    ended = _ended(schema)
    completed = mine.where(is_in(tasks, COMPLETED)).order_by(tasks.c.completed_at.desc())
    pending = mine.where(is_pending(tasks))
    pending = pending.order_by(level(tasks).desc(), tasks.c.process_at, tasks.c.id)
    waiting = mine.where(is_in(tasks, WAITING))
    found = union_all(
        *(each.limit(COUNTED).subquery().select() for each in (pending, waiting, completed, ended))
    ).subquery("found")
    return (
        select(found.c.state, found.c.type, func.count().label("number"))
        .group_by(found.c.state, found.c.type)
        .order_by(found.c.type)
    )


@cache
def count_waiting(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Count the waiting tasks of `from_queue` by the reason, up to `COUNTED` in total."""
    tasks = tasks_table(schema)
    found = (
        select(tasks.c.waiting_for)
        .where(tasks.c.queue == _QUEUE, is_in(tasks, WAITING))
        .limit(COUNTED)
        .subquery("found")
    )
    return select(found.c.waiting_for, func.count().label("number")).group_by(found.c.waiting_for)


@cache
def count_running(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Count running tasks by queue, type, worker, and whether a claim has recorded them.

    Up to one more than `COUNTED` in total. `is_alive` says whether the worker is.
    """
    tasks = tasks_table(schema)
    held = (
        select(tasks.c.queue, tasks.c.type, tasks.c.worker_id, is_noted(schema, tasks).label("is_noted"))
        .where(is_running(schema, tasks))
        .limit(COUNTED + 1)
        .subquery("held")
    )
    found = select(*held.c, func.count().label("number")).group_by(*held.c).subquery("found")
    return select(*found.c, is_alive(schema, found.c.worker_id).label("is_alive"))


@cache
def table_size(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the planner's estimate of the task table's rows, and the table's size on disk in bytes."""
    classes = table("pg_class", column("oid"), column("reltuples", Double), schema="pg_catalog")
    return select(
        cast(classes.c.reltuples, BigInteger).label("rows"),
        func.pg_total_relation_size(classes.c.oid, type_=BigInteger).label("bytes"),
    ).where(classes.c.oid == oid(tasks_table(schema)))


@cache
def queue_shares(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the queues and their shares of the task table's rows, by the last ANALYZE.

    They are its most common ones, up to a hundred; no rows before the first ANALYZE.
    """
    classes = table("pg_class", column("oid"), column("relname"), column("relnamespace"), schema="pg_catalog")
    schemas = table("pg_namespace", column("oid"), column("nspname"), schema="pg_catalog")
    stats = table(
        "pg_stats",
        *(column(name) for name in ("schemaname", "tablename", "attname")),
        *(column(name) for name in ("most_common_vals", "most_common_freqs")),
        schema="pg_catalog",
    )
    common = (
        func.unnest(cast(cast(stats.c.most_common_vals, Text), ARRAY(Text)), stats.c.most_common_freqs)
        .table_valued(column("queue", Text), column("share"))
        .render_derived("common")
    )
    return (
        select(common.c.queue, cast(common.c.share, Double).label("share"))
        .select_from(
            classes.join(schemas, schemas.c.oid == classes.c.relnamespace)
            .join(
                stats,
                and_(stats.c.schemaname == schemas.c.nspname, stats.c.tablename == classes.c.relname),
            )
            .join(common, true())
        )
        .where(classes.c.oid == oid(tasks_table(schema)), stats.c.attname == "queue")
    )


def oid(table: Table) -> ColumnElement[int]:
    """Return the id of a table in PostgreSQL's catalog."""
    name = func.concat_ws(".", func.quote_ident(literal(table.schema, Text)), func.quote_ident(table.name))
    return func.to_regclass(name, type_=BigInteger)


def _names(schema: str | None, name: str, condition: ColumnElement[bool]) -> Select[*tuple[Any, ...]]:
    """Return the queues that an index has, with one lookup for each, like `pending_levels`."""
    tasks = tasks_table(schema)
    first = select(tasks.c.queue).where(condition).order_by(tasks.c.queue).limit(1)
    found = select(first.scalar_subquery().label("queue")).cte(name, recursive=True)
    following = first.where(tasks.c.queue > found.c.queue).scalar_subquery()
    found = found.union_all(select(following).where(found.c.queue.is_not(None)))
    return select(found.c.queue).limit(_AT_MOST).subquery().select()


def _ended(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the failed and cancelled tasks of a queue, the last ended first."""
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
