"""Applies the end of a task that has not completed to the tasks that wait for it.

One level of a graph at a time, and a bounded number of tasks with each statement, locked in the order of
their ids.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    CompoundSelect,
    FromClause,
    Integer,
    Select,
    Text,
    Update,
    all_,
    any_,
    bindparam,
    cast,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, aggregate_order_by

from apoq.core.dependencies import CANCEL, ERROR_CLASS, RUN
from apoq.core.states import CANCELLED, FAILED, WAITING
from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.clock import now
from apoq.schema.statements.links import SCHEMA
from apoq.schema.tables import links_table

CASCADE_SIZE: Final = 1_000
"""Edges that one statement looks at, at most."""

EDGE, NEXT, LEFT, FREE, REPORT = "edge", "next", "left", "free", "report"
"""Kinds of the rows of `apply_failures`."""


@cache
def apply_failures(schema: str | None, *, waits: bool = False, reports: bool = False) -> CompoundSelect[Any]:
    """Apply the end of the tasks `ids` that failed, were cancelled or don't exist to their children.

    Up to `at_most` edges. Each gets the error, so that it is not applied again. A child that is cancelled
    with its parents is cancelled, and one that runs in any case need not wait for the parent any more.

    `waits`: wait for children that another session has locked, instead of leaving them for later; and let a
    worker count the edges off after the commit. Edges that another session has locked are left to the sweep.

    Returns rows of a kind and an id: "edge" with a parent, for each edge that was written; "next" with each
    child that was cancelled, and that other tasks wait for; "free" with the parent of an edge that is done;
    "left" with the parent of an edge that was left. With `reports`, also "report" for each child that was
    cancelled, with its type, queue, attempt and reason.
    """
    tasks, links = tasks_table(schema), links_table(schema)
    given = func.unnest(bigints("ids")).table_valued("id").render_derived("given")
    ended = (
        select(
            given.c.id,
            func.jsonb_build_object(
                _text("class"),
                _text(ERROR_CLASS),
                _text("message"),
                func.concat(
                    _text("parent "),
                    given.c.id,
                    _text(" ("),
                    func.coalesce(tasks.c.type, _text("?")),
                    _text(") "),
                    func.coalesce(tasks.c.state, _text("was deleted")),
                ),
                _text("parent"),
                cast(given.c.id, Text),
                _text("traceback"),
                _text(""),
            ).label("error"),
        )
        .select_from(given.outerjoin(tasks, tasks.c.id == given.c.id))
        .where(or_(tasks.c.id.is_(None), _is(tasks.c.state, FAILED, CANCELLED)))
        .cte("ended")
    )
    open_edges = (
        select(links.c.parent_id, links.c.child_id, ended.c.error)
        .select_from(ended.join(links, links.c.parent_id == ended.c.id))
        .where(~links.c.is_done, links.c.error.is_(None))
        .order_by(links.c.child_id)
        .limit(bindparam("at_most", type_=Integer))
    )
    if waits:
        # A running task that has added others to its group has locked its edges, and may wait for the caller.
        open_edges = open_edges.with_for_update(of=links, skip_locked=True)
    edges = open_edges.cte("edges")
    child = tasks.alias("child")
    mine = (
        select(
            edges.c.parent_id,
            edges.c.child_id,
            edges.c.error,
            func.coalesce(child.c.on_parent_failure, _text(CANCEL)).label("policy"),
        )
        .join(child, child.c.id == edges.c.child_id)
        .order_by(child.c.id)
        .with_for_update(of=child, skip_locked=not waits)
        .cte("mine")
    )
    is_free = mine.c.policy == _text(RUN)
    written = (
        update(links)
        .where(
            links.c.parent_id == mine.c.parent_id,
            links.c.child_id == mine.c.child_id,
            ~links.c.is_done,
            links.c.error.is_(None),
        )
        .values(
            error=mine.c.error,
            is_done=is_free,
            needs_check=or_(links.c.needs_check, is_free) if waits else links.c.needs_check,
        )
        .returning(links.c.parent_id, links.c.is_done)
        .cte("written")
    )
    errors: Any = func.array_agg(aggregate_order_by(mine.c.error, mine.c.parent_id), type_=ARRAY(JSONB))
    first = (
        select(mine.c.child_id, errors[1].label("error"))
        .where(mine.c.policy == _text(CANCEL))
        .group_by(mine.c.child_id)
        .cte("first")
    )
    cancelled = (
        update(tasks)
        .where(tasks.c.id == first.c.child_id, tasks.c.state == _text(WAITING))
        .values(
            state=_text(CANCELLED),
            cancelled_at=now(),
            error=first.c.error,
            held_unique_key=null(),
            waiting_since=null(),
            waiting_for=null(),
        )
        .returning(tasks.c.id, tasks.c.is_followed, *(_reported(tasks) if reports else ()))
        .cte("cancelled")
    )
    rows = [
        select(_text(EDGE).label("kind"), written.c.parent_id.label("id")),
        select(_text(FREE), written.c.parent_id).where(written.c.is_done),
        select(_text(NEXT), cancelled.c.id).where(cancelled.c.is_followed),
        select(_text(LEFT), edges.c.parent_id).where(
            edges.c.child_id.not_in(select(mine.c.child_id)),
            exists().where(tasks.c.id == edges.c.child_id),
        ),
    ]
    if reports:
        columns = [cancelled.c[column.key] for column in _reported(tasks)]
        nothing = [cast(null(), column.type).label(column.key) for column in columns]
        rows = [row.add_columns(*nothing) for row in rows]
        rows.append(select(_text(REPORT), cancelled.c.id, *columns))
    return union_all(*rows).execution_options(**{SCHEMA: schema})


def _reported(tasks: Any) -> tuple[Any, ...]:
    reason = tasks.c.error["message"].as_string().label("reason")
    return tasks.c.type, tasks.c.queue, tasks.c.attempt, reason


@cache
def reopen(schema: str | None) -> Update:
    """Let the next end of the tasks `ids`, which were retried, be applied to their children again."""
    links = links_table(schema)
    return (
        update(links)
        .where(links.c.parent_id == any_(bigints("ids")), ~links.c.is_done, links.c.error.is_not(None))
        .values(error=null())
    )


@cache
def cancelled_with(schema: str | None) -> Select[tuple[int, str, str | None]]:
    """Lock up to `at_most` tasks behind `behind_id` that were cancelled with one of the tasks `ids`.

    Returns their ids, queues and unique keys.
    """
    tasks, links = tasks_table(schema), links_table(schema)
    of_parents = select(links.c.child_id).where(links.c.parent_id == any_(bigints("ids")), *_failed(links))
    return (
        select(tasks.c.id, tasks.c.queue, tasks.c.unique_key)
        .where(
            tasks.c.id.in_(of_parents),
            tasks.c.id > bindparam("behind_id", type_=BigInteger),
            tasks.c.state == _text(CANCELLED),
            tasks.c.error["class"].as_string() == _text(ERROR_CLASS),
            tasks.c.blockers > literal_column("0"),
        )
        .order_by(tasks.c.id)
        .limit(bindparam("at_most", type_=Integer))
        .with_for_update(of=tasks)
    )


@cache
def have_failed_parents(schema: str | None) -> Select[tuple[int]]:
    """Return those of the tasks `children` of which a parent has not completed, other than the tasks `ids`.

    If the children are locked, it sees the parents that another transaction has just retried.
    """
    links = links_table(schema)
    return (
        select(links.c.child_id.label("id"))
        .where(
            links.c.child_id == any_(bigints("children")),
            links.c.parent_id != all_(bigints("ids")),
            *_failed(links),
        )
        .distinct()
    )


@cache
def revive(schema: str | None) -> Update:
    """Let the tasks `ids`, which this transaction has locked, wait for their parents again; return them.

    They have all of their attempts again, and hold their unique keys, which must have been reserved.
    """
    tasks = tasks_table(schema)
    return (
        update(tasks)
        .where(tasks.c.id == any_(bigints("ids")))
        .values(
            state=_text(WAITING),
            waiting_since=now(),
            waiting_for=_text("parents"),
            attempt=0,
            fail_count=0,
            rescue_count=0,
            cancelled_at=null(),
            held_unique_key=tasks.c.unique_key,
        )
        .returning(tasks.c.id, tasks.c.is_followed)
    )


def _failed(links: FromClause) -> tuple[Any, ...]:
    """Return the conditions that the parent of an edge has not completed, and the child knows of it."""
    return ~links.c.is_done, links.c.error.is_not(None)


def _text(value: str) -> Any:
    return literal_column("'" + value.replace("'", "''") + "'", Text)


def _is(state: Any, *states: str) -> Any:
    return or_(*(state == _text(each) for each in states))
