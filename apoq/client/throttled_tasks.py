"""Adds throttled tasks in a caller's transaction, for all kinds of sessions.

At most one task is added with a unique key in each window, which begins with that task. A caller that finds a
window of another transaction that has ended doesn't wait, and locks nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from apoq.client import unique_tasks
from apoq.client.session_adapters import Caller
from apoq.client.unique_tasks import Item
from apoq.core.unique import ADDED, SKIP, THROTTLED
from apoq.postgres.loaders import read_json
from apoq.schema.models import Task
from apoq.schema.objects import unsaved, with_outcome
from apoq.schema.statements.throttles import begin_windows, end_windows, open_windows


def add(caller: Caller, schema: str | None, parameters: dict[str, Any], throttle: timedelta) -> Task:
    """Add a task with the key `task_unique_key`, unless the key has a window, or another task holds it."""
    queue, key = parameters["task_queue"], parameters["task_unique_key"]
    if not _begun(caller, schema, queue, [key], throttle):
        return with_outcome(unsaved(schema, _values(parameters)), THROTTLED)
    task = unique_tasks.add(caller, schema, parameters, SKIP, None)
    if task.add_outcome != ADDED:
        _end(caller, schema, queue, {key})
    return task


def add_many(
    caller: Caller,
    schema: str | None,
    parameters: dict[str, Any],
    items: Sequence[Item],
    throttle: timedelta,
) -> int:
    """Add a task for each of these items in the same way; return how many were added."""
    queue = parameters["task_queue"]
    keys = sorted({item.key for item in items if item.key is not None})
    begun = set(_begun(caller, schema, queue, keys, throttle)) if keys else set()
    chosen = [item for item in items if item.key is None or item.key in begun]
    if not chosen:
        return 0
    added = unique_tasks.add_many(caller, schema, parameters, chosen, SKIP, None)
    _end(caller, schema, queue, begun - added.keys)
    return added.number


def _begun(caller: Caller, schema: str | None, queue: str, keys: list[str], throttle: timedelta) -> list[str]:
    """Begin windows for sorted keys; return the keys whose windows have begun."""
    parameters = {"task_queue": queue, "task_unique_keys": keys}
    have_one = {row["key"] for row in caller.execute(open_windows(schema), parameters)}
    parameters["task_unique_keys"] = [key for key in keys if key not in have_one]
    if len(have_one) == len(keys):
        return []
    length = {"throttle": throttle, "throttle_seconds": throttle.total_seconds()}
    return [row["key"] for row in caller.execute(begin_windows(schema), {**parameters, **length})]


def _end(caller: Caller, schema: str | None, queue: str, keys: set[str]) -> None:
    """End windows in which no task was added, because another one holds the key."""
    if keys:
        parameters = {"task_queue": queue, "task_unique_keys": sorted(keys)}
        caller.execute(end_windows(schema), parameters)


def _values(parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "queue": parameters["task_queue"],
        "type": parameters["task_type"],
        "data": read_json(parameters["task_data"]),
        "unique_key": parameters["task_unique_key"],
    }
