"""Writes, reads and deletes the progress of tasks."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    Delete,
    Select,
    Text,
    Update,
    any_,
    bindparam,
    delete,
    func,
    literal_column,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.dml import ReturningInsert
from sqlalchemy.types import BigInteger, Double, Integer

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.clock import now
from apoq.schema.statements.portable import portable
from apoq.schema.statements.settle import rows_of
from apoq.schema.tables import progress_table


@cache
def mark_parts(schema: str | None) -> Update:
    """Record that the tasks `ids`, claimed with `tokens`, may have progress.

    Tasks that are marked already are not written again. Those that another session has locked are skipped.
    """
    tasks = tasks_table(schema)
    rows = rows_of("marked", id=BigInteger, token=BigInteger)
    its = tasks.alias("held")
    is_unmarked = its.c.has_parts.is_distinct_from(literal_column("true"))
    unmarked = (
        select(its.c.id)
        .join(rows, (its.c.id == rows.c.id) & (its.c.claim_token == rows.c.token))
        .where(is_unmarked)
        .with_for_update(of=its, skip_locked=True)
    )
    return (
        update(tasks)
        .where(tasks.c.id == any_(func.array(unmarked.scalar_subquery())))
        .values(has_parts=true())
    )


@cache
def write_progress(schema: str | None) -> ReturningInsert[tuple[int, int]]:
    """Write the progress of the tasks `ids`, claimed with `tokens`: `dones`, `totals` and `notes`.

    Returns the ids and tokens of those that were written. A task that has been claimed again, or is not
    marked by `mark_parts`, is left out.
    """
    tasks, table = tasks_table(schema), progress_table(schema)
    rows = rows_of("written", id=BigInteger, token=BigInteger, done=Double, total=Double, note=Text)
    new = insert(table).from_select(
        ["task_id", "token", "done", "total", "note", "at"],
        select(rows.c.id, rows.c.token, rows.c.done, rows.c.total, rows.c.note, now())
        .join(tasks, (tasks.c.id == rows.c.id) & (tasks.c.claim_token == rows.c.token))
        .where(tasks.c.has_parts)
        .order_by(rows.c.id),
    )
    values = {name: new.excluded[name] for name in ("token", "done", "total", "note", "at")}
    return new.on_conflict_do_update(
        index_elements=[table.c.task_id],
        set_=values,
        # Another worker may have claimed the task, and reported its progress, since this statement began.
        where=table.c.token <= new.excluded.token,
    ).returning(table.c.task_id, table.c.token)


@cache
def read_progress(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return the progress of the task `task_id` of `from_queue`."""
    tasks, table = tasks_table(schema), progress_table(schema)
    task_id = bindparam("task_id", type_=BigInteger)
    in_queue = tasks.c.queue == bindparam("from_queue", type_=Text)
    # Not `SELECT *`, because a role may have the right to read some columns only.
    its_task = select(tasks.c.id).where(tasks.c.id == task_id, in_queue).exists()
    columns = (portable(name, table.c[name]) for name in ("done", "total", "note", "at"))
    return select(*columns).where(table.c.task_id == task_id, its_task)


@cache
def look_for_orphans(schema: str | None) -> Select[*tuple[Any, ...]]:
    """Return up to `at_most` ids after `after` of tasks with progress, and whether each task is there."""
    tasks, table = tasks_table(schema), progress_table(schema)
    is_there = select(tasks.c.id).where(tasks.c.id == table.c.task_id).exists()
    return (
        select(table.c.task_id, is_there.label("is_there"))
        .where(table.c.task_id > bindparam("after", type_=BigInteger))
        .order_by(table.c.task_id)
        .limit(bindparam("at_most", type_=Integer))
    )


@cache
def delete_orphans(schema: str | None) -> Delete:
    """Delete the progress of those tasks of `ids` that don't exist any more."""
    tasks, table = tasks_table(schema), progress_table(schema)
    is_gone = ~select(tasks.c.id).where(tasks.c.id == table.c.task_id).exists()
    return delete(table).where(table.c.task_id == any_(bigints("ids")), is_gone)
