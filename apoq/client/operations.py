"""The operations of a queue in a caller's transaction, for all kinds of sessions.

`parameters` are the checked parameters of the operation's statement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from apoq.client.cascades import fail_children, reopen_edges
from apoq.client.revival import revive_children
from apoq.client.session_adapters import Caller, Driver, Row
from apoq.client.unique_tasks import reserve_key_of
from apoq.core.options import has_expiry
from apoq.core.unique import ADDED
from apoq.schema.models import Task, task_class
from apoq.schema.objects import detached, with_outcome
from apoq.schema.statements import cancel as cancelling
from apoq.schema.statements import limits as limiting
from apoq.schema.statements import pauses
from apoq.schema.statements import retry as retrying
from apoq.schema.statements.enqueue import (
    added_row,
    copied_values,
    copy_lines,
    copy_many,
    enqueue,
    enqueue_many,
)
from apoq.schema.statements.notify import has_links, has_tasks, was_cancelled, was_limited, was_paused
from apoq.schema.statements.portable import read_row

BATCH_COUNT = 5_000
BATCH_SIZE = 4 * 1024 * 1024
"""Most tasks, and most characters of data, that `add_many` sends in one statement."""

FIRST_COUNT = 1_000
"""Most tasks in the first statement, if a COPY can't follow or would not be worth it."""

BEFORE_COPY = 100
"""Tasks in the statement before a COPY: an early one lets the server work while Python encodes."""


def add(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> Task:
    """Add a task, and return it."""
    given = {name: value for name, value in parameters.items() if value is not None}
    statement = enqueue(schema, mapped=caller.has_orm_listeners, given=frozenset(given))
    (row,) = caller.execute(statement, given)
    task = with_outcome(detached(schema, added_row(parameters, row)), ADDED)
    caller.attach(task)
    caller.notify(has_tasks(schema, parameters["task_queue"]))
    return task


def add_many(
    caller: Caller,
    schema: str | None,
    parameters: dict[str, Any],
    documents: Iterator[str],
    total: int | None,
) -> int:
    """Add a task for each of these JSON documents, and return their number.

    `total` is their number, if it is known and if iterating over them can't use the caller's connection,
    which can execute nothing else during a COPY. Without it, no COPY is used.
    """
    statement = enqueue_many(schema, expires=has_expiry(parameters))
    count = 0
    first = FIRST_COUNT if total is None or total <= FIRST_COUNT else BEFORE_COPY
    for batch in _batches(documents, first):
        caller.execute(statement, {**parameters, "task_data": "\n".join(batch)})
        count += len(batch)
        if total is not None and count < total:
            with caller.driver() as driver:
                if driver and _copy(driver, schema, parameters, documents):
                    count = total
    if count:
        caller.notify(has_tasks(schema, parameters["task_queue"]))
    return count


def cancel(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> bool:
    """Cancel a task that has not ended, and notify its worker; return whether there was one."""
    by_key = "task_unique_key" in parameters
    for row in caller.execute(cancelling.cancel(schema, by_key=by_key), parameters):
        caller.refresh(task_class(schema), read_row(row))
        if row["is_followed"]:
            cancel_children(caller, schema, [row["id"]])
        if row["claimed_at"] is not None:
            caller.notify(was_cancelled(row["id"]))
        return True
    return False


def cancel_children(caller: Caller, schema: str | None, ids: list[int]) -> None:
    """Apply the cancellation of tasks to the tasks that wait for them."""
    if fail_children(caller.execute, schema, ids, waits=True).free:
        caller.notify(has_links(schema))


def retry(
    caller: Caller, schema: str | None, parameters: dict[str, Any], *, with_cancelled: bool = False
) -> bool:
    """Make a task that has ended pending again; return whether there was one, and its unique key is free.

    If parents of the task have not completed, it waits for them instead. `with_cancelled`: the tasks that
    were cancelled because it had not completed wait again.
    """
    rows = caller.execute(retrying.retry(schema), parameters)
    if not rows and reserve_key_of(caller, schema, parameters):
        rows = caller.execute(retrying.retry(schema, takes_key=True), parameters)
    for row in rows:
        caller.refresh(task_class(schema), read_row(row))
        if with_cancelled:
            revive_children(caller, schema, row["id"])
        elif row["is_followed"]:
            reopen_edges(caller.execute, schema, [row["id"]])
        caller.notify(has_tasks(schema, parameters["from_queue"]))
        return True
    return False


def pause(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> None:
    """Pause a queue or a type, and notify its workers."""
    caller.execute(pauses.pause(schema), parameters)
    caller.notify(was_paused(schema, parameters["from_queue"]))


def resume(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> bool:
    """End a pause, and notify the workers; return whether there was one."""
    is_paused = bool(caller.execute(pauses.resume(schema), parameters))
    if is_paused:
        caller.notify(has_tasks(schema, parameters["from_queue"]))
    return is_paused


def set_limit(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> None:
    """Set a limit, or remove one, and notify the workers."""
    caller.execute(limiting.set_limit(schema), parameters)
    if parameters["at_most"] is None:
        caller.execute(limiting.remove_unused(schema), {"from_queue": parameters["from_queue"]})
    caller.notify(was_limited(schema, parameters["from_queue"]))


def limits(caller: Caller, schema: str | None, queue: str) -> Sequence[Row]:
    """Return the limits of a queue."""
    return caller.execute(limiting.all_limits(schema), {"from_queue": queue})


def _copy(driver: Driver, schema: str | None, parameters: dict[str, Any], documents: Iterator[str]) -> bool:
    """Copy the tasks; return False if PostgreSQL would reject the COPY."""
    for values in driver.execute(copied_values(schema), parameters):
        given = {name: text for name, text in values.items() if text is not None}
        driver.copy(copy_many(schema, *given), copy_lines(given.values(), documents))
        return True
    return False


def _batches(documents: Iterable[str], first: int) -> Iterator[list[str]]:
    batch: list[str] = []
    size, most = 0, first
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) >= most or size >= BATCH_SIZE:
            yield batch
            batch, size, most = [], 0, BATCH_COUNT
    if batch:
        yield batch
