"""Changes of many tasks at once: exactly those that a person has seen the number of, and confirmed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import sqlalchemy as sa

from apoq.client.queue import Queue
from apoq.dashboard.site import Site
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.find import find_queues

AT_MOST: Final = 1_000
"""How many tasks are changed at once."""

BATCH: Final = 100
"""How many tasks one transaction changes, so that it holds no lock for long."""

Change = Callable[[Queue, sa.Connection, int], bool]


class StoredQueue(Queue):
    """A queue with the name in a task's row, even if `Queue` would refuse that name."""

    def __init__(self, name: str, schema: str | None) -> None:
        self.name, self.schema = name, schema


CHANGES: Final[Mapping[str, Change]] = {
    "retry": lambda queue, connection, task_id: queue.retry(connection, task_id),
    "cancel": lambda queue, connection, task_id: queue.cancel(
        connection, task_id, reason="cancelled in the dashboard"
    ),
}
"""The changes of tasks, which return whether the task was changed."""


def change_many(site: Site, action: str, ids: list[int]) -> int:
    """Retry or cancel these tasks, in transactions of `BATCH` tasks; return how many were changed."""
    change, count = CHANGES[action], 0
    ids = sorted(set(ids))
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        with site.writing() as connection:
            rows = connection.execute(find_queues(site.schema), {"ids": array_text(batch)}).all()
            for task_id, name in rows:
                count += change(StoredQueue(name, site.schema), connection, task_id)
    return count
