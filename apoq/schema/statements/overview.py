"""Counts the tasks of several queues for a page that is looked at every few seconds.

Like `count`, but for all queues at once, and by index entries if possible: the number of blocks that a page
reads is bounded, however many tasks and queues there are.
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
    ScalarSelect,
    Select,
    Text,
    any_,
    bindparam,
    cast,
    func,
    literal_column,
    select,
    true,
    union,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL

from apoq.core.states import CANCELLED, COMPLETED, FAILED, WAITING
from apoq.schema.models import tasks_table
from apoq.schema.statements.browse import MAX_LEVELS
from apoq.schema.statements.heartbeat import is_alive
from apoq.schema.statements.levels import level
from apoq.schema.statements.literals import seconds_between
from apoq.schema.statements.states import has_running_state, is_in, is_open, is_pending
from apoq.schema.statements.survey import pending_levels
from apoq.schema.tables import claims_table, workers_table

_COUNTED: Final = bindparam("counted", type_=BigInteger)
_AFTER: Final = bindparam("after_queue", type_=Text)
_AT_MOST: Final = bindparam("at_most", type_=BigInteger)
_PROBED: Final = bindparam("probed", type_=BigInteger)
_MINUTE: Final = cast(literal_column("'1 minute'", Text), INTERVAL)


@cache
def name_queues(schema: str | None) -> Select[Any]:
    """Return the names of up to `at_most` queues that follow `after_queue`, in alphabetical order.

    As `queues`, this takes one index lookup for each queue that has tasks, and reads the workers' queues.
    """
    tasks, workers = tasks_table(schema), workers_table(schema)
    states = {
        "open": is_open(tasks),
        "waiting": is_in(tasks, WAITING),
        "completed": is_in(tasks, COMPLETED),
        "ended": is_in(tasks, FAILED, CANCELLED),
    }
    of_workers = select(func.unnest(workers.c.queues, type_=Text).label("queue")).subquery("of_workers")
    found = union(
        *(_names(schema, name, condition) for name, condition in states.items()),
        select(of_workers.c.queue).where(of_workers.c.queue > _AFTER),
    ).subquery("found")
    name: ColumnElement[str] = found.c[0]
    return select(name.label("queue")).where(name.is_not(None)).order_by(name).limit(_AT_MOST)


@cache
def count_queues(schema: str | None) -> Select[Any]:
    """Count the tasks of each of `in_queues`, up to `counted` of each kind, and one more if there are more.

    `open` counts pending and running tasks, of which `open_due` are due. If there are more than `counted`,
    these are the first ones in the order of claims; then `due` and `later`, which are counted in each level
    up to `probed`, say whether there are any, and how many if they are few. `lag` is for how many seconds the
    oldest ready task has been due. The failed tasks are counted among `ended`, the failed and cancelled ones.
    """
    tasks, names = tasks_table(schema), _queues()
    name = names.c.queue
    all_levels = pending_levels(schema, name)
    some = (
        select(all_levels.c.level)
        .where(all_levels.c.level.is_not(None))
        .limit(MAX_LEVELS)
        .correlate(names)
        .lateral("some")
    )
    of_all = select(name, some.c.level).select_from(names.join(some, true()))
    levels = of_all.cte("levels").prefix_with("MATERIALIZED")  # it is used three times

    def of_levels(found: Select[Any], at_most: Any) -> Select[Any]:
        each = found.where(tasks.c.queue == levels.c.queue, level(tasks) == levels.c.level)
        its = each.limit(at_most).correlate(levels).lateral("its")
        return select(*its.c).select_from(levels.join(its, true())).where(levels.c.queue == name)

    is_due = tasks.c.process_at <= func.now()
    # Without a condition on the level, which would need the rows: the index alone has what is counted.
    first = (
        select(is_due.label("is_due"))
        .where(tasks.c.queue == name, is_open(tasks))
        .limit(_COUNTED)
        .correlate(names)
        .subquery("first")
    )
    open_tasks = (
        select(func.count().label("open"), func.count().filter(first.c.is_due).label("open_due"))
        .select_from(first)
        .correlate(names)
        .lateral("open_tasks")
    )
    one = select(tasks.c.process_at).where(is_open(tasks))
    due, later = (of_levels(one.where(condition), _PROBED) for condition in (is_due, ~is_due))
    pending = select(tasks.c.process_at, tasks.c.type).where(is_pending(tasks), is_due)
    firsts = of_levels(pending.order_by(tasks.c.process_at), 1).correlate(names).subquery("firsts")
    oldest = select(firsts).order_by(firsts.c.process_at).limit(1).correlate(names).lateral("oldest")

    # The index has the states. In its own order: for another one, the rows would be read.
    ended = (
        select(tasks.c.indexed_state)
        .where(tasks.c.queue == name, is_in(tasks, FAILED, CANCELLED))
        .limit(_COUNTED)
        .correlate(names)
        .subquery("ended")
    )
    has_failed = ended.c.indexed_state == FAILED
    failures = (
        select(func.count().filter(has_failed).label("failed"), func.count().label("ended"))
        .select_from(ended)
        .correlate(names)
        .lateral("failures")
    )
    completed = select(tasks.c.completed_at).where(
        tasks.c.queue == name, is_in(tasks, COMPLETED), tasks.c.completed_at > func.now() - _MINUTE
    )
    last = completed.order_by(tasks.c.completed_at.desc()).limit(_COUNTED).correlate(names).subquery("last")
    began = seconds_between(func.min(last.c.completed_at), func.now())
    minute = (
        select(func.count().label("minute"), began.label("minute_began"))
        .select_from(last)
        .correlate(names)
        .lateral("minute")
    )
    waiting = select(tasks.c.id).where(tasks.c.queue == name, is_in(tasks, WAITING))
    return select(
        name,
        _number(due, names, _PROBED).label("due"),
        _number(later, names, _PROBED).label("later"),
        _number(waiting, names, _COUNTED).label("waiting"),
        seconds_between(oldest.c.process_at, func.now()).label("lag"),
        oldest.c.type.label("oldest_type"),
        *failures.c,
        *minute.c,
        *open_tasks.c,
    ).select_from(
        names.join(failures, true()).join(minute, true()).join(open_tasks, true()).outerjoin(oldest, true())
    )


@cache
def find_reasons(schema: str | None) -> Select[Any]:
    """Return the reasons for which the first `looked_at` waiting tasks of each of `in_queues` wait."""
    tasks, names = tasks_table(schema), _queues()
    found = (
        select(tasks.c.waiting_for)
        .where(tasks.c.queue == names.c.queue, is_in(tasks, WAITING))
        .order_by(tasks.c.id)
        .limit(bindparam("looked_at", type_=BigInteger))
        .correlate(names)
        .lateral("found")
    )
    return (
        select(names.c.queue, found.c.waiting_for, func.count().label("number"))
        .select_from(names.join(found, true()))
        .group_by(names.c.queue, found.c.waiting_for)
    )


@cache
def count_claimed(schema: str | None) -> Select[Any]:
    """Count the running tasks by queue and worker: those among `counted` ids in the log of claims.

    `is_alive` says whether the worker is. The log also has ids of tasks that have ended: see `count_noted`.
    """
    tasks, claims = tasks_table(schema), claims_table(schema)
    noted = select(func.unnest(claims.c.task_ids)).limit(_COUNTED).subquery()
    is_noted = tasks.c.id == any_(func.array(select(noted).scalar_subquery()))
    found = (
        select(tasks.c.queue, tasks.c.worker_id, func.count().label("number"))
        .where(is_noted, has_running_state(tasks))
        .group_by(tasks.c.queue, tasks.c.worker_id)
        .subquery("found")
    )
    return select(*found.c, is_alive(schema, found.c.worker_id).label("is_alive"))


@cache
def count_noted(schema: str | None) -> Select[Any]:
    """Count the ids in the log of claims, up to `counted`; the tasks may have ended."""
    noted = select(func.unnest(claims_table(schema).c.task_ids)).limit(_COUNTED).subquery()
    return select(func.count()).select_from(noted)


@cache
def sample_completions(schema: str | None) -> Select[Any]:
    """Return how many tasks of each of `in_queues` completed in each of `steps` parts of the last hour.

    Part 0 is the newest, and each is an hour divided by `steps` long. Up to `counted` tasks of a part are
    counted, from its beginning: if there are more, `span` is in how many seconds these completed.
    """
    tasks, names = tasks_table(schema), _queues()
    steps = bindparam("steps", type_=Integer)
    parts = select(func.generate_series(0, steps - 1, type_=Integer).label("part")).subquery("parts")
    hour = literal_column("3600.0", Double)
    length = hour / cast(steps, Double)

    def ago(number: ColumnElement[int]) -> ColumnElement[Any]:
        seconds = cast(number, Double) * length
        return func.now() - func.make_interval(0, 0, 0, 0, 0, 0, seconds, type_=INTERVAL)

    began = ago(parts.c.part + 1)
    found = (
        select(tasks.c.completed_at)
        .where(
            tasks.c.queue == names.c.queue,
            is_in(tasks, COMPLETED),
            tasks.c.completed_at > began,
            tasks.c.completed_at <= ago(parts.c.part),
        )
        .order_by(tasks.c.completed_at)
        .limit(_COUNTED)
        .correlate(names, parts)
        .lateral("found")
    )
    counted = (
        select(
            func.count().label("number"),
            seconds_between(began, func.max(found.c.completed_at)).label("span"),
        )
        .select_from(found)
        .correlate(names, parts)
        .lateral("counted")
    )
    return select(names.c.queue, parts.c.part, *counted.c).select_from(
        names.join(parts, true()).join(counted, true())
    )


def _names(schema: str | None, name: str, condition: ColumnElement[bool]) -> Select[Any]:
    tasks = tasks_table(schema)
    first = select(tasks.c.queue).where(condition).order_by(tasks.c.queue).limit(1)
    begin = first.where(tasks.c.queue > _AFTER).scalar_subquery()
    found = select(begin.label("queue")).cte(f"{name}_queues", recursive=True)
    following = first.where(tasks.c.queue > found.c.queue).scalar_subquery()
    found = found.union_all(select(following).where(found.c.queue.is_not(None)))
    return select(found.c.queue).limit(_AT_MOST).subquery().select()


def _queues() -> FromClause:
    names = func.unnest(bindparam("in_queues", type_=ARRAY(Text)), type_=Text)
    return select(names.label("queue")).subquery("names")


def _number(found: Select[Any], names: FromClause, at_most: Any) -> ScalarSelect[int]:
    some = found.correlate(names).limit(at_most).subquery()
    return select(func.count()).select_from(some).scalar_subquery()
