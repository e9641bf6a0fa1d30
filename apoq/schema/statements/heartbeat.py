"""Show that a worker is alive, and look at the other workers."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Delete,
    Double,
    FromClause,
    Select,
    Text,
    Uuid,
    all_,
    and_,
    bindparam,
    case,
    cast,
    column,
    delete,
    exists,
    func,
    null,
    or_,
    select,
    table,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, Insert, insert
from sqlalchemy.types import Boolean, DateTime, Integer

from apoq.schema.models import claims_table, workers_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.literals import EPOCH
from apoq.schema.statements.notes import forget_claims

WATCHED: Final = 100
"""How many of the other workers a heartbeat looks at: those that count as dead the soonest."""

_activity = table(
    "pg_stat_activity", column("pid", Integer), column("backend_start", DateTime), schema="pg_catalog"
)


@cache
def beat(schema: str | None) -> Insert:
    """Show that the worker is alive; insert its row the first time, and after it was removed."""
    workers = workers_table(schema)
    own = select(_activity.c.backend_start).where(_activity.c.pid == func.pg_backend_pid()).scalar_subquery()
    is_direct = bindparam("is_direct", type_=Boolean)
    renewed = {
        "last_heartbeat_at": func.clock_timestamp(),
        "expires_at": func.clock_timestamp() + bindparam("lease", type_=INTERVAL),
        "grace": bindparam("grace", type_=INTERVAL),
        # Behind a pooler, the server's process is one that any client may use.
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
        **renewed,
    )
    return new.on_conflict_do_update(index_elements=[workers.c.id], set_=renewed)


@cache
def beat_and_look(schema: str | None) -> Select[Any]:
    """Show that the worker is alive, and return what is known of the others, in one statement.

    A row for each of those that hold claims and count as dead the soonest, up to `WATCHED`: its id; its last
    `heartbeat`, in seconds since 1970; its `grace` and the time that is `left` until it counts as dead, both
    in seconds; whether its connection is gone (`is_gone`), and for so long that it counts as dead at first
    sight (`is_long_gone`). A worker that has claims and no row has None for its heartbeat, and is long gone.
    One row without an id, if there are none.

    In each row, `has_unknown` says whether the worker itself has claims other than those that are `known`.
    """
    workers, claims = workers_table(schema), claims_table(schema)
    mine = bindparam("by_worker", type_=Uuid)
    left = (_until(workers) - _now()).label("left")
    with_row = (
        select(
            workers.c.id,
            _epoch(workers.c.last_heartbeat_at).label("heartbeat"),
            _epoch(workers.c.grace).label("grace"),
            left,
            _is_gone(workers).label("is_gone"),
            _is_long_gone(workers).label("is_long_gone"),
        )
        .where(workers.c.id != mine, exists().where(claims.c.worker_id == workers.c.id))
        .order_by(left)
        .limit(WATCHED)
        .subquery("with_row")
    )
    without_row = (
        select(claims.c.worker_id)
        .distinct()
        .where(claims.c.worker_id != mine, ~exists().where(workers.c.id == claims.c.worker_id))
        .limit(WATCHED)
        .subquery("without_row")
    )
    unknown = cast(null(), Double)
    peers = union_all(
        select(*with_row.c), select(without_row.c.worker_id, unknown, unknown, unknown, true(), true())
    ).subquery("peers")
    is_unknown = and_(claims.c.worker_id == mine, claims.c.number != all_(bigints("known")))
    own = select(exists().where(is_unknown).label("has_unknown")).subquery("own")
    return (
        select(own.c.has_unknown, *peers.c)
        .select_from(own.outerjoin(peers, true()))
        .add_cte(beat(schema).cte("beat"))
    )


@cache
def leave(schema: str | None) -> Delete:
    """Remove the worker's row: it has stopped."""
    workers = workers_table(schema)
    its = bindparam("worker_id", type_=Uuid)
    notes = forget_claims(schema, claims_table(schema).c.worker_id == its).cte("notes")
    return delete(workers).where(workers.c.id == its).add_cte(notes)


def alive(schema: str | None, worker_id: ColumnElement[object]) -> ColumnElement[bool]:
    """Return whether a worker counts as alive, by the database's clock and by what it has written itself."""
    workers = workers_table(schema)
    return exists().where(workers.c.id == worker_id, _until(workers) > _now())


def _until(workers: FromClause) -> ColumnElement[float]:
    """Until when a worker counts as alive: to the end of its lease, if the server still has its connection.

    If not, it has died or will be back in a moment: then for its grace after its last heartbeat.
    """
    grace = _epoch(workers.c.last_heartbeat_at) + _epoch(workers.c.grace)
    return case((_is_gone(workers), grace), else_=_epoch(workers.c.expires_at))


def _is_gone(workers: FromClause) -> ColumnElement[bool]:
    backend = exists().where(
        _activity.c.pid == workers.c.backend_pid,
        # Hidden from roles that may not look at each other's sessions.
        or_(_activity.c.backend_start == workers.c.backend_start, _activity.c.backend_start.is_(None)),
    )
    return and_(workers.c.backend_pid.is_not(None), ~backend)


def _is_long_gone(workers: FromClause) -> ColumnElement[bool]:
    """Return whether a worker's connection is gone and its lease ended as long ago as it lasted.

    All this with the server up: while it was away, no worker could renew its lease.
    """
    lease = _epoch(workers.c.expires_at) - _epoch(workers.c.last_heartbeat_at)
    since = func.greatest(_epoch(workers.c.last_heartbeat_at), _epoch(func.pg_postmaster_start_time()))
    return and_(_is_gone(workers), since + 2 * lease < _now())


def _epoch(time: ColumnElement[Any]) -> ColumnElement[float]:
    """Return a time in seconds since 1970, or a length of time in seconds.

    As numbers, with which the server can calculate whatever stands in a row: infinity is one of them, and
    none is out of range.
    """
    return func.date_part(EPOCH, time, type_=Double)


def _now() -> ColumnElement[float]:
    return _epoch(func.clock_timestamp())


@cache
def forget(schema: str | None) -> Delete:
    """Remove the rows of workers whose lease ended `keep` ago and that hold nothing any more."""
    claims, workers = claims_table(schema), workers_table(schema)
    holds = exists().where(claims.c.worker_id == workers.c.id)
    is_old = workers.c.expires_at < func.clock_timestamp() - bindparam("keep", type_=INTERVAL)
    return delete(workers).where(is_old, ~holds)
