"""Gives places to tasks: the statements of a transaction that claims tasks under limits.

The transaction locks the tasks, then the keys and pools whose places it may give away, and reads which places
are held after that. The unique indexes of places are the guarantee. The locks only let two such transactions
not compete for the same places.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Double,
    FromClause,
    Integer,
    Select,
    Text,
    Update,
    and_,
    any_,
    bindparam,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql.dml import ReturningUpdate
from sqlalchemy.sql.selectable import TableValuedAlias

from apoq.core.states import FAILED, PENDING, WAITING
from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.claim import claimed_values, returned_columns
from apoq.schema.statements.claim import picked as picked_tasks
from apoq.schema.statements.clock import in_utc, now
from apoq.schema.statements.links import PARENTS, closes_group
from apoq.schema.statements.literals import EPOCH
from apoq.schema.statements.notes import note_ids
from apoq.schema.statements.queues import given_queues
from apoq.schema.statements.states import is_in, is_open

LOCKS: Final = 1_024
"""The number of advisory locks for all keys and pools, so that they never fill the server's lock table."""

LOCK_CLASS: Final = 1_634_758_513
"""The first number of these locks: "apoq" in ASCII."""

_KEY: Final = literal_column("'key'", Text)
_POOL: Final = literal_column("'pool'", Text)
_WAITING: Final = literal_column(f"'{WAITING}'", Text)
_QUEUE: Final = bindparam("from_queue", type_=Text)


@cache
def pick_due(
    schema: str | None,
    *,
    ahead: bool = False,
    passes_over: bool = False,
    overflows: bool = False,
    keyed: bool = False,
) -> Select[Any]:
    """Lock due tasks as `claim` does with the same parameters; return what a decision about them needs."""
    found = picked_tasks(
        schema,
        given_queues(schema),
        ahead=ahead,
        passes_over=passes_over,
        overflows=overflows,
        keyed=keyed,
        columns=("type", "key", "priority", "process_at"),
    )
    return select(found.c.id, found.c.type, found.c.key, found.c.priority, _seconds(found.c.process_at))


@cache
def pick_blocked(schema: str | None) -> Select[Any]:
    """Lock the next tasks of `from_queue` that wait for the `kinds` and `names`, up to `most` of each.

    Returns what a decision about them needs, and whether the worker may run them: not if the queue is paused,
    or their types are paused or not among the `types` of `queues`.
    """
    tasks, queues = tasks_table(schema), given_queues(schema)
    wanted = _shares(most=Integer)
    following = (
        select(*_candidate(tasks))
        .where(
            tasks.c.queue == _QUEUE,
            waits_for_place(tasks),
            tasks.c.waiting_for == wanted.c.kind,
            share_name(tasks) == wanted.c.name,
        )
        .order_by(tasks.c.priority.desc(), tasks.c.process_at, tasks.c.id)
        .limit(wanted.c.most)
        .with_for_update(skip_locked=True)
        .correlate(wanted)
        .lateral("following")
    )
    may_run = exists().where(queues.c.queue == _QUEUE, following.c.type == any_(queues.c.types))
    columns = *following.c, may_run.label("may_run"), wanted.c.kind
    return select(*columns).select_from(wanted.join(following, true()))


@cache
def pick_first(schema: str | None) -> Select[Any]:
    """Lock those of the tasks `ids` that wait for a place of their key; return them like `pick_blocked`."""
    tasks, queues = tasks_table(schema), given_queues(schema)
    locked = (
        select(*_candidate(tasks))
        .where(
            tasks.c.id == any_(bigints("ids")),
            tasks.c.state == _WAITING,
            # Written so that the tasks are found by their ids.
            func.coalesce(tasks.c.waiting_for, "") == _KEY,
        )
        .with_for_update(skip_locked=True)
        .cte("locked")
    )
    may_run = exists().where(queues.c.queue == _QUEUE, locked.c.type == any_(queues.c.types))
    return select(*locked.c, may_run.label("may_run"), _KEY)


@cache
def lock_shares() -> Select[tuple[int]]:
    """Take the advisory locks `numbers` until the end of the transaction, as far as they are free.

    Returns those that were taken, without waiting for the others.
    """
    number = func.unnest(bindparam("numbers", type_=ARRAY(Integer))).column_valued("number")
    is_taken = func.pg_try_advisory_xact_lock(literal_column(str(LOCK_CLASS), Integer), number)
    return select(number).where(is_taken)


