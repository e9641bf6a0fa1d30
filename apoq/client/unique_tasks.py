"""Adds and retries tasks with unique keys in a caller's transaction, for all kinds of sessions.

A key may be given up by its task between two statements. So each operation is repeated until the key was
either taken or found at a task: at READ COMMITTED, none of them fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, Final, NamedTuple

from sqlalchemy import Insert

from apoq.client.session_adapters import Caller, Row
from apoq.core.states import FINAL, RUNNING
from apoq.core.unique import ADDED, KEPT, RAISE, REPLACE, REPLACED, SKIP, OnConflict
from apoq.errors import ApoqError, DuplicateTask
from apoq.schema.models import Task
from apoq.schema.objects import detached, with_outcome
from apoq.schema.statements import unique as statements
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.enqueue import added_row
from apoq.schema.statements.links import linked_row
from apoq.schema.statements.notify import has_tasks
from apoq.schema.statements.portable import read_row

BATCH_COUNT: Final = 1_000
BATCH_SIZE: Final = 4 * 1024 * 1024
"""Most tasks, and most characters of data, in one statement."""

MAX_TRIES: Final = 100
"""Each try needs another session that takes the key and gives it up meanwhile."""


class Item(NamedTuple):
    """A task for `add_many`."""

    key: str | None
    """The unique key."""
    document: str
    concurrency_key: str | None = None


class Added(NamedTuple):
    """The tasks that `add_many` has added."""

    number: int
    keys: set[str | None]
    """Their unique keys."""


def add(
    caller: Caller,
    schema: str | None,
    parameters: dict[str, Any],
    on_conflict: OnConflict,
    max_wait: timedelta | None,
    *,
    statement: Callable[..., Insert] = statements.enqueue_unique,
) -> Task:
    """Add a task with the key `task_unique_key`, or do what `on_conflict` says if another task holds it.

    `statement` returns the INSERT.
    """
    insert = statement(schema, mapped=caller.has_orm_listeners)
    task = _add(caller, schema, parameters, on_conflict, max_wait, insert)
    # Also for a task that was kept: it is locked until the commit, so a claim may have skipped it.
    caller.notify(has_tasks(schema, parameters["task_queue"]))
    return task


def _add(
    caller: Caller,
    schema: str | None,
    parameters: dict[str, Any],
    on_conflict: OnConflict,
    max_wait: timedelta | None,
    insert: Insert,
) -> Task:
    for _ in range(MAX_TRIES):
        for row in caller.execute(insert, parameters):
            task = detached(schema, {**added_row(parameters, row), **linked_row(parameters, row)})
            caller.attach(task)
            return with_outcome(task, ADDED)
        if on_conflict == REPLACE and (found := _replaced(caller, schema, parameters, max_wait)):
            return with_outcome(found, REPLACED)
        if found := _kept(caller, schema, parameters, on_conflict):
            return with_outcome(found, KEPT)
    raise _unreadable(parameters["task_unique_key"])


def add_many(
    caller: Caller,
    schema: str | None,
    parameters: dict[str, Any],
    items: Iterable[Item],
    on_conflict: OnConflict,
    max_wait: timedelta | None,
) -> Added:
    """Add a task for each of these items, or do what `on_conflict` says; return what was added."""
    added = _add_many(caller, schema, parameters, items, on_conflict, max_wait)
    caller.notify(has_tasks(schema, parameters["task_queue"]))
    return added


def _add_many(
    caller: Caller,
    schema: str | None,
    parameters: dict[str, Any],
    items: Iterable[Item],
    on_conflict: OnConflict,
    max_wait: timedelta | None,
) -> Added:
    left, keyless = _by_key(items, on_conflict)
    added = Added(0, set())
    for _ in range(MAX_TRIES):
        # All inserts in the order of the keys, and then all locks in this order, so that callers don't
        # deadlock.
        taken: list[Item] = []
        for batch in _batches([*left, *keyless]):
            rows = caller.execute(statements.enqueue_many_unique(schema), {**parameters, **_arrays(batch)})
            done = {row["unique_key"] for row in rows}
            added = Added(added.number + len(rows), added.keys | done)
            taken += [item for item in batch if item.key not in done]
        if not taken:
            return added
        left, keyless = [], []
        for batch in _batches(taken):
            done = set()
            if on_conflict == REPLACE:
                done = _replace_many(caller, schema, {**parameters, **_arrays(batch)}, max_wait)
            rest = [item for item in batch if item.key not in done]
            done |= _keep_many(caller, schema, parameters["task_queue"], rest, on_conflict)
            left += [item for item in batch if item.key not in done]
        if not left:
            return added
    raise _unreadable(left[0].key)


def reserve_key_of(caller: Caller, schema: str | None, task: dict[str, Any]) -> bool:
    """Reserve the unique key of a task that has ended until this transaction ends.

    Returns whether there is such a task, and its key was free. `task` has its `task_id` and `from_queue`.
    """
    names = ("task_id", "from_queue")
    for row in caller.execute(statements.key_of_ended(schema), {name: task[name] for name in names}):
        return bool(reserve(caller, schema, task["from_queue"], [row["unique_key"]]))
    return False


def reserve(caller: Caller, schema: str | None, queue: str, keys: Iterable[str]) -> set[str]:
    """Reserve unique keys until this transaction ends, and return those that were free."""
    reserved: set[str] = set()
    left = sorted(keys)
    for _ in range(2):  # again if the tasks that had them have ended
        parameters = {"task_queue": queue, "task_unique_keys": left}
        if rows := caller.execute(statements.reserve(schema), parameters) if left else ():
            caller.execute(statements.unreserve(schema), {"ids": array_text(row["id"] for row in rows)})
            reserved.update(row["held_unique_key"] for row in rows)
            left = [key for key in left if key not in reserved]
        if left:
            caller.execute(statements.release_ended(schema), {"task_queue": queue, "task_unique_keys": left})
    return reserved


def _replaced(
    caller: Caller, schema: str | None, parameters: dict[str, Any], max_wait: timedelta | None
) -> Task | None:
    for row in caller.execute(statements.replace(schema), {**parameters, **_seconds(max_wait)}):
        return caller.found(detached(schema, read_row(row)))
    return None


def _kept(
    caller: Caller, schema: str | None, parameters: dict[str, Any], on_conflict: OnConflict
) -> Task | None:
    """Return the task that holds the key; None if no task holds it any more, or it can be replaced again."""
    names = ("task_queue", "task_unique_key")
    for row in caller.execute(statements.holder(schema), {name: parameters[name] for name in names}):
        if _is_kept(caller, schema, parameters["task_queue"], row, on_conflict):
            return caller.found(detached(schema, read_row(row)))
    return None


def _replace_many(
    caller: Caller, schema: str | None, parameters: dict[str, Any], max_wait: timedelta | None
) -> set[str | None]:
    rows = caller.execute(statements.replace_many(schema), {**parameters, **_seconds(max_wait)})
    return {row["unique_key"] for row in rows}


def _keep_many(
    caller: Caller, schema: str | None, queue: str, items: list[Item], on_conflict: OnConflict
) -> set[str | None]:
    """Return the keys of the tasks that are kept."""
    if not items:
        return set()
    parameters = {"task_queue": queue, "task_unique_keys": [item.key for item in items]}
    rows = caller.execute(statements.holders(schema), parameters)
    return {row["held_unique_key"] for row in rows if _is_kept(caller, schema, queue, row, on_conflict)}


def _is_kept(caller: Caller, schema: str | None, queue: str, row: Row, on_conflict: OnConflict) -> bool:
    if row["state"] in FINAL:
        keys = {"task_queue": queue, "task_unique_keys": [row["held_unique_key"]]}
        caller.execute(statements.release_ended(schema), keys)
        return False
    if on_conflict == RAISE:
        raise DuplicateTask(row["held_unique_key"], row["id"])
    # With REPLACE, one that has not started was given back a moment ago.
    return on_conflict == SKIP or row["state"] == RUNNING


def _by_key(items: Iterable[Item], on_conflict: OnConflict) -> tuple[list[Item], list[Item]]:
    """Return the items with keys, each key once and sorted, and those without."""
    by_key: dict[str, Item] = {}
    keyless = []
    for item in items:
        if item.key is None:
            keyless.append(item)
        elif item.key not in by_key or on_conflict == REPLACE:
            by_key[item.key] = item
        elif on_conflict == RAISE:
            raise DuplicateTask(item.key, None)
    return [by_key[key] for key in sorted(by_key)], keyless


def _batches(items: list[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.document)
        if len(batch) >= BATCH_COUNT or size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _arrays(batch: list[Item]) -> dict[str, Any]:
    return {
        "task_data": "\n".join(item.document for item in batch),  # JSON escapes newlines
        "task_unique_keys": [item.key for item in batch],
        "task_keys": [item.concurrency_key for item in batch],
    }


def _seconds(max_wait: timedelta | None) -> dict[str, float | None]:
    return {"max_wait": None if max_wait is None else max_wait.total_seconds()}


def _unreadable(key: str | None) -> ApoqError:
    return ApoqError(
        f"the task that has the unique key {key!r} must be readable, and this role can't see it: a policy of "
        "row-level security hides it"
    )
