"""Retries and cancels many tasks in a caller's transaction, for all kinds of sessions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from apoq.client.cascades import reopen_edges
from apoq.client.operations import cancel_children
from apoq.client.session_adapters import Caller, Row
from apoq.client.unique_tasks import reserve
from apoq.core.states import RUNNING
from apoq.schema.models import task_class
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.cancel import cancel_many as cancel_statement
from apoq.schema.statements.notify import has_tasks, was_cancelled
from apoq.schema.statements.portable import read_row
from apoq.schema.statements.retry import retry_many as retry_statement
from apoq.schema.statements.select_many import lock_ended, lock_open


class Selection(NamedTuple):
    """Which tasks of a queue are changed."""

    queue: str
    states: Sequence[str | None]
    """One after the other; None for all final states."""
    filters: Mapping[str, Any]
    """The parameters of the filters of `apoq.schema.statements.select_many`."""
    at_most: int


class Retried(NamedTuple):
    """The ids of the tasks that run again, and the number of those that can't."""

    ids: list[int]
    skipped: int


def retry_many(
    caller: Caller, schema: str | None, selection: Selection, delay: timedelta, every: timedelta
) -> Retried:
    """Make ended tasks pending again: the first is due after `delay`, and each next one `every` later."""
    (state,) = selection.states
    statement = lock_ended(schema, state, frozenset(selection.filters))
    parameters: dict[str, Any] = {
        "from_queue": selection.queue,
        "at_most": selection.at_most,
        "looked_at": 0,
        **selection.filters,
    }
    keys: dict[int, str | None] = {}
    taken: set[str | None] = set()
    skipped, has_more = 0, True
    # All are locked before the first key is reserved, so that the keys are reserved in their order.
    while has_more and len(keys) < selection.at_most:
        rows = caller.execute(statement, parameters)
        has_more = len(rows) == selection.at_most
        parameters["looked_at"] += len(rows)
        for row in rows:
            key = row["unique_key"]
            if len(keys) == selection.at_most:
                break
            if row["id"] in keys:
                continue  # another session has released its lock on one of the first
            if row["is_kept"] or key in taken:
                skipped += 1
            else:
                keys[row["id"]] = key
                taken |= {key} - {None}
    free = reserve(caller, schema, selection.queue, (key for key in keys.values() if key is not None))
    ids = [id_ for id_, key in keys.items() if key is None or key in free]
    if ids:
        delays = [(delay + number * every).total_seconds() for number in range(len(ids))]
        retried = caller.execute(retry_statement(schema), {"ids": array_text(ids), "delays": delays})
        for row in retried:
            caller.refresh(task_class(schema), read_row(row))
        if followed := _followed(retried):
            reopen_edges(caller.execute, schema, followed)
        caller.notify(has_tasks(schema, selection.queue))
    return Retried(ids, skipped + len(keys) - len(ids))


def cancel_many(caller: Caller, schema: str | None, selection: Selection, reason: str) -> list[int]:
    """Cancel tasks that have not ended, and notify their workers; return their ids."""
    parameters = {"from_queue": selection.queue, "in_queue": selection.queue, **selection.filters}
    states: dict[int, str | None] = {}
    for state in selection.states:
        if at_most := selection.at_most - len(states):
            statement = lock_open(schema, str(state), frozenset(selection.filters))
            rows = caller.execute(statement, {**parameters, "at_most": at_most})
            states.update((row["id"], state) for row in rows)
    if not states:
        return []
    cancelled = caller.execute(cancel_statement(schema), {"ids": array_text(states), "reason": reason})
    for row in cancelled:
        caller.refresh(task_class(schema), read_row(row))
        if states[row["id"]] == RUNNING:
            caller.notify(was_cancelled(row["id"]))
    if followed := _followed(cancelled):
        cancel_children(caller, schema, followed)
    return [row["id"] for row in cancelled]


def _followed(rows: Iterable[Row]) -> list[int]:
    """Return the ids of the tasks that others wait for."""
    return [row["id"] for row in rows if row["is_followed"]]
