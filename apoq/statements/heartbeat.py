"""Show that a worker lives."""

from __future__ import annotations

from functools import cache

from sqlalchemy import Delete, Text, Uuid, bindparam, delete, exists, func
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, Insert, insert
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import Integer

from apoq.model import tasks_table, workers_table
from apoq.statements.literals import RUNNING


@cache
def beat(schema: str | None) -> Insert:
    """Show that the worker lives; the first time, and after its row was removed, enter it."""
    workers = workers_table(schema)
    new = insert(workers).values(
        id=bindparam("worker_id", type_=Uuid),
        host=bindparam("worker_host", type_=Text),
        pid=bindparam("worker_pid", type_=Integer),
        version=bindparam("worker_version", type_=Text),
        queues=bindparam("worker_queues", type_=ARRAY(Text)),
        concurrency=bindparam("worker_concurrency", type_=Integer),
    )
    return new.on_conflict_do_update(index_elements=[workers.c.id], set_={"seen_at": func.clock_timestamp()})


@cache
def leave(schema: str | None) -> Delete:
    """Remove the worker's row: it has stopped."""
    workers = workers_table(schema)
    return delete(workers).where(workers.c.id == bindparam("worker_id", type_=Uuid))


def alive(schema: str | None, worker_id: ColumnElement[object]) -> ColumnElement[bool]:
    """Tell whether a worker has been seen within `lease`, by the database's clock."""
    workers = workers_table(schema)
    lease = bindparam("lease", type_=INTERVAL)
    return exists().where(workers.c.id == worker_id, workers.c.seen_at > func.clock_timestamp() - lease)


@cache
def forget(schema: str | None) -> Delete:
    """Remove the rows of workers that were not seen for `keep` and hold nothing any more."""
    tasks, workers = tasks_table(schema), workers_table(schema)
    holds = exists().where(tasks.c.worker_id == workers.c.id, tasks.c.state == RUNNING)
    unseen = workers.c.seen_at < func.clock_timestamp() - bindparam("keep", type_=INTERVAL)
    return delete(workers).where(unseen, ~holds)
