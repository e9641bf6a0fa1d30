"""What a queue does in a caller's transaction, each written once for all kinds of sessions.

The parameters are those of the statements, checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from apoq.client.session_adapters import Caller, Driver
from apoq.schema.models import Task, detached, task_class
from apoq.schema.statements import cancel as cancelling
from apoq.schema.statements import retry as retrying
from apoq.schema.statements.enqueue import (
    added_row,
    copied_values,
    copy_lines,
    copy_many,
    enqueue,
    enqueue_many,
)
from apoq.schema.statements.notify import has_tasks, was_cancelled
from apoq.schema.statements.portable import read_row

BATCH_COUNT = 5_000
BATCH_SIZE = 4 * 1024 * 1024
"""Tasks, and characters of their data, that `add_many` sends in one statement."""

FIRST_COUNT = 1_000
"""Tasks in the first of them: the sooner a COPY begins, the longer the server works beside Python."""


def add(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> Task:
    """Add a task, and answer it."""
    (answer,) = caller.execute(enqueue(schema, mapped=caller.is_heard), parameters)
    task = detached(schema, added_row(parameters, answer))
    caller.keep(task)
    caller.notify(has_tasks(schema, parameters["task_queue"]))
    return task


def add_many(
    caller: Caller,
    schema: str | None,
    parameters: dict[str, Any],
    documents: Iterator[str],
    total: int | None,
) -> int:
    """Add a task for each of these data in JSON; answer how many there were.

    `total` is their number where it is known, and making them asks nothing of the caller's connection:
    during a COPY, that can do nothing else.
    """
    statement = enqueue_many(schema)
    count = 0
    for batch in _batches(documents):
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
    """Cancel a task that has not ended, and tell whoever runs it."""
    for row in caller.execute(cancelling.cancel(schema), parameters):
        caller.renew(task_class(schema), read_row(row))
        if row["claimed_at"] is not None:
            caller.notify(was_cancelled(row["id"]))
        return True
    return False


def retry(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> bool:
    """Make a task pending that has ended."""
    for row in caller.execute(retrying.retry(schema), parameters):
        caller.renew(task_class(schema), read_row(row))
        caller.notify(has_tasks(schema, parameters["from_queue"]))
        return True
    return False


# False where PostgreSQL would refuse the COPY.
def _copy(driver: Driver, schema: str | None, parameters: dict[str, Any], documents: Iterator[str]) -> bool:
    for values in driver.execute(copied_values(schema), parameters):
        given = {name: text for name, text in values.items() if text is not None}
        driver.copy(copy_many(schema, *given), copy_lines(given.values(), documents))
        return True
    return False


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size, most = 0, FIRST_COUNT
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) >= most or size >= BATCH_SIZE:
            yield batch
            batch, size, most = [], 0, BATCH_COUNT
    if batch:
        yield batch
