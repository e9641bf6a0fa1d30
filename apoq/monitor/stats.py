"""Statistics of queues and workers, counted up to a bound."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import sqlalchemy as sa

from apoq.core.states import RUNNING
from apoq.monitor.pauses import Pause, first_pauses
from apoq.schema.citus import placement
from apoq.schema.statements.citus import size as size_on_node
from apoq.schema.statements.count import (
    COUNTED,
    count,
    count_running,
    count_types,
    queue_shares,
    queues,
    table_size,
)
from apoq.schema.statements.workers import workers

MAX_QUEUES: Final = 100
MAX_WORKERS: Final = 1_000
"""How many queues and workers are examined at most."""

MINUTE: Final = 60.0
HOUR: Final = 3_600.0
DAY: Final = 86_400.0


@dataclass
class QueueFigures:
    """The tasks of a queue by their state.

    A count of one more than `COUNTED` means that there may be any number. `scheduled` and `retrying` were
    counted together, and so were `failed` and `cancelled`: if their sum exceeds `COUNTED`, each of them may
    be larger.
    """

    name: str
    ready: int
    """Pending tasks that are due."""
    scheduled: int
    """Pending tasks that are due later and have not failed."""
    retrying: int
    """Pending tasks that have failed and are due again later."""
    waiting: int
    running: int
    completed: int
    failed: int
    cancelled: int
    lag: float | None
    """For how many seconds the oldest ready task has been due."""
    oldest_type: str | None
    """The type of that task."""
    per_minute: float
    """Tasks that completed in the last minute; an estimate, if they were too many to count."""
    last_hour: int
    """Tasks that completed in the last hour."""
    bytes: int | None
    """Its share of the table's size on disk, by the last ANALYZE; None if that doesn't know the queue."""
    bytes_per_day: int | None
    """Bytes of the completed tasks of a day at the rate of the last hour, while none of them is deleted."""


@dataclass
class WorkerFigures:
    """A worker, as of its last heartbeat."""

    id: str
    host: str
    pid: int
    version: str
    queues: list[str]
    concurrency: int
    running: int
    up_for: float
    unseen_for: float
    is_alive: bool


@dataclass
class TypeFigures:
    """The tasks of a type by their state, among those that were counted."""

    queue: str
    type: str
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Figures:
    """All statistics, at one point in time."""

    queues: list[QueueFigures]
    has_more_queues: bool
    workers: list[WorkerFigures]
    has_more_workers: bool
    orphans: int
    """Running tasks whose worker is not alive."""
    unnoted: int
    """Running tasks that no claim has recorded, so that the usual recovery doesn't find them."""
    rows: int
    """The planner's estimate of the task table's rows; -1 if there is none yet, or Citus shards the table."""
    bytes: int
    types: list[TypeFigures] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    has_more_pauses: bool = False
    took: float = 0.0
    """Seconds that the statements took."""

    def as_json(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"counted_up_to": COUNTED, **asdict(self)}


def figures(connection: sa.Connection, schema: str | None, *, by_type: bool = False) -> Figures:
    """Return the statistics. Tasks that were pruned are not counted."""
    began = time.monotonic()
    found = _count(connection, schema, by_type=by_type)
    found.took = time.monotonic() - began
    return found


def _count(connection: sa.Connection, schema: str | None, *, by_type: bool) -> Figures:
    def rows(statement: sa.Select[*tuple[Any, ...]], **parameters: Any) -> list[sa.RowMapping]:
        return list(connection.execute(statement, parameters).mappings())

    names = [row["queue"] for row in rows(queues(schema), at_most=MAX_QUEUES + 1)]
    running = rows(count_running(schema))
    seen = rows(workers(schema), at_most=MAX_WORKERS + 1)

    def running_where(column: str, value: object) -> int:
        return sum(row["number"] for row in running if row[column] == value)

    rows_in_table, size = _size(connection, schema)
    pauses, has_more_pauses = first_pauses(connection, schema, names[:MAX_QUEUES])
    found = Figures(
        queues=[],
        workers=[_worker(row, running_where("worker_id", row["id"])) for row in seen[:MAX_WORKERS]],
        has_more_workers=len(seen) > MAX_WORKERS,
        orphans=sum(row["number"] for row in running if row["is_noted"] and not row["is_alive"]),
        unnoted=sum(row["number"] for row in running if not row["is_noted"]),
        has_more_queues=len(names) > MAX_QUEUES,
        rows=rows_in_table,
        bytes=size,
        pauses=pauses,
        has_more_pauses=has_more_pauses,
    )
    shares = {row["queue"]: row["share"] for row in rows(queue_shares(schema))}
    for name in names[:MAX_QUEUES]:
        (counts,) = rows(count(schema), from_queue=name)
        disk = _disk(found, shares.get(name), counts)
        found.queues.append(_queue(name, counts, running_where("queue", name), *disk))
        if by_type:
            mine = [row for row in running if row["queue"] == name]
            found.types += _types(name, rows(count_types(schema), from_queue=name), mine)
    return found


def _size(connection: sa.Connection, schema: str | None) -> tuple[int, int]:
    """Return the estimated number of rows of the task table, and its size in bytes."""
    if placement(connection, schema) is None:
        rows, size = connection.execute(table_size(schema)).one()
        return rows, size
    return -1, connection.execute(size_on_node(), {"schema": schema}).scalar_one()


_COUNTS: Final = (
    *("ready", "scheduled", "retrying", "waiting", "completed", "failed", "cancelled"),
    *("lag", "oldest_type"),
)


def _disk(found: Figures, share: float | None, counts: sa.RowMapping) -> tuple[int | None, int | None]:
    """Return the bytes that a queue takes, and those that it adds in a day."""
    seconds = HOUR if counts["hour"] <= COUNTED else max(counts["hour_began"], 0.001)
    per_day = counts["hour"] / seconds * DAY
    return (
        None if share is None or found.rows < 0 else round(share * found.bytes),
        round(per_day * found.bytes / found.rows) if found.rows > 0 else None,
    )


def _queue(
    name: str, counts: sa.RowMapping, running: int, size: int | None, size_per_day: int | None
) -> QueueFigures:
    per_minute = counts["minute"]
    if per_minute > COUNTED:
        per_minute = counts["minute"] / max(counts["minute_began"], 0.001) * MINUTE
    return QueueFigures(
        name=name,
        running=running,
        per_minute=per_minute,
        last_hour=counts["hour"],
        bytes=size,
        bytes_per_day=size_per_day,
        **{name: counts[name] for name in _COUNTS},
    )


def _worker(row: sa.RowMapping, running: int) -> WorkerFigures:
    shown = ("host", "pid", "version", "queues", "concurrency", "up_for", "unseen_for", "is_alive")
    return WorkerFigures(id=str(row["id"]), running=running, **{name: row[name] for name in shown})


def _types(queue: str, ended: list[sa.RowMapping], running: list[sa.RowMapping]) -> list[TypeFigures]:
    found: dict[str, TypeFigures] = {}
    for row in (*ended, *running):
        state = row.get("state", RUNNING)
        counts = found.setdefault(row["type"], TypeFigures(queue, row["type"])).counts
        counts[state] = counts.get(state, 0) + row["number"]
    return sorted(found.values(), key=lambda each: each.type)
