"""Takes the unique keys of tasks that a worker has made pending again.

Not in the statement that makes them pending: that must not fail, or wait, because of a key. It isn't done in
schemas that Citus shards, where no timeout would end a wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import psycopg
from psycopg.errors import UniqueViolation
from sqlalchemy import Executable
from sqlalchemy.exc import SQLAlchemyError

from apoq.core.states import PENDING
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.take_keys import take_keys

Execute = Callable[[Executable, dict[str, Any]], Any]


def lacking(rows: Iterable[Sequence[Any]]) -> list[int]:
    """Return the ids of the tasks that don't hold their unique keys, of rows with the id and `lacks_key`."""
    return [id_ for id_, lacks_key in rows if lacks_key]


def pending_without_key(rows: Iterable[Mapping[Any, Any]]) -> list[int]:
    """Return the ids of the pending tasks that don't hold their unique keys."""
    return [
        row["id"]
        for row in rows
        if row["unique_key"] is not None and row["held_unique_key"] is None and row["state"] == PENDING
    ]


def take_free_keys(execute: Execute, schema: str | None, ids: Sequence[int]) -> None:
    """Let pending tasks hold their unique keys, if these are free; never fail."""
    if not ids:
        return
    try:
        execute(take_keys(schema), {"ids": array_text(ids)})
    except UniqueViolation:
        # A caller has just added a task with one of the keys.
        if len(ids) > 1:
            for id_ in ids:
                take_free_keys(execute, schema, [id_])
    except (psycopg.Error, SQLAlchemyError):
        # A caller is adding a task with one of the keys, in a long transaction. Or the database is away, and
        # the next statement reports that.
        return
