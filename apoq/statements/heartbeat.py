"""Show that a worker lives."""

from __future__ import annotations

from datetime import timedelta
from functools import cache

from sqlalchemy import (
    ColumnElement,
    Delete,
    Double,
    FromClause,
    Select,
    Text,
    Uuid,
    bindparam,
    case,
    column,
    delete,
    exists,
    func,
    or_,
    select,
    table,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, Insert, insert
from sqlalchemy.types import Boolean, DateTime, Integer

from apoq.model import claims_table, workers_table
from apoq.statements.notes import forget_claims

_activity = table(
    "pg_stat_activity", column("pid", Integer), column("backend_start", DateTime), schema="pg_catalog"
)


@cache
def beat(schema: str | None) -> Insert:
    """Show that the worker lives; the first time, and after its row was removed, enter it."""
    workers = workers_table(schema)
    own = select(_activity.c.backend_start).where(_activity.c.pid == func.pg_backend_pid()).scalar_subquery()
    is_direct = bindparam("is_direct", type_=Boolean)
    # Behind a pooler, the server's process is one that anybody may speak to.
    backend = {
        "backend_pid": case((is_direct, func.pg_backend_pid())),
        "backend_start": case((is_direct, own)),
    }
    new = insert(workers).values(
        id=bindparam("worker_id", type_=Uuid),
        host=bindparam("worker_host", type_=Text),
        pid=bindparam("worker_pid", type_=Integer),
        version=bindparam("worker_version", type_=Text),
        queues=bindparam("worker_queues", type_=ARRAY(Text)),
        concurrency=bindparam("worker_concurrency", type_=Integer),
        **backend,
    )
    return new.on_conflict_do_update(
        index_elements=[workers.c.id], set_={"seen_at": func.clock_timestamp(), **backend}
    )


@cache
def leave(schema: str | None) -> Delete:
    """Remove the worker's row: it has stopped."""
    workers = workers_table(schema)
    its = bindparam("worker_id", type_=Uuid)
    notes = forget_claims(schema, claims_table(schema).c.worker_id == its).cte("notes")
    return delete(workers).where(workers.c.id == its).add_cte(notes)


def alive(schema: str | None, worker_id: ColumnElement[object]) -> ColumnElement[bool]:
    """Tell whether a worker lives, by the database's clock: its time is not up yet."""
    workers = workers_table(schema)
    return exists().where(workers.c.id == worker_id, _until(workers) > func.clock_timestamp())


def next_death(schema: str | None) -> ColumnElement[float | None]:
    """Answer the seconds until the first of the other workers counts as dead, if it isn't seen before."""
    workers = workers_table(schema)
    is_other = workers.c.id != bindparam("by_worker", type_=Uuid)
    left = func.date_part("epoch", func.min(_until(workers)) - func.clock_timestamp(), type_=Double)
    return select(left).where(is_other, _until(workers) > func.clock_timestamp()).scalar_subquery()


def _until(workers: FromClause) -> ColumnElement[object]:
    """Until when a worker lives: for a `lease` after it was seen, if the server still has its connection.

    For `grace` only, if not: then it has died, or will be back in a moment.
    """
    backend = exists().where(
        _activity.c.pid == workers.c.backend_pid,
        # Hidden from roles that may not look at each other's sessions.
        or_(_activity.c.backend_start == workers.c.backend_start, _activity.c.backend_start.is_(None)),
    )
    is_gone = workers.c.backend_pid.is_not(None) & ~backend
    lease, grace = bindparam("lease", type_=INTERVAL), bindparam("grace", type_=INTERVAL)
    return workers.c.seen_at + case((is_gone, grace), else_=lease)


@cache
def uptime() -> Select[tuple[timedelta]]:
    """Answer for how long the server has been up."""
    return select(func.clock_timestamp() - func.pg_postmaster_start_time(type_=DateTime))


@cache
def forget(schema: str | None) -> Delete:
    """Remove the rows of workers that were not seen for `keep` and hold nothing any more."""
    claims, workers = claims_table(schema), workers_table(schema)
    holds = exists().where(claims.c.worker_id == workers.c.id)
    unseen = workers.c.seen_at < func.clock_timestamp() - bindparam("keep", type_=INTERVAL)
    return delete(workers).where(unseen, ~holds)
