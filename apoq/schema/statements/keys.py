"""Reads which keys and pools are in use, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Integer,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    func,
    literal_column,
    select,
    true,
    tuple_,
    union,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY, aggregate_order_by

from apoq.core.places import KEY, POOL
from apoq.core.states import FAILED
from apoq.schema.models import tasks_table
from apoq.schema.statements.limits import NONE, in_force
from apoq.schema.statements.places import share_name, waits_for_place
from apoq.schema.tables import limits_table, workers_table

_KEY: Final = literal_column(f"'{KEY}'", Text)
_POOL: Final = literal_column(f"'{POOL}'", Text)
_AFTER: Final = tuple(bindparam(f"after_{name}", type_=Text) for name in ("queue", "kind", "name"))
_AT_MOST: Final = bindparam("at_most", type_=Integer)


@cache
def find_shares(schema: str | None, *, after_keys: bool) -> Select[Any]:
    """Return the next `at_most` keys and pools that are in use: of which tasks wait, or also run.

    They come behind `after_queue`, `after_kind` and `after_name`, in this order; `after_keys`: that place is
    a pool, and so behind all keys of its queue. Those of which tasks only run are left out without
    `with_running`. It takes one index lookup for each, however many tasks run and wait.
    """
    tasks = tasks_table(schema)
    after_queue, _, after_name = _AFTER
    behind_name = tuple_(after_queue, after_name)
    key, pool = (tasks.c.queue, tasks.c.held_key), (tasks.c.queue, tasks.c.held_pool_key)
    behind_key = tasks.c.queue > after_queue if after_keys else tuple_(*key) > behind_name
    behind_pool = tuple_(*pool) > behind_name if after_keys else tasks.c.queue >= after_queue
    awaited = tasks.c.queue, tasks.c.waiting_for, share_name(tasks)
    keys = _walk("keys", key, tasks.c.held_key.is_not(None), _with_running(behind_key))
    pools = _walk("pools", pool, tasks.c.held_pool_key.is_not(None), _with_running(behind_pool))
    waiting = _walk("waiting", awaited, waits_for_place(tasks), tuple_(*awaited) > tuple_(*_AFTER))
    found = union(
        select(keys.c[0].label("queue"), _KEY.label("kind"), keys.c[1].label("name")),
        select(pools.c[0], _POOL, pools.c[1]),
        select(*waiting.c),
    ).subquery("found")
    return select(*found.c).order_by(*found.c).limit(_AT_MOST)


def _with_running(behind: ColumnElement[bool]) -> ColumnElement[bool]:
    return and_(bindparam("with_running", type_=Boolean), behind)


def _walk(
    name: str,
    place: Sequence[ColumnElement[Any]],
    condition: ColumnElement[bool],
    behind: ColumnElement[bool],
) -> Any:
    """Return the different places of an index that fulfil the conditions, with one lookup for each."""
    columns = [each.label(f"c{number}") for number, each in enumerate(place)]
    first = select(*columns).where(condition).order_by(*place).limit(1)
    walk = select(*first.where(behind).subquery().c).cte(name, recursive=True)
    following = first.where(tuple_(*place) > tuple_(*walk.c)).correlate(walk).lateral("following")
    walk = walk.union_all(select(*following.c).select_from(walk.join(following, true())))
    return select(*walk.c).limit(_AT_MOST).subquery()


@cache
def count_shares(schema: str | None) -> Select[Any]:
    """Count the tasks that run and wait by each of the `kinds` and `names` of `queue_names`.

    Up to `running` and `waiting`. With the time since which the first of the running tasks runs, its id and
    its worker, the time since which the first task waits, and the types of these tasks.
    """
    tasks, workers = tasks_table(schema), workers_table(schema)
    given = (
        func.unnest(*(bindparam(name, type_=ARRAY(Text)) for name in ("queue_names", "kinds", "names")))
        .table_valued("queue", "kind", "name")
        .render_derived("given")
    )
    of_key = and_(given.c.kind == _KEY, tasks.c.held_key == given.c.name)
    of_pool = and_(given.c.kind == _POOL, tasks.c.held_pool_key == given.c.name)
    held = (
        union_all(
            *(
                select(tasks.c.id, tasks.c.type, tasks.c.claimed_at, tasks.c.worker_id)
                .where(tasks.c.queue == given.c.queue, condition)
                .correlate(given)
                for condition in (of_key, of_pool)
            )
        )
        .limit(bindparam("running", type_=Integer))
        .subquery("held")
    )

    def first(column: ColumnElement[Any]) -> ColumnElement[Any]:
        return func.array_agg(aggregate_order_by(column, held.c.claimed_at), type_=ARRAY(column.type))[1]

    running = (
        select(
            func.count().label("running"),
            func.min(held.c.claimed_at).label("running_since"),
            first(held.c.id).label("task_id"),
            first(held.c.worker_id).label("worker_id"),
            _distinct(held.c.type).label("running_types"),
        )
        .select_from(held)
        .correlate(given)
        .lateral("its_running")
    )
    blocked = (
        select(tasks.c.waiting_since, tasks.c.type)
        .where(
            tasks.c.queue == given.c.queue,
            waits_for_place(tasks),
            tasks.c.waiting_for == given.c.kind,
            share_name(tasks) == given.c.name,
        )
        .limit(bindparam("waiting", type_=Integer))
        .correlate(given)
        .subquery("blocked")
    )
    waiting = (
        select(
            func.count().label("waiting"),
            func.min(blocked.c.waiting_since).label("waiting_since"),
            _distinct(blocked.c.type).label("waiting_types"),
        )
        .select_from(blocked)
        .correlate(given)
        .lateral("its_waiting")
    )
    return select(
        *given.c,
        *running.c,
        *waiting.c,
        workers.c.host,
        workers.c.pid,
        func.clock_timestamp().label("now"),
    ).select_from(
        given.join(running, true())
        .join(waiting, true())
        .outerjoin(workers, workers.c.id == running.c.worker_id)
    )


def _distinct(column: ColumnElement[str]) -> ColumnElement[Any]:
    return func.array_agg(column.distinct(), type_=ARRAY(Text))


@cache
def limits_of_shares(schema: str | None) -> Select[Any]:
    """Return the limits that may concern the `names` of `queue_names`: `at_most` of types, and of keys."""
    limits = limits_table(schema)
    columns = (
        *(limits.c[name] for name in ("queue", "type", "key", "is_of_key", "holds")),
        in_force(limits).label("in_force"),
    )
    its = limits.c.queue == any_(bindparam("queue_names", type_=ARRAY(Text)))
    of_types = select(*columns).where(its, limits.c.type > NONE, limits.c.key == NONE).limit(_AT_MOST)
    names = any_(bindparam("names", type_=ARRAY(Text)))
    of_keys = select(*columns).where(its, limits.c.type == NONE, limits.c.key == names).limit(_AT_MOST)
    found = union_all(of_types.subquery().select(), of_keys.subquery().select())
    return select(*found.subquery("found").c)


@cache
def holders(schema: str | None) -> Select[Any]:
    """Return up to 5 running tasks that hold places of the `kind` and `name` of `from_queue`, and workers."""
    tasks, workers = tasks_table(schema), workers_table(schema)
    kind, name = bindparam("kind", type_=Text), bindparam("name", type_=Text)
    of_key = and_(kind == _KEY, tasks.c.held_key == name)
    of_pool = and_(kind == _POOL, tasks.c.held_pool_key == name)
    found = [
        select(tasks.c.id, tasks.c.worker_id).where(
            tasks.c.queue == bindparam("from_queue", type_=Text), condition
        )
        for condition in (of_key, of_pool)
    ]
    held = union_all(*found).limit(5).subquery("held")
    return (
        select(held.c.id, workers.c.host, workers.c.pid)
        .select_from(held.outerjoin(workers, workers.c.id == held.c.worker_id))
        .order_by(held.c.id)
    )


@cache
def failed_of(schema: str | None) -> Select[tuple[int]]:
    """Return those of the tasks `ids` that have failed."""
    tasks = tasks_table(schema)
    return select(tasks.c.id).where(
        tasks.c.id == any_(bindparam("ids", type_=ARRAY(BigInteger))), tasks.c.state == FAILED
    )
