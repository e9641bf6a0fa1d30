"""Finds edges at which a worker has something left to do."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Integer,
    Select,
    Text,
    Update,
    and_,
    any_,
    bindparam,
    exists,
    false,
    func,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    update,
)

from apoq.core.states import PENDING, RUNNING, WAITING
from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.links import PARENTS
from apoq.schema.statements.states import is_in
from apoq.schema.tables import links_table


@cache
def edges_to_check(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return up to `at_most` edges that a worker must look at, with the states of their parents."""
    links = links_table(schema)
    return _with_parent(schema, select().where(links.c.needs_check).order_by(links.c.child_id))


@cache
def next_waiting(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the next `at_most` waiting tasks, behind a `queue` and an `id`."""
    tasks = tasks_table(schema)
    behind = tuple_(bindparam("queue", type_=Text), bindparam("id", type_=BigInteger))
    page = (
        select(tasks.c.queue, tasks.c.id, tasks.c.waiting_for, tasks.c.blockers)
        .where(is_in(tasks, WAITING), tuple_(tasks.c.queue, tasks.c.id) > behind)
        .order_by(tasks.c.queue, tasks.c.id)
        .limit(bindparam("at_most", type_=Integer))
    ).subquery("page")
    return select(page.c.queue, page.c.id, (page.c.waiting_for == PARENTS).label("has_parents"))


@cache
def open_edges(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return up to `at_most` edges of `children` that aren't counted, behind `behind_child` and so on."""
    links = links_table(schema)
    place = tuple_(links.c.child_id, links.c.position, links.c.parent_id)
    behind = tuple_(
        bindparam("behind_child", type_=BigInteger),
        bindparam("behind_position", type_=Integer),
        bindparam("behind_parent", type_=BigInteger),
    )
    return _with_parent(
        schema,
        select()
        .where(links.c.child_id == any_(bigints("children")), place > behind, ~links.c.is_counted)
        .order_by(links.c.child_id, links.c.position, links.c.parent_id),
    )


@cache
def follow(schema: str | None) -> Update:
    """Let the completions of `ids`, which were added before their children, be written to their edges.

    Tasks that another session has locked are left for later.
    """
    tasks, held = tasks_table(schema), tasks_table(schema).alias("held")
    found = (
        select(held.c.id)
        .where(held.c.id == any_(bigints("ids")), held.c.is_followed.is_not(true()), _is_open(held))
        .order_by(held.c.id)
        .with_for_update(of=held, skip_locked=True)
        .cte("found")
    )
    return update(tasks).where(tasks.c.id == found.c.id, _is_open(tasks)).values(is_followed=true())


@cache
def checked(schema: str | None) -> Update:
    """Note that the edges of `parents` and `children` need no check any more, if that is so."""
    links, tasks = links_table(schema), tasks_table(schema)
    edges = (
        func.unnest(bigints("parents"), bigints("children"))
        .table_valued("parent_id", "child_id")
        .render_derived("edges")
    )
    # Its completion will be committed after this statement has begun, and the worker that completes it then
    # looks for all of its edges.
    is_followed = exists().where(tasks.c.id == links.c.parent_id, tasks.c.is_followed, _is_open(tasks))
    is_applied = and_(links.c.error.is_not(None), ~links.c.is_done)
    is_left_over = ~exists().where(tasks.c.id == links.c.child_id)
    return (
        update(links)
        .where(
            links.c.parent_id == edges.c.parent_id,
            links.c.child_id == edges.c.child_id,
            links.c.needs_check,
            or_(is_applied, is_followed, is_left_over),
        )
        .values(needs_check=false())
    )


def _with_parent(schema: str | None, of_edges: Select[Any]) -> Select[*tuple[Any, ...]]:
    links, tasks = links_table(schema), tasks_table(schema)
    edges = (
        of_edges.add_columns(
            links.c.parent_id,
            links.c.child_id,
            links.c.position,
            links.c.is_done,
            links.c.error.is_not(None).label("has_error"),
        )
        .limit(bindparam("at_most", type_=Integer))
        .subquery("edges")
    )
    return select(
        *edges.c,
        tasks.c.state.label("parent_state"),
        tasks.c.is_followed.label("parent_is_followed"),
    ).select_from(edges.outerjoin(tasks, tasks.c.id == edges.c.parent_id))


def _is_open(tasks: Any) -> Any:
    return or_(
        *(tasks.c.state == literal_column(f"'{state}'", Text) for state in (PENDING, RUNNING, WAITING))
    )