@cache
def held_places(schema: str | None) -> Select[Any]:
    """Return the places of the keys `keys` and the pools `pools` of `from_queue` that running tasks hold."""
    tasks = tasks_table(schema)
    keys, pools = (any_(bindparam(name, type_=ARRAY(Text))) for name in ("keys", "pools"))
    of_keys = select(_KEY.label("kind"), tasks.c.held_key, tasks.c.slot).where(
        tasks.c.queue == _QUEUE, tasks.c.held_key == keys
    )
    of_pools = select(_POOL.label("kind"), tasks.c.held_pool_key, tasks.c.pool_slot).where(
        tasks.c.queue == _QUEUE, tasks.c.held_pool_key == pools
    )
    return select(*union_all(of_keys, of_pools).subquery("held").c)


@cache
def awaited_shares(schema: str | None) -> Select[Any]:
    """Return those of the `kinds` and `names` of `from_queue` that tasks wait for.

    With the priority and `process_at` of the first of these tasks, and its id.
    """
    tasks = tasks_table(schema)
    given = _shares()
    # A lookup for each, because EXISTS may become a join that reads all waiting tasks.
    first = (
        select(tasks.c.priority, _seconds(tasks.c.process_at).label("process_at"), tasks.c.id)
        .where(
            tasks.c.queue == _QUEUE,
            waits_for_place(tasks),
            tasks.c.waiting_for == given.c.kind,
            share_name(tasks) == given.c.name,
        )
        .order_by(tasks.c.priority.desc(), tasks.c.process_at, tasks.c.id)
        .limit(1)
        .correlate(given)
        .lateral("first")
    )
    return select(given.c.kind, given.c.name, *first.c).select_from(given.join(first, true()))


@cache
def first_of_keys(schema: str | None) -> Select[Any]:
    """Return the id of the first task of each of the `keys` of `from_queue` that has not ended, or NULL.

    Or (`holds`) that has failed. The last step of a group comes after its members, for which it waits,
    although its id may be lower.
    """
    tasks = tasks_table(schema)
    given = (
        func.unnest(bindparam("keys", type_=ARRAY(Text)), bindparam("holds", type_=ARRAY(Boolean)))
        .table_valued("key", "holds")
        .render_derived("given")
    )
    waits_for_members = and_(closes_group(tasks), tasks.c.waiting_for == literal_column(f"'{PARENTS}'", Text))
    firsts = (
        select(tasks.c.id)
        .where(tasks.c.queue == _QUEUE, tasks.c.key == given.c.key, _is_of_key(tasks), *conditions)
        # As in the index, so that only one row is read.
        .order_by(tasks.c.indexed_state, tasks.c.id)
        .limit(1)
        .correlate(given)
        .scalar_subquery()
        for conditions in (
            (is_open(tasks),),
            # Written so that the planner doesn't use the index of the waiting tasks of all keys.
            (tasks.c.indexed_state.between(_WAITING, _WAITING), ~waits_for_members),
            (is_in(tasks, FAILED), given.c.holds),
        )
    )
    return select(given.c.key, func.least(*firsts).label("id"))


@cache
def take(schema: str | None, *, bare: bool = False, noted: bool = True) -> ReturningUpdate[Any]:
    """Mark the tasks `ids`, which this transaction has locked, as running in their `slots` and `pool_slots`.

    Returns them, and records them, as `claim` does.
    """
    tasks = tasks_table(schema)
    rows = (
        func.unnest(
            bigints("ids"),
            bindparam("slots", type_=ARRAY(Integer)),
            bindparam("pools", type_=ARRAY(Text)),
            bindparam("pool_slots", type_=ARRAY(Integer)),
        )
        .table_valued("id", "slot", "pool", "pool_slot")
        .render_derived("placed")
    )
    statement = (
        update(tasks)
        .where(tasks.c.id == rows.c.id)
        .values(
            claimed_values(tasks, is_ahead=bindparam("is_ahead", type_=Boolean))
            | {
                "slot": rows.c.slot,
                "pool_key": rows.c.pool,
                "pool_slot": rows.c.pool_slot,
                "waiting_since": null(),
                "waiting_for": null(),
            }
        )
        .returning(*returned_columns(tasks, bare=bare))
    )
    return statement.add_cte(note_ids(schema).cte("note")) if noted else statement


