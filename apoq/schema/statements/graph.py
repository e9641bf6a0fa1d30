"""Reads graphs of tasks, groups, and what waiting tasks wait for; it writes nothing."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Integer,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    case,
    func,
    literal_column,
    or_,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import INTERVAL

from apoq.core.states import CANCELLED, FAILED, PENDING, STATES, WAITING
from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.heartbeat import is_alive
from apoq.schema.statements.links import GROUP_NAME, PARENTS, closes_group
from apoq.schema.statements.states import is_in
from apoq.schema.tables import links_table, workers_table

LOOKED_AT: Final = 1_000
"""Waiting tasks that are looked at, at most."""


@cache
def children_of(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the edges from the tasks `ids` to their children, with the children; `at_most` of each."""
    tasks, links = tasks_table(schema), links_table(schema)
    given = func.unnest(bigints("ids")).table_valued("id").render_derived("given")
    edges = (
        select(links)
        .where(links.c.parent_id == given.c.id)
        .order_by(links.c.child_id)
        .limit(bindparam("at_most", type_=Integer))
        .lateral("edges")
    )
    return _edges(tasks, given.join(edges, true()), edges, edges.c.child_id).order_by(edges.c.child_id)


@cache
def parents_of(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the edges to the task `task_id`, with its parents, in the order of `after`; `at_most`."""
    tasks, links = tasks_table(schema), links_table(schema)
    edges = (
        select(links)
        .where(links.c.child_id == bindparam("task_id", type_=BigInteger))
        .order_by(links.c.position, links.c.parent_id)
        .limit(bindparam("at_most", type_=Integer))
        .subquery("edges")
    )
    return _edges(tasks, edges, edges, edges.c.parent_id).order_by(edges.c.position, edges.c.parent_id)


@cache
def count_edges(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Count the parents and the children of the task `task_id`, up to `at_most` of each."""
    links, task_id = links_table(schema), bindparam("task_id", type_=BigInteger)

    def number(edges: Select[*tuple[Any, ...]]) -> Any:
        found = edges.limit(bindparam("at_most", type_=Integer)).subquery()
        return select(func.count()).select_from(found).scalar_subquery()

    # By what the indexes have.
    parents = select(links.c.parent_id).where(links.c.child_id == task_id)
    children = select(links.c.child_id).where(links.c.parent_id == task_id)
    return select(number(parents).label("parents"), number(children).label("children"))


@cache
def groups(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the last `at_most` groups, with how many of their tasks are in each state."""
    tasks, member, closing = (tasks_table(schema).alias(name) for name in ("tasks", "member", "closing"))
    # One look into the index for each group, however many tasks it has.
    last = select(func.max(tasks.c.group_id).label("id"), literal_column("1", Integer).label("number"))
    ids = last.cte("ids", recursive=True)
    before = select(func.max(tasks.c.group_id)).where(tasks.c.group_id < ids.c.id).scalar_subquery()
    ids = ids.union_all(
        select(before, ids.c.number + 1).where(
            ids.c.id.is_not(None), ids.c.number < bindparam("at_most", type_=Integer)
        )
    )
    counts = (
        select(*(func.count().filter(member.c.state == _text(state)).label(state) for state in STATES))
        .where(member.c.group_id == ids.c.id, ~closes_group(member))
        .lateral("counts")
    )
    return (
        select(
            ids.c.id,
            closing.c.queue,
            closing.c.meta[GROUP_NAME].as_string().label("name"),
            closing.c.created_at,
            closing.c.state,
            *(counts.c[state].label(f"{state}_count") for state in STATES),
            func.clock_timestamp().label("now"),
        )
        .select_from(ids.outerjoin(closing, closing.c.id == ids.c.id).join(counts, true()))
        .where(ids.c.id.is_not(None))
        .order_by(ids.c.id.desc())
    )


@cache
def stuck(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return why tasks wait that no end of a running or pending task will unblock; `at_most` kinds.

    Of the first 1,000 waiting tasks. Each `reason` is "failed", "cancelled" or "deleted"; "no worker" if no
    live worker works on the parent's queue; or "late" if the parent has been due for longer than `late`.
    """
    tasks, links, parent = tasks_table(schema), links_table(schema), tasks_table(schema).alias("parent")
    workers = workers_table(schema).alias("worker")
    waiting = (
        select(tasks.c.id, tasks.c.queue, tasks.c.type)
        .where(is_in(tasks, WAITING), tasks.c.waiting_for == PARENTS)
        .order_by(tasks.c.queue, tasks.c.id)
        .limit(LOOKED_AT)
        .subquery("waiting")
    )
    is_worked = (
        select(true())
        .where(parent.c.queue == any_(workers.c.queues), is_alive(schema, workers.c.id))
        .limit(1)
        .scalar_subquery()
    )
    reason = case(
        (parent.c.id.is_(None), literal_column("'deleted'", Text)),
        (or_(parent.c.state == FAILED, parent.c.state == CANCELLED), parent.c.state),
        (is_worked.is_(None), literal_column("'no worker'", Text)),
        (
            and_(
                parent.c.state == PENDING,
                parent.c.process_at < func.now() - bindparam("late", type_=INTERVAL),
            ),
            literal_column("'late'", Text),
        ),
    )
    found = (
        select(
            waiting.c.id,
            waiting.c.queue,
            reason.label("reason"),
            links.c.parent_id,
            parent.c.type.label("parent_type"),
        )
        .select_from(
            waiting.join(links, links.c.child_id == waiting.c.id).outerjoin(
                parent, parent.c.id == links.c.parent_id
            )
        )
        .where(~links.c.is_counted, ~links.c.is_done)
        .subquery("found")
    )
    return (
        select(
            found.c.queue,
            found.c.reason,
            func.count(found.c.id.distinct()).label("number"),
            func.min(found.c.id).label("task_id"),
            func.min(found.c.parent_id).label("parent_id"),
            func.min(found.c.parent_type).label("parent_type"),
        )
        .where(found.c.reason.is_not(None))
        .group_by(found.c.queue, found.c.reason)
        .order_by(found.c.queue, found.c.reason)
        .limit(bindparam("at_most", type_=Integer))
    )


def _edges(tasks: Any, of: Any, edges: Any, other: Any) -> Select[*tuple[Any, ...]]:
    return select(
        edges.c.parent_id,
        edges.c.child_id,
        edges.c.position,
        edges.c.is_done,
        edges.c.error["message"].as_string().label("message"),
        tasks.c.id,
        tasks.c.type,
        tasks.c.state,
        tasks.c.on_parent_failure,
        tasks.c.is_followed,
    ).select_from(of.outerjoin(tasks, tasks.c.id == other))


def _text(text: str) -> Any:
    return literal_column(f"'{text}'", Text)
