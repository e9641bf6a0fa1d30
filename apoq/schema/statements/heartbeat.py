"""Records that a worker is alive, and reads the state of the other workers."""

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
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, TIMESTAMP, Insert, insert
from sqlalchemy.types import Boolean, DateTime, Integer

from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.clock import before_now, epoch_now
from apoq.schema.statements.literals import EPOCH
from apoq.schema.statements.notes import forget_claims
from apoq.schema.tables import claims_table, workers_table

WATCHED: Final = 100
"""Number of other workers that a heartbeat reads: those that will count as dead first."""

_activity = table(
    "pg_stat_activity", column("pid", Integer), column("backend_start", DateTime), schema="pg_catalog"
)


_RENEWED: Final = ("last_heartbeat_at", "expires_at", "grace", "backend_pid", "backend_start")
"""The columns that a heartbeat changes."""


@cache
def beat(schema: str | None) -> Insert:
    """Record that the worker is alive; insert its row the first time, or if it was removed."""
    workers = workers_table(schema)
    own = select(_activity.c.backend_start).where(_activity.c.pid == func.pg_backend_pid()).scalar_subquery()
    is_direct = bindparam("is_direct", type_=Boolean)
    values = {
        "id": bindparam("worker_id", type_=Uuid),
        "host": bindparam("worker_host", type_=Text),
        "pid": bindparam("worker_pid", type_=Integer),
        "version": bindparam("worker_version", type_=Text),
        "queues": bindparam("worker_queues", type_=ARRAY(Text)),
        "concurrency": bindparam("worker_concurrency", type_=Integer),
        "release": bindparam("worker_release", type_=TIMESTAMP(timezone=True)),
        "last_heartbeat_at": func.statement_timestamp(),
        "expires_at": func.statement_timestamp() + bindparam("lease", type_=INTERVAL),
        "grace": bindparam("grace", type_=INTERVAL),
        # Behind a pooler, the server process may serve any client, so it says nothing about this worker.
        "backend_pid": case((is_direct, func.pg_backend_pid())),
        "backend_start": case((is_direct, own)),
    }
    # Citus accepts no subquery in VALUES, and nothing that has to be calculated in ON CONFLICT.
    new = insert(workers).from_select([*values], select(*values.values()))
    return new.on_conflict_do_update(
        index_elements=[workers.c.id], set_={name: new.excluded[name] for name in _RENEWED}
    )


@cache
def beat_and_look(schema: str | None) -> Select[Any]:
    """Record that the worker is alive, and return the state of the others, in one statement.

    There is a row for each worker that has claims, up to `WATCHED` of those that will count as dead first. It
    has the worker's id; its last `heartbeat`, in seconds since 1970; its `grace` and the time `left` until it
    counts as dead, both in seconds; whether its connection is gone (`is_gone`); and whether it has been gone
    for so long that it counts as dead immediately (`is_long_gone`). A worker with claims but no row has None
    for its heartbeat, and is long gone. If there are no such workers, there is one row without an id.

    In each row, `has_unknown` says whether the worker itself has claims other than those that are `known`.
    """
    workers, claims = workers_table(schema), claims_table(schema)
    mine = bindparam("by_worker", type_=Uuid)
    left = (_until(workers) - epoch_now()).label("left")
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
    """Remove the row of a worker that has stopped, and those of its claims that hold no tasks."""
    workers = workers_table(schema)
    its = bindparam("worker_id", type_=Uuid)
    notes = forget_claims(schema, claims_table(schema).c.worker_id == its).cte("notes")
    return delete(workers).where(workers.c.id == its).add_cte(notes)


def is_alive(schema: str | None, worker_id: ColumnElement[object]) -> ColumnElement[bool]:
    """Return the condition that a worker counts as alive, by the database's clock and its own row."""
    workers = workers_table(schema)
    return exists().where(workers.c.id == worker_id, _until(workers) > epoch_now())


def _until(workers: FromClause) -> ColumnElement[float]:
    """Return the time until which a worker counts as alive: the end of its lease, if its connection exists.

    If the connection is gone, the worker has died or will reconnect soon: then it counts as alive for its
    grace after its last heartbeat.
    """
    grace = _epoch(workers.c.last_heartbeat_at) + _epoch(workers.c.grace)
    return case((_is_gone(workers), grace), else_=_epoch(workers.c.expires_at))


def _is_gone(workers: FromClause) -> ColumnElement[bool]:
    backend = exists().where(
        _activity.c.pid == workers.c.backend_pid,
        # NULL if this role may not see the sessions of the worker's role.
        or_(_activity.c.backend_start == workers.c.backend_start, _activity.c.backend_start.is_(None)),
    )
    return and_(workers.c.backend_pid.is_not(None), ~backend)


def _is_long_gone(workers: FromClause) -> ColumnElement[bool]:
    """Return the condition that a worker's connection is gone, and its lease ended at least one lease ago.

    The time counts from the start of the server at the earliest, because workers can't renew their leases
    while the server is down.
    """
    lease = _epoch(workers.c.expires_at) - _epoch(workers.c.last_heartbeat_at)
    since = func.greatest(_epoch(workers.c.last_heartbeat_at), _epoch(func.pg_postmaster_start_time()))
    return and_(_is_gone(workers), since + 2 * lease < epoch_now())


def _epoch(time: ColumnElement[Any]) -> ColumnElement[float]:
    """Return a time in seconds since 1970, or a duration in seconds.

    With numbers, the server can calculate for every possible row: they can be infinite, and no result is out
    of range.
    """
    return func.date_part(EPOCH, time, type_=Double)


@cache
def forget(schema: str | None) -> Delete:
    """Remove the rows of workers whose lease ended `keep` ago and that have no claims."""
    claims, workers = claims_table(schema), workers_table(schema)
    holds = exists().where(claims.c.worker_id == workers.c.id)
    is_old = workers.c.expires_at < before_now(bindparam("keep", type_=INTERVAL))
    return delete(workers).where(is_old, ~holds)
