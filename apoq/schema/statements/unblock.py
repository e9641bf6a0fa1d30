"""Counts the edges of ended tasks off their children, and makes those pending that wait for no more.

In a statement of its own, after the commit of the completion, which writes only to rows that no other
transaction needs. It waits for no lock: a child that another session has locked is left for later.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Double,
    Text,
    and_,
    any_,
    case,
    exists,
    false,
    func,
    literal_column,
    null,
    or_,
    select,
    true,
    union_all,
    update,
)

from apoq.core.states import WAITING
from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.clock import now
from apoq.schema.statements.links import PARENTS
from apoq.schema.statements.literals import EPOCH, PENDING, ZERO
from apoq.schema.tables import links_table


def _text(text: str) -> ColumnElement[str]:
    return literal_column(f"'{text}'", Text)


_WAITING: Final = _text(WAITING)


@cache
def count_off(schema: str | None) -> CompoundSelect[Any]:
    """Count the edges of `ids` that are done off their children.

    All edges of those of `ids` that are `completed` are done, because their commits are known. Each edge is
    counted once: the child's row is locked first.

    Returns for each child that is pending now its queue and the seconds until it is due; and the parents of
    the edges that it has left.
    """
    tasks, links = tasks_table(schema), links_table(schema)
    completed = bigints("completed")
    of_parents = select(links.c.parent_id, links.c.child_id).where(
        links.c.parent_id == any_(bigints("ids")),
        ~links.c.is_counted,
        or_(links.c.is_done, links.c.parent_id == any_(completed)),
    )
    ours = of_parents.cte("ours")
    # A member of a group that has added other members must be counted before these are.
    others = select(links.c.parent_id, links.c.child_id).where(
        links.c.child_id.in_(select(ours.c.child_id)),
        links.c.needs_check,
        links.c.is_done,
        ~links.c.is_counted,
    )
    edges = select(ours.c.parent_id, ours.c.child_id).union(others).cte("edges")
    child = tasks.alias("child")
    mine = (
        select(edges.c.parent_id, edges.c.child_id)
        .join(child, child.c.id == edges.c.child_id)
        .order_by(child.c.id)
        .with_for_update(of=child, skip_locked=True)
        .cte("mine")
    )
    parents = tasks.alias("parents")
    of_parent = select(parents.c.result).where(parents.c.id == links.c.parent_id).scalar_subquery()
    result = case((links.c.is_done, links.c.result), else_=of_parent)
    counted = (
        update(links)
        .where(
            links.c.parent_id == mine.c.parent_id,
            links.c.child_id == mine.c.child_id,
            ~links.c.is_counted,
        )
        .values(is_done=true(), is_counted=true(), needs_check=false(), result=result)
        .returning(links.c.child_id, links.c.added_count)
        .cte("counted")
    )
    numbers = (
        select(
            counted.c.child_id,
            func.sum(1 - func.coalesce(counted.c.added_count, ZERO)).label("number"),
        )
        .group_by(counted.c.child_id)
        .cte("numbers")
    )
    is_free = and_(
        tasks.c.state == _WAITING,
        tasks.c.waiting_for == _text(PARENTS),
        tasks.c.blockers == numbers.c.number,
    )
    unblocked = (
        update(tasks)
        .where(tasks.c.id == numbers.c.child_id)
        .values(
            blockers=tasks.c.blockers - numbers.c.number,
            state=case((is_free, PENDING), else_=tasks.c.state),
            waiting_since=case((is_free, null()), else_=tasks.c.waiting_since),
            waiting_for=case((is_free, null()), else_=tasks.c.waiting_for),
            # Behind the tasks that are due already, so that claims needn't go back to an earlier place.
            process_at=case((is_free, func.greatest(tasks.c.process_at, now())), else_=tasks.c.process_at),
        )
        .returning(tasks.c.id, tasks.c.queue, tasks.c.state, tasks.c.blockers, tasks.c.process_at)
        .cte("unblocked")
    )
    due_in = func.date_part(EPOCH, unblocked.c.process_at) - func.date_part(EPOCH, func.statement_timestamp())
    # A commit that the server loses in a crash is found by the sweep, so it needn't wait for the disk.
    flush_nothing = func.set_config(_text("synchronous_commit"), _text("off"), true())
    free = select(unblocked.c.id, unblocked.c.queue, due_in.label("due_in")).where(
        unblocked.c.state == PENDING,
        unblocked.c.blockers == ZERO,
        select(flush_nothing).scalar_subquery().is_not(None),
    )
    left = select(edges.c.parent_id, literal_column("NULL", Text), literal_column("NULL", Double)).where(
        edges.c.child_id.not_in(select(mine.c.child_id)),
        exists().where(tasks.c.id == edges.c.child_id),
    )
    return union_all(free, left)
