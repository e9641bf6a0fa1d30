"""Lets tasks wait again that were cancelled with a task which is retried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from apoq.client.cascades import batches, reopen_edges
from apoq.client.session_adapters import Caller, Row
from apoq.client.unique_tasks import reserve
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.cascade import CASCADE_SIZE, cancelled_with, have_failed_parents, revive

_LOWEST_ID: Final = -(2**63)


def revive_children(caller: Caller, schema: str | None, id_: int) -> None:
    """Let the tasks wait again that were cancelled because this one had not completed, level by level.

    A task stays cancelled if another parent has not completed either, or if its unique key is taken.
    """
    level = {id_}
    while level:
        below: set[int] = set()
        for ids in batches(level):
            below |= _revive(caller, schema, ids)
            reopen_edges(caller.execute, schema, ids)
        level = below


def _revive(caller: Caller, schema: str | None, ids: list[int]) -> set[int]:
    """Let the children of these tasks wait again; return those that other tasks wait for."""
    followed: set[int] = set()
    behind = _LOWEST_ID
    while True:
        parameters = {"ids": array_text(ids), "behind_id": behind, "at_most": CASCADE_SIZE}
        found = caller.execute(cancelled_with(schema), parameters)
        if not found:
            return followed
        behind = found[-1]["id"]
        children = {"ids": parameters["ids"], "children": array_text(row["id"] for row in found)}
        cancelled = {row["id"] for row in caller.execute(have_failed_parents(schema), children)}
        ready = [row for row in found if row["id"] not in cancelled]
        revived = caller.execute(revive(schema), {"ids": array_text(_with_free_keys(caller, schema, ready))})
        followed.update(row["id"] for row in revived if row["is_followed"])


def _with_free_keys(caller: Caller, schema: str | None, rows: Sequence[Row]) -> list[int]:
    """Reserve the unique keys of tasks; return those that have none, or may take theirs."""
    ids = [row["id"] for row in rows if row["unique_key"] is None]
    keys: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["unique_key"] is not None:
            keys.setdefault(row["queue"], {}).setdefault(row["unique_key"], row["id"])
    for queue, its in keys.items():
        ids += [its[key] for key in reserve(caller, schema, queue, its)]
    return ids
