"""Compares layouts of the task table: the disk space of a kept task, and the cost of running one.

Pages are filled only partly (by the fillfactor), so that a claim finds room on the page for the new version
of a row. The rest of that room stays empty as long as completed tasks are kept. So this compares other
fillfactors, and a separate table for completed tasks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.engine import make_url

from apoq import database_url, prepare
from apoq.embedded import PostgreSQL
from apoq.postgres.connections import execute, own_engine
from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import ID, PROCESS_AT, claim
from apoq.schema.statements.queues import (
    at_most_text,
    levels_text,
    limits_text,
    queue_text,
    queues_text,
    retry_limits_text,
)
from apoq.schema.statements.settle import complete
from benchmarks.profile.working import used_by

BATCH = 1_000
BATCHES = 40
RUNS = 3
VACUUM_EVERY = 10

FILL = f"""
    INSERT INTO apoq_tasks (type, data)
    SELECT 'bench', jsonb_build_object('n', n, 'padding', repeat('x', 80)) FROM generate_series(1, {BATCH}) n
"""

FILLFACTORS = (45, 55, 65, 75, 90, 100)

KEPT = "id, created_at, process_at, completed_at, data, type, queue, priority, attempt, fail_count, worker_id"

MOVE = f"""
    WITH ended AS (
        DELETE FROM apoq_tasks WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM apoq_tasks WHERE queue = 'default' AND indexed_state = 'completed'
            ORDER BY completed_at LIMIT 10000
        ))
        RETURNING {KEPT}
    )
    INSERT INTO ended_tasks SELECT * FROM ended
"""

ENDED: Sequence[str] = (
    f"CREATE TABLE ended_tasks AS SELECT {KEPT} FROM apoq_tasks LIMIT 0",
    "ALTER TABLE ended_tasks ADD PRIMARY KEY (id)",
    "CREATE INDEX ON ended_tasks (queue, completed_at)",
)


@dataclass(frozen=True)
class Cost:
    """The cost of one task."""

    hot: float
    """Heap-only updates: 1.0 if each claim is one."""
    wal: float
    """Bytes of WAL to add, claim, complete and move the task."""
    server: float
    """Microseconds of CPU time on the server to claim, complete and move the task."""
    kept: float
    """Bytes on disk, with all indexes, of a completed task."""


def measure(engine: sa.Engine, fillfactor: int, *, moves: bool = False) -> Cost:
    """Add, claim and complete tasks in batches, as under a steady load, and keep them all."""
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    prepare(engine)
    own = own_engine(engine)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(
            f"ALTER TABLE apoq_tasks SET (fillfactor = {fillfactor}, autovacuum_enabled = off)"
        )
        for statement in ENDED if moves else ():
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql("CHECKPOINT")
        pooled = own.raw_connection()
        pid = pooled.driver_connection.info.backend_pid  # type: ignore[union-attr]
        pooled.close()
        began_at = connection.exec_driver_sql("SELECT pg_current_wal_insert_lsn()").scalar_one()
        server = 0.0
        for number in range(1, BATCHES + 1):
            connection.exec_driver_sql(FILL)
            before = used_by(pid)
            _work(own, number)
            server += used_by(pid) - before
            if number % VACUUM_EVERY == 0:
                if moves:
                    mover = connection.connection.driver_connection.info.backend_pid  # type: ignore[union-attr]
                    before = used_by(mover)
                    connection.exec_driver_sql(MOVE)
                    server += used_by(mover) - before
                connection.exec_driver_sql("VACUUM (ANALYZE) apoq_tasks")
        ended_at = connection.exec_driver_sql("SELECT pg_current_wal_insert_lsn()").scalar_one()
        wal = connection.exec_driver_sql(f"SELECT pg_wal_lsn_diff('{ended_at}', '{began_at}')").scalar_one()
        own.dispose()  # the statistics of a session are complete when it has ended
        time.sleep(0.5)
        hot = connection.exec_driver_sql(
            "SELECT n_tup_hot_upd FROM pg_stat_all_tables WHERE relname = 'apoq_tasks'"
        ).scalar_one()
        tables = "apoq_tasks, ended_tasks" if moves else "apoq_tasks"
        kept = sum(
            connection.exec_driver_sql(f"SELECT pg_total_relation_size('{table}')").scalar_one()
            for table in tables.split(", ")
        )
    count = BATCH * BATCHES
    return Cost(hot / count, float(wal) / count, server / count * 1e6, kept / count)


def _work(own: sa.Engine, number: int) -> None:
    """Claim and complete the due tasks."""
    parameters = {
        "queues": queues_text(
            [queue_text("default", ["bench"]), levels_text({0: (0.0, 0)}), at_most_text(BATCH)]
        ),
        "retry_limits": retry_limits_text(limits_text("default", {"bench": 5})),
        "at_most": BATCH,
        "free": 0,
        "by_worker": uuid4(),
        "number": number,
    }
    rows = execute(own, claim(None, ahead=True), parameters).fetchall()
    assert len(rows) == BATCH
    statement = complete(None, alike=True).returning(tasks_table(None).c.id)
    rows.sort(key=lambda row: (row[PROCESS_AT], row[ID]))
    execute(own, statement, {"ids": array_text([row[ID] for row in rows]), "held_under": 1}).fetchall()


def show() -> None:
    """Measure each several times, alternating, and print the medians."""
    if not Path("/proc/self/schedstat").exists():
        print("layouts: skipped, because it needs Linux's /proc/…/schedstat")
        return
    found: dict[str, list[Cost]] = {}
    with PostgreSQL() as server:
        engine = sa.create_engine(database_url(make_url(server.url)))
        for _ in range(RUNS):
            for fillfactor in FILLFACTORS:
                found.setdefault(f"filled to {fillfactor} %", []).append(measure(engine, fillfactor))
            moved = measure(engine, FILLFACTORS[0], moves=True)
            found.setdefault("completed tasks in a separate table", []).append(moved)
        engine.dispose()
    print(f"{'layouts: per task':50}{'heap-only':>10}{'WAL bytes':>11}{'server µs':>11}{'bytes kept':>12}")
    for name, costs in found.items():
        hot, wal, took, kept = (
            statistics.median(getattr(cost, field) for cost in costs)
            for field in ("hot", "wal", "server", "kept")
        )
        print(f"{name:50}{hot:10.2f}{wal:11.0f}{took:11.2f}{kept:12.0f}")
