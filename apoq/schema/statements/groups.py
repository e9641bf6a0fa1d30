"""Lets a task of a group add others to it, and shows groups."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Integer,
    Select,
    Update,
    any_,
    bindparam,
    exists,
    func,
    select,
    true,
    update,
)

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.literals import ZERO
from apoq.schema.tables import links_table

GROUP_POSITION: Final = -1
"""The position of the edges from the tasks of a group to those that run after it."""


@cache
def group_of(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the group of the running task `task_id`, and the tasks that run after it."""
    tasks, links = tasks_table(schema), links_table(schema)
    closing = tasks.alias("closing")
    return (
        select(tasks.c.group_id, links.c.child_id, links.c.added_count, closing.c.blockers)
        .select_from(
            tasks.join(links, links.c.parent_id == tasks.c.id).join(closing, closing.c.id == links.c.child_id)
        )
        .where(
            tasks.c.id == bindparam("task_id", type_=BigInteger),
            links.c.position == GROUP_POSITION,
            ~links.c.is_done,
        )
        .order_by(links.c.child_id)
    )


@cache
def missing(schema: str | None) -> Select[tuple[int]]:
    """Return the `ids` that no task has."""
    tasks = tasks_table(schema)
    given = func.unnest(bigints("ids")).table_valued("id").render_derived("given")
    return select(given.c.id).where(~exists(select(tasks.c.id).where(tasks.c.id == given.c.id)))


@cache
def add_to_own_edges(schema: str | None) -> Update:
    """Note on the edges from `task_id` to `children` that it has added `number` others to each.

    A worker counts them when it counts the edge. The children themselves are not written, because all tasks
    of the group would wait for each other to do so.
    """
    links = links_table(schema)
    return (
        update(links)
        .where(
            links.c.parent_id == bindparam("task_id", type_=BigInteger),
            links.c.child_id == any_(bigints("children")),
        )
        .values(
            added_count=func.coalesce(links.c.added_count, ZERO) + bindparam("number", type_=Integer),
            needs_check=true(),
        )
    )
