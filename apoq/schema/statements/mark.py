"""Marks the edges of tasks as done, in the statement that completes the tasks.

A completion writes only to the task and to its own edges, which no other transaction needs. The edges are
counted off the children later; see `unblock`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Delete, Select, Update, delete, select, true, update

from apoq.schema.models import tasks_table
from apoq.schema.tables import links_table


def with_edges(
    statement: Update | Delete, schema: str | None, columns: Sequence[ColumnElement[Any]]
) -> tuple[Select[Any], Any]:
    """Return a SELECT without columns of the tasks that a completion writes, and the CTE with their columns.

    The edges to their children are marked as done. If the tasks are deleted, so are the edges to their
    parents.
    """
    tasks, links = tasks_table(schema), links_table(schema)
    known = {column.key for column in columns}
    needed = [tasks.c[name] for name in ("id", "result", "is_followed") if name not in known]
    ended = statement.returning(*columns, *needed).cte("ended")
    marked = (
        update(links)
        .where(links.c.parent_id == ended.c.id, ended.c.is_followed, ~links.c.is_done)
        .values(is_done=true(), result=ended.c.result)
        .returning(links.c.child_id)
        .cte("marked")
    )
    found = select().select_from(ended).add_cte(marked)
    if isinstance(statement, Delete):
        gone = delete(links).where(links.c.child_id == ended.c.id).returning(links.c.parent_id).cte("gone")
        found = found.add_cte(gone)
    return found, ended