@cache
def block(schema: str | None) -> Update:
    """Let the tasks `ids`, which this transaction has locked, wait for the `kinds`, in the `pools`."""
    tasks = tasks_table(schema)
    rows = (
        func.unnest(
            bigints("ids"), bindparam("kinds", type_=ARRAY(Text)), bindparam("pools", type_=ARRAY(Text))
        )
        .table_valued("id", "kind", "pool")
        .render_derived("blocked")
    )
    return (
        update(tasks)
        .where(tasks.c.id == rows.c.id)
        .values(state=WAITING, waiting_since=now(), waiting_for=rows.c.kind, pool_key=rows.c.pool)
    )


@cache
def unblock(schema: str | None) -> Update:
    """Let the tasks `ids`, which this transaction has locked, be claimed again."""
    tasks = tasks_table(schema)
    return (
        update(tasks)
        .where(tasks.c.id == any_(bigints("ids")))
        .values(state=PENDING, waiting_since=null(), waiting_for=null(), pool_key=null())
    )


@cache
def awaited(schema: str | None) -> Select[Any]:
    """Return the next `at_most` keys and pools of `queue_names` that tasks wait for, each with its queue.

    They come behind `after_queue`, `after_kind` and `after_name`, in this order. It takes one index lookup
    for each, however many tasks wait.
    """
    tasks = tasks_table(schema)
    place = (tasks.c.queue, tasks.c.waiting_for, share_name(tasks))
    after = tuple(bindparam(f"after_{name}", type_=Text) for name in ("queue", "kind", "name"))
    names = bindparam("queue_names", type_=ARRAY(Text))

    def following(behind: ColumnElement[Any]) -> Select[Any]:
        found = (
            select(*(each.label(name) for each, name in zip(place, ("queue", "kind", "name"), strict=True)))
            .where(waits_for_place(tasks), behind, tasks.c.queue == any_(names))
            .order_by(*place)
            .limit(1)
        )
        return found.correlate_except(tasks)

    first = following(tuple_(*place) > tuple_(*after)).subquery("first")
    walk = select(*first.c).cte("walk", recursive=True)
    step = following(tuple_(*place) > tuple_(*walk.c)).lateral("step")
    walk = walk.union_all(select(*step.c).select_from(walk.join(step, true())))
    return select(*walk.c).limit(bindparam("at_most", type_=Integer))


def _shares(**columns: Any) -> TableValuedAlias:
    """Return the given keys and pools as rows."""
    arrays = [bindparam(f"{name}s", type_=ARRAY(Text)) for name in ("kind", "name")]
    arrays += [bindparam(name, type_=ARRAY(type_)) for name, type_ in columns.items()]
    return func.unnest(*arrays).table_valued("kind", "name", *columns).render_derived("wanted")


def _candidate(tasks: FromClause) -> tuple[ColumnElement[Any], ...]:
    return (
        tasks.c.id,
        tasks.c.type,
        tasks.c.key,
        tasks.c.priority,
        _seconds(tasks.c.process_at).label("process_at"),
    )


def _seconds(time: ColumnElement[Any]) -> ColumnElement[float]:
    return func.date_part(EPOCH, in_utc(time), type_=Double)


def waits_for_place(tasks: FromClause) -> ColumnElement[bool]:
    """Return the condition that a task waits for a place, written as in the index of blocked tasks.

    Coalesce prevents the planner from using the index of waiting tasks, which doesn't know of places.
    """
    is_waiting = func.coalesce(tasks.c.state, literal_column("''", Text)) == _WAITING
    return and_(tasks.c.waiting_for.in_([_KEY, _POOL]), is_waiting)


def share_name(tasks: FromClause) -> ColumnElement[str]:
    """Return the key or pool that a task waits for, written as in the index of blocked tasks."""
    return func.coalesce(tasks.c.pool_key, tasks.c.key)


def _is_of_key(tasks: FromClause) -> ColumnElement[bool]:
    """Return the condition of the index of keys."""
    states = literal_column(f"'{WAITING}'", Text), literal_column(f"'{FAILED}'", Text)
    return and_(tasks.c.key.is_not(None), or_(is_open(tasks), tasks.c.indexed_state.in_(states)))
