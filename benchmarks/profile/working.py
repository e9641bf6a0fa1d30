"""CPU time per task when many tasks are run.

It measures the worker's two statements on one connection, in the server's process and in this one, with as
many tasks per statement as a claim may have: with the tables as they are, and with one change at a time. It
measures CPU time instead of elapsed time, so that other load on the machine has less influence.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.engine import make_url

from apoq import database_url, prepare
from apoq.embedded import PostgreSQL
from apoq.postgres.connections import execute, own_engine
from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import claim
from apoq.schema.statements.queues import (
    at_most_text,
    levels_text,
    limits_text,
    queue_text,
    queues_text,
    retry_limits_text,
)
from apoq.schema.statements.settle import complete
from apoq.worker.claiming.queue_claims import MAX_CLAIM_SIZE

TASKS = 60_000
RUNS = 7

CHANGES: dict[str, Sequence[str]] = {
    "unchanged": (),
    "with an index on running tasks": ("CREATE INDEX ON apoq_tasks (worker_id) WHERE state = 'running'",),
    "with full pages (fillfactor 100)": ("ALTER TABLE apoq_tasks SET (fillfactor = 100)",),
    "without the index of completed tasks": ("DROP INDEX apoq_tasks_completed_idx",),
    "without the index of failed tasks": ("DROP INDEX apoq_tasks_failed_idx",),
    "without the CHECK": ("ALTER TABLE apoq_tasks DROP CONSTRAINT apoq_tasks_state_check",),
}

FILL = f"""
    INSERT INTO apoq_tasks (type, data)
    SELECT 'bench', jsonb_build_object('n', n, 'padding', repeat('x', 80)) FROM generate_series(1, {TASKS}) n
"""

Cost = tuple[float, float]
"""CPU time of the server and of this process, in microseconds per task."""


def used_by(pid: int) -> float:
    """Return the CPU time that a process has used, in seconds."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def cost(pid: int, do: Callable[[], object]) -> Cost:
    """Call a function and return its cost per task."""
    server, here = used_by(pid), time.process_time()
    do()
    return (used_by(pid) - server) / TASKS * 1e6, (time.process_time() - here) / TASKS * 1e6


def measure(engine: sa.Engine, changes: Sequence[str]) -> tuple[Cost, Cost]:
    """Claim and complete all tasks of new tables, to which these changes were made."""
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    prepare(engine)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in (*changes, FILL, "VACUUM ANALYZE apoq_tasks", "CHECKPOINT"):
            connection.exec_driver_sql(statement)
    own = own_engine(engine)
    pooled = own.raw_connection()
    pid = pooled.driver_connection.info.backend_pid  # type: ignore[union-attr]
    pooled.close()
    claimed: list[list[tuple[Any, ...]]] = []

    def claim_all() -> None:
        its = queue_text("default", ["bench"])
        parameters = {
            "retry_limits": retry_limits_text(limits_text("default", {"bench": 5})),
            "at_most": MAX_CLAIM_SIZE,
            "free": 0,
            "by_worker": uuid4(),
        }
        at, id_ = 0.0, 0
        for number in count(1):
            behind = queues_text([its, levels_text({0: (at, id_)}), at_most_text(MAX_CLAIM_SIZE)])
            numbered = parameters | {"queues": behind, "number": number}
            rows = execute(own, claim(None, ahead=True), numbered).fetchall()
            if not rows:
                return
            at, id_ = max((row[5], row[0]) for row in rows)
            claimed.append(rows)

    def complete_all() -> None:
        statement = complete(None, alike=True).returning(tasks_table(None).c.id)
        for rows in claimed:
            held = {"ids": array_text([row[0] for row in rows]), "held_under": 1}
            execute(own, statement, held).fetchall()

    try:
        return cost(pid, claim_all), cost(pid, complete_all)
    finally:
        own.dispose()


def show() -> None:
    """Measure each several times, alternating, and print the medians."""
    if not Path("/proc/self/schedstat").exists():
        print("working: skipped, because it needs Linux's /proc/…/schedstat")
        return
    with PostgreSQL() as server:
        engine = sa.create_engine(database_url(make_url(server.url)))
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in CHANGES}
        for _ in range(RUNS):
            for name, changes in CHANGES.items():
                found[name].append(tuple(part for pair in measure(engine, changes) for part in pair))
        engine.dispose()
    print(
        f"{'working: µs per task':36}{'claim: server':>15}{'Python':>8}{'complete: server':>18}{'Python':>8}"
    )
    for name, costs in found.items():
        claim_server, claim_here, server_, here = (
            statistics.median(column) for column in zip(*costs, strict=True)
        )
        print(f"{name:36}{claim_server:15.2f}{claim_here:8.2f}{server_:18.2f}{here:8.2f}")
