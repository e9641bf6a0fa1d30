"""What tests do to claims, and in place of them."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import probe
import sqlalchemy as sa

from apoq import Queue, Worker
from apoq.schema.statements.levels import level_of
from apoq.schema.statements.queues import (
    at_most_text,
    levels_text,
    limits_text,
    queue_text,
    queues_text,
    retry_limits_text,
)
from apoq.schema.statements.survey import surveyed as read_survey
from apoq.schema.tables import claims_table
from apoq.worker.claiming.cursor import MAX_LEVELS, ClaimCursor
from apoq.worker.database import WorkerDatabase
from apoq.worker.failures import Outage
from apoq.worker.lease import Lease

AHEAD = {"free": 0}
"""What a claim for slots that are all busy asks for, beside its queue, its types and how many tasks."""

_NOTE = sa.text("""
    INSERT INTO apoq_claims (worker_id, number, task_ids)
    SELECT worker_id, 0, array_agg(id) FROM apoq_tasks WHERE state = 'running' GROUP BY worker_id
""")


WAITS = "query LIKE '%json_to_recordset%' AND wait_event_type = 'Lock'"
"""Of a session in pg_stat_activity: a claim waits for somebody else."""


def hold_up(connection: sa.Connection, worker: Worker, schema: str | None = None) -> None:
    """Let each claim of a worker that takes anything wait until this transaction ends."""
    next_number = probe.next_claim_number(worker)
    notes = [
        {"worker_id": probe.worker_id(worker), "number": next_number + ahead, "task_ids": []}
        for ahead in range(1, 1_000)
    ]
    connection.execute(sa.insert(claims_table(schema)), notes)


def database_of(engine: sa.Engine, *queues: Queue, is_sharded: bool = False) -> WorkerDatabase:
    """Return the database of a worker of the default schema whose lease doesn't end."""
    lease = Lease(math.inf, 0)
    lease.renew(time.monotonic())
    return WorkerDatabase(
        engine, queues or (Queue(),), {None: lease}, Outage(), {None} if is_sharded else set()
    )


def hold_lease(worker: Worker) -> None:
    """Let a worker that hasn't started claim."""
    for lease in probe.leases(worker).values():
        lease.renew(time.monotonic())


def note(connection: sa.Connection) -> None:
    """Write down what is running, as claims do."""
    connection.execute(_NOTE)


def looked_into(queue: str = "default", types: Iterable[str] = ("t",)) -> dict[str, Any]:
    """Return the parameters with which a survey looks into a queue."""
    return {"queues": queues_text([queue_text(queue, types)]), "at_most": MAX_LEVELS + 1}


def surveyed(cursor: ClaimCursor, rows: Iterable[Any], queue: str = "default") -> float:
    """Move a cursor to the result of a survey; return the seconds until a task is due."""
    found = read_survey(rows)
    return cursor.surveyed(found.firsts.get(queue, ()), found.now)


def asked(
    cursor: ClaimCursor | None = None,
    at_most: int = 500,
    *,
    queue: str = "default",
    types: Iterable[str] = ("t",),
    limits: Mapping[str, float] | None = None,
    lower_than: int | None = None,
) -> dict[str, Any]:
    """Return the parameters of a claim from a queue, behind a cursor or from its start."""
    of_types = list(types)
    levels = probe.levels(cursor or ClaimCursor())
    by_level = {level_of(priority, is_keyed=False): position for priority, position in levels.items()}
    its = queue_text(queue, of_types), levels_text(by_level, lower_than), at_most_text(at_most)
    return {
        "queues": queues_text(its),
        "retry_limits": retry_limits_text(limits_text(queue, limits or dict.fromkeys(of_types, 5))),
        "at_most": at_most,
        "by_worker": uuid.uuid4(),
        "number": 1,
    }
