"""Adds unique tasks, and finds and changes those that hold the keys, in the caller's transaction."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Delete,
    Double,
    Insert,
    Select,
    Table,
    Text,
    Update,
    and_,
    any_,
    bindparam,
    case,
    cast,
    delete,
    func,
    literal_column,
    null,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql import insert as insert_unless
from sqlalchemy.sql.dml import ReturningUpdate
from sqlalchemy.sql.selectable import TableValuedAlias

from apoq.core.states import CANCELLED, FINAL, PENDING, WAITING
from apoq.schema.models import HOLDS_KEY, task_class, tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.clock import in_utc
from apoq.schema.statements.enqueue import given_values, returned_values
from apoq.schema.statements.literals import EPOCH
from apoq.schema.statements.portable import portable

_PARENTS: Final = literal_column("'parents'", Text)

_REPLACEABLE: Final = (PENDING, WAITING)
"""The states in which a task has not started, so that its data can be replaced."""


@cache
def enqueue_unique(schema: str | None, *, mapped: bool = True) -> Insert:
    """Add a task with the key `task_unique_key`, unless another task holds it; see `enqueue`.

    If a transaction that hasn't ended adds a task with this key, it waits for the end of that transaction.
    """
    table = tasks_table(schema)
    key = bindparam("task_unique_key", type_=Text)
    statement = (
        insert_unless(task_class(schema) if mapped else table)
        .values(
            **given_values(),
            **_unique_values(key),
            created_at=func.now(),
            data=cast(bindparam("task_data", type_=Text), JSONB),
        )
        .on_conflict_do_nothing(**_UNIQUE_INDEX)
        .returning(*returned_values(table, expires=True))
    )
    return statement.execution_options(dml_strategy="raw") if mapped else statement


@cache
def enqueue_many_unique(schema: str | None) -> Insert:
    """Add a task for each document and key, unless another task holds the key, and return the keys.

    `task_data` has a line for each document, `task_unique_keys` its key or NULL, and `task_keys` its
    concurrency key or NULL. The tasks are inserted
    in this order: if all callers sort the keys, they don't deadlock.
    """
    rows = _rows()
    values = {
        **given_values(),
        **_unique_values(rows.c.unique_key),
        "key": rows.c.key,
        "created_at": func.now(),
        "data": cast(rows.c.document, JSONB),
    }
    return (
        insert_unless(task_class(schema))
        .from_select([*values], select(*values.values()))
        .on_conflict_do_nothing(**_UNIQUE_INDEX)
        .returning(tasks_table(schema).c.unique_key)
        .execution_options(dml_strategy="raw")
    )


@cache
def holder(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the task that holds `task_unique_key`; see `holders`."""
    key = bindparam("task_unique_key", type_=Text)
    held = tasks_table(schema)
    return select(*(portable(column.name, column) for column in held.c)).where(
        *_holds(held, key), _is_locked_or_fixed(schema, key)
    )


