"""Adds tasks that wait for others, and the edges to them, in the caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Insert,
    Integer,
    Select,
    Text,
    Update,
    any_,
    bindparam,
    case,
    cast,
    column,
    func,
    insert,
    literal_column,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from apoq.core.states import PENDING, WAITING
from apoq.postgres.loaders import read_microseconds
from apoq.schema.models import task_class, tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.enqueue import enqueue, given_values, microseconds
from apoq.schema.statements.unique import enqueue_unique
from apoq.schema.tables import links_table

SCHEMA: Final = "apoq_schema"
"""Option of a statement that has no table of its own: the schema of the tables in its parts."""

PARENTS: Final = "parents"
"""The value of `waiting_for` of a task that waits for other tasks."""

GROUP_NAME: Final = "apoq.group"
"""The key in the `meta` of the tasks that run after a group: the group's name."""


def closes_group(tasks: Any) -> ColumnElement[bool]:
    """Return the condition that a task runs after a group."""
    return func.coalesce(tasks.c.meta.has_key(GROUP_NAME), literal_column("false"))


@cache
def look_at_parents(schema: str | None) -> Select[tuple[int, str, bool]]:
    """Return the tasks of `ids`: their states, and whether this transaction has added them.

    They aren't locked.
    """
    tasks = tasks_table(schema)
    # A task that is added has the start of its transaction as its time.
    is_new = (tasks.c.created_at == func.now()).label("is_new")
    return select(tasks.c.id, tasks.c.state, is_new).where(tasks.c.id == any_(bigints("ids")))


@cache
def enqueue_linked(schema: str | None, *, mapped: bool = True, has_id: bool = False) -> Insert:
    """Add a task that is a part of a graph; see `enqueue`.

    It waits if it has `task_blockers`. With `has_id`, its id is `task_id`.
    """
    statement = enqueue(schema, mapped=mapped).values(_linked_values())
    return statement.values(id=bindparam("task_id", type_=BigInteger)) if has_id else statement


@cache
def enqueue_unique_linked(schema: str | None, *, mapped: bool = True) -> Insert:
    """Add such a task with a unique key; see `enqueue_unique`."""
    return enqueue_unique(schema, mapped=mapped).values(_linked_values())


@cache
def enqueue_many_linked(schema: str | None) -> Insert:
    """Add a part of a graph for each line of `task_data`; return what `enqueue` does, in this order.

    `task_types` and `task_keys` have the type and the concurrency key of each. Those before `followed_until`,
    counted from 1, have children.
    """
    documents = func.string_to_array(bindparam("task_data", type_=Text), "\n")
    types, keys = (bindparam(name, type_=ARRAY(Text)) for name in ("task_types", "task_keys"))
    table = tasks_table(schema)
    rows = (
        func.unnest(documents, types, keys)
        .table_valued("document", "type", "key", with_ordinality="number")
        .render_derived("rows")
    )
    number = column("number", BigInteger, _selectable=rows)
    values = {
        **given_values(),
        **_linked_values(),
        "type": column("type", Text, _selectable=rows),
        "key": column("key", Text, _selectable=rows),
        "is_followed": case((number < bindparam("followed_until", type_=BigInteger), true())),
        "created_at": func.now(),
        "data": cast(rows.c.document, JSONB),
    }
    return (
        insert(task_class(schema))
        .from_select([*values], select(*values.values()).order_by(rows.c.number))
        .returning(table.c.id, *(microseconds(table.c[name]) for name in ("created_at", "process_at")))
        .execution_options(dml_strategy="raw")
    )


@cache
def link(schema: str | None) -> Insert:
    """Add the edges of `parents`, `children` and `positions`.

    Those that are `done` are for parents that have completed; the others are counted in `blockers` already.
    """
    tasks, links = tasks_table(schema), links_table(schema)
    edges = (
        func.unnest(
            bigints("parents"),
            bigints("children"),
            bigints("positions"),
            _booleans("done"),
            _booleans("checked_later"),
        )
        .table_valued("parent_id", "child_id", "position", "is_done", "needs_check")
        .render_derived("edges")
    )
    is_done = column("is_done", Boolean, _selectable=edges)
    result = select(tasks.c.result).where(tasks.c.id == edges.c.parent_id, is_done).scalar_subquery()
    values = {
        "parent_id": edges.c.parent_id,
        "child_id": edges.c.child_id,
        "position": cast(edges.c.position, Integer),
        "is_done": is_done,
        "is_counted": is_done,
        "needs_check": edges.c.needs_check,
        "result": result,
    }
    return insert(links).from_select([*values], select(*values.values()))


@cache
def follow_new(schema: str | None) -> Update:
    """Let the completions of the tasks `ids`, which this transaction has added, be written to their edges."""
    tasks = tasks_table(schema)
    return (
        update(tasks)
        .where(tasks.c.id == any_(bigints("ids")), tasks.c.is_followed.is_not(true()))
        .values(is_followed=true())
    )


@cache
def reserve_id(schema: str | None) -> Select[Any]:
    """Return the id of a task that will be added in this transaction."""
    parts = ("apoq_tasks",) if schema is None else (schema, "apoq_tasks")
    quoted = ".".join('"{}"'.format(part.replace('"', '""')) for part in parts)
    sequence = func.pg_get_serial_sequence(bindparam("task_table", quoted, type_=Text), "id")
    return select(func.nextval(sequence, type_=BigInteger).label("id")).execution_options(**{SCHEMA: schema})


def linked_row(parameters: Mapping[str, Any], returned: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values of a new task that `added_row` doesn't know, if it is a part of a graph."""
    if "task_blockers" not in parameters:
        return {}
    blockers = parameters["task_blockers"]
    waits = {"state": WAITING, "waiting_since": read_microseconds(returned["created_at"])}
    return {
        **({**waits, "waiting_for": PARENTS} if blockers else {}),
        "blockers": blockers,
        "on_parent_failure": parameters["task_on_parent_failure"],
        "group_id": parameters["task_group_id"],
        "is_followed": parameters["task_is_followed"],
        "has_parts": True,
    }


def _linked_values() -> dict[str, ColumnElement[Any]]:
    blockers = bindparam("task_blockers", type_=Integer)
    waits = blockers > 0
    return {
        "state": case((waits, _literal(WAITING)), else_=_literal(PENDING)),
        "blockers": blockers,
        "waiting_since": case((waits, func.now())),
        "waiting_for": case((waits, _literal(PARENTS))),
        "on_parent_failure": bindparam("task_on_parent_failure", type_=Text),
        "group_id": bindparam("task_group_id", type_=BigInteger),
        "is_followed": bindparam("task_is_followed", type_=Boolean),
        "has_parts": true(),
    }


def _literal(text: str) -> ColumnElement[str]:
    return literal_column(f"'{text}'", Text)


def _booleans(name: str) -> ColumnElement[Any]:
    return cast(bindparam(name, type_=Text), ARRAY(Boolean))