@cache
def holders(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the ids, keys and states of the tasks that hold one of `task_unique_keys`.

    Those that have not started are locked until the caller's transaction ends: no worker claims them before,
    so they run with what the transaction has written. The lock doesn't exclude other callers. A task that is
    claimed at the same moment is not returned.
    """
    keys = any_(_keys())
    held = tasks_table(schema)
    return select(held.c.id, held.c.held_unique_key, held.c.state).where(
        *_holds(held, keys), _is_locked_or_fixed(schema, keys)
    )


@cache
def replace(schema: str | None) -> ReturningUpdate[Any]:
    """Replace the task that holds `task_unique_key`, if it has not started, by a new one with the same id.

    With `max_wait`, it is due that many seconds after its creation at the latest.
    """
    held = tasks_table(schema)
    new = _replacement(held, cast(bindparam("task_data", type_=Text), JSONB))
    # The mapped class, not its table, so that the session updates its objects.
    return (
        update(task_class(schema))
        .where(*_holds(held, bindparam("task_unique_key", type_=Text)), _has_not_started(held))
        .values(new)
        .returning(*(portable(column.name, column) for column in held.c))
        .execution_options(synchronize_session="fetch")
    )


@cache
def replace_many(schema: str | None) -> ReturningUpdate[Any]:
    """Replace the tasks that hold one of `task_unique_keys`, if they have not started; return the keys.

    Each by the document in the same line of `task_data`. They are locked in the order of their keys, so that
    callers don't deadlock.
    """
    rows = _rows()
    tasks, held = tasks_table(schema), tasks_table(schema).alias("held")
    locked = (
        select(held.c.id)
        .where(*_holds(held, any_(_keys())), _has_not_started(held))
        .order_by(held.c.held_unique_key)
        .with_for_update(key_share=True)
        .scalar_subquery()
    )
    return (
        update(tasks)
        .where(
            tasks.c.id == any_(func.array(locked)),
            tasks.c.queue == bindparam("task_queue", type_=Text),
            tasks.c.held_unique_key == rows.c.unique_key,
            _has_not_started(tasks),
        )
        .values(_replacement(tasks, cast(rows.c.document, JSONB)) | {"key": rows.c.key})
        .returning(tasks.c.held_unique_key.label("unique_key"))
    )


@cache
def release_ended(schema: str | None) -> Update:
    """Clear the keys of `task_unique_keys` that ended tasks hold.

    Such a task was ended by another program, such as the Node.js original, which doesn't know of keys.
    """
    held = tasks_table(schema)
    return update(held).where(*_holds(held, any_(_keys())), _has_ended(held)).values(held_unique_key=null())


@cache
def key_of_ended(schema: str | None) -> Select[tuple[str | None]]:
    """Return the unique key of the task `task_id` of `from_queue` if it has one and has ended."""
    tasks = tasks_table(schema)
    return select(tasks.c.unique_key).where(
        tasks.c.id == bindparam("task_id", type_=BigInteger),
        tasks.c.queue == bindparam("from_queue", type_=Text),
        tasks.c.unique_key.is_not(None),
        _has_ended(tasks),
    )


@cache
def reserve(schema: str | None) -> Insert:
    """Hold each of `task_unique_keys` by a placeholder, unless another task holds it; return ids and keys.

    `unreserve` deletes the placeholders. An UPDATE that takes a key fails if another transaction takes it at
    the same moment. After this, it can't: other transactions wait for the end of this one. The keys must be
    sorted, so that callers don't deadlock.
    """
    table = tasks_table(schema)
    keys = func.unnest(_keys()).table_valued("unique_key").render_derived("keys")
    values = {
        "queue": bindparam("task_queue", type_=Text),
        "type": literal_column("''", Text),
        "state": literal_column(f"'{CANCELLED}'", Text),
        "held_unique_key": keys.c.unique_key,
    }
    return (
        insert_unless(table)
        .from_select(list(values), select(*values.values()))
        .on_conflict_do_nothing(**_UNIQUE_INDEX)
        .returning(table.c.id, table.c.held_unique_key)
    )


@cache
def unreserve(schema: str | None) -> Delete:
    """Delete the placeholders `ids`."""
    tasks = tasks_table(schema)
    return delete(tasks).where(tasks.c.id == any_(bigints("ids")))


_UNIQUE_INDEX: Final[dict[str, Any]] = {
    "index_elements": ["queue", "held_unique_key"],
    "index_where": text(HOLDS_KEY),
}


def _unique_values(key: ColumnElement[Any]) -> dict[str, ColumnElement[Any]]:
    return {
        "unique_key": key,
        "held_unique_key": key,
        "unique_until_end": bindparam("unique_until_end", type_=Boolean),
    }


def _rows() -> TableValuedAlias:
    documents = func.string_to_array(bindparam("task_data", type_=Text), "\n")
    keys = bindparam("task_keys", type_=ARRAY(Text))
    columns = ("document", "unique_key", "key")
    return func.unnest(documents, _keys(), keys).table_valued(*columns).render_derived("rows")


def _keys() -> ColumnElement[Any]:
    return bindparam("task_unique_keys", type_=ARRAY(Text))


def _holds(held: Any, key: ColumnElement[Any]) -> tuple[ColumnElement[bool], ...]:
    return held.c.queue == bindparam("task_queue", type_=Text), held.c.held_unique_key == key


def _is_locked_or_fixed(schema: str | None, key: ColumnElement[Any]) -> ColumnElement[bool]:
    """Lock the tasks that hold the key and have not started; not the others, which a worker settles."""
    waiting = tasks_table(schema).alias("waiting")
    locked = (
        select(waiting.c.id)
        .where(*_holds(waiting, key), _has_not_started(waiting))
        .with_for_update(read=True, key_share=True)
        .cte("locked")
    )
    held = tasks_table(schema)
    return or_(~_has_not_started(held), held.c.id.in_(select(locked.c.id)))


def _has_not_started(held: Any) -> ColumnElement[bool]:
    return or_(*(held.c.state == literal_column(f"'{state}'", Text) for state in _REPLACEABLE))


def _has_ended(held: Any) -> ColumnElement[bool]:
    return or_(*(held.c.state == literal_column(f"'{state}'", Text) for state in FINAL))


def _replacement(held: Table, document: ColumnElement[Any]) -> dict[str, ColumnElement[Any]]:
    """Return everything that the caller gives; the task keeps its id, its creation and its attempts."""
    given = given_values()
    del given["queue"]
    # Not of parents, for which it still waits.
    waits_for_place = and_(held.c.waiting_for.is_not(None), held.c.waiting_for != _PARENTS)
    due = select(given["process_at"]).scalar_subquery()
    latest = func.to_timestamp(
        func.date_part(EPOCH, in_utc(held.c.created_at), type_=Double) + bindparam("max_wait", type_=Double)
    )
    return {
        **given,
        "process_at": func.least(due, latest),  # without NULL
        "expires_at": select(given["expires_at"]).scalar_subquery(),
        # It may have another key or type now, which has a free place.
        "state": case((waits_for_place, literal_column(f"'{PENDING}'", Text)), else_=held.c.state),
        "waiting_for": case((held.c.waiting_for == _PARENTS, held.c.waiting_for)),
        "waiting_since": case((held.c.waiting_for == _PARENTS, held.c.waiting_since)),
        "pool_key": null(),
        "unique_until_end": bindparam("unique_until_end", type_=Boolean),
        "data": document,
    }
