"""What the pages of the dashboard cost the server: ``python -m benchmarks.dashboard --rows 5000000``.

It fills a private server with tasks in each state, in an order that suits the dashboard badly: failed and
scheduled tasks are scattered over the whole table. Each statement of a page is explained before it is
executed, so that its shared buffers and its time on the server are those of this very page. Five million rows
need 2 GB in the folder of temporary files (TMPDIR).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy import make_url

from apoq import prepare
from apoq.dashboard.dashboard import Dashboard
from apoq.dashboard.messages import Request
from apoq.dashboard.site import Site
from apoq.dashboard.snapshots import SECONDS
from apoq.embedded import PostgreSQL
from apoq.postgres.urls import on_psycopg

ROWS: Final = 5_000_000
MOST_BUFFERS: Final = 2_000
"""No page reads more blocks than this."""

REPEATS: Final = 8
"""How often the first page is read again; its time is the least of these, because others use the machine."""

SETTINGS: Final = {
    "autovacuum": "off",
    "fsync": "off",
    "max_wal_senders": "0",
    "max_wal_size": "128MB",
    "wal_level": "minimal",
}

INDEXES: Final = """
    SELECT indexname, indexdef FROM pg_indexes
    WHERE tablename = 'apoq_tasks' AND indexname <> 'apoq_tasks_pkey'
"""

TASKS: Final = """
    INSERT INTO apoq_tasks
        (queue, type, state, priority, created_at, process_at, completed_at, failed_at, cancelled_at, error,
         attempt, fail_count, unique_key, held_unique_key, waiting_for, waiting_since, key)
    SELECT
        queue, type, state, CASE state WHEN 'pending' THEN n % 3 ELSE 0 END, happened_at,
        CASE WHEN state = 'pending' AND n % 2 = 0 THEN now() + random() * interval '3 days'
             ELSE happened_at END,
        CASE state WHEN 'completed' THEN happened_at END,
        CASE state WHEN 'failed' THEN happened_at END,
        CASE state WHEN 'cancelled' THEN happened_at END,
        CASE WHEN state = 'failed' AND n > :ended * 0.8 THEN jsonb_build_object(
            'class', (ARRAY['ValueError', 'ConnectionError', 'Timeout'])[1 + n % 3],
            'message', 'the user ' || n || ' is away',
            'traceback', '  File "/srv/app/tasks.py", line ' || n % 7 || ', in send') END,
        1, CASE WHEN state = 'failed' OR n % 7 = 0 THEN 6 ELSE 0 END,
        CASE WHEN n % 100 = 0 THEN 'key-' || n END,
        CASE WHEN n % 100 = 0 AND state = 'pending' THEN 'key-' || n END,
        CASE state WHEN 'waiting' THEN (ARRAY['key', 'parents'])[1 + n % 2] END,
        CASE state WHEN 'waiting' THEN happened_at END,
        CASE WHEN state = 'waiting' AND n % 2 = 0
             THEN CASE WHEN n % 4 = 0 THEN 'busy-' || n / 4 % 10 ELSE 'tenant-' || n / 4 % 1000 END END
    FROM (
        SELECT n,
            (ARRAY['emails', 'emails', 'emails', 'reports', 'imports', 'default', 'webhooks'])[1 + n % 7]
                AS queue,
            (ARRAY['send_mail', 'send_invoice', 'build_report', 'import_file'])[1 + n % 4] AS type,
            CASE WHEN n > :ended THEN CASE WHEN n % 7 = 6 OR n % 11 = 0 THEN 'waiting' ELSE 'pending' END
                 WHEN n % 5 = 1 THEN 'failed' WHEN n % 97 = 0 THEN 'cancelled' ELSE 'completed' END AS state,
            now() - least(1, CAST(:ended - n AS float) / :ended) * interval '1 day' - interval '1 second'
                AS happened_at
        FROM generate_series(1, CAST(:rows AS int)) AS n
    ) AS new
"""

OTHERS: Final = """
    WITH taken AS (
        UPDATE apoq_tasks
        SET state = 'running', claimed_at = now(), worker_id = md5('w')::uuid, slot = id,
            key = CASE WHEN mod(id, 2) = 0 THEN 'tenant-' || mod(id, 20) END, pool_slot = id,
            pool_key = CASE WHEN mod(id, 2) = 1 THEN type END
        WHERE id IN (SELECT id FROM apoq_tasks WHERE state = 'pending' AND process_at <= now()
                     ORDER BY id LIMIT 300)
        RETURNING id
    )
    INSERT INTO apoq_claims SELECT md5('w')::uuid, 1, array_agg(id) FROM taken;
    INSERT INTO apoq_workers (id, host, pid, version, queues, concurrency, expires_at, grace)
    SELECT CASE n WHEN 1 THEN md5('w')::uuid ELSE gen_random_uuid() END, 'web-' || n, n, '0.1.0',
           ARRAY['emails', 'reports'], 8, now() + interval '1 day', interval '1 minute'
    FROM generate_series(1, 50) AS n;
    INSERT INTO apoq_schedules (queue, name, type, cron, next_at, last_task_id)
    SELECT 'emails', 'schedule-' || n, 'send_mail', '* * * * *', now() + interval '1 hour', n * 1000
    FROM generate_series(1, 300) AS n;
    INSERT INTO apoq_limits (queue, type, key, at_most, declared, is_of_key, changed_at, changed_by)
    SELECT 'emails', CASE WHEN n > 5000 THEN 'type-' || n ELSE '' END,
           CASE WHEN n > 5000 THEN '' ELSE 'tenant-' || n END, mod(n, 50), mod(n, 40),
           mod(n, 2) = 0 AND n > 5000, now(), 'ops'
    FROM generate_series(1, 5200) AS n;
    INSERT INTO apoq_links (parent_id, child_id, position)
    SELECT n * 7, 1000, -1 FROM generate_series(1, 10000) AS n
    UNION ALL
    SELECT 2000, 2000 + n * 7, 0 FROM generate_series(1, 10000) AS n
    UNION ALL
    SELECT 2000 + n * 7, 2000 + n * 7 + m, 0 FROM generate_series(1, 30) AS n, generate_series(1, 30) AS m;
    UPDATE apoq_tasks SET is_followed = true WHERE id BETWEEN 1 AND 3000
"""


class Cost(NamedTuple):
    """What a page costs."""

    address: str
    status: int
    statements: int
    buffers: int
    milliseconds: float
    """On the server, with the planning."""


def fill(engine: sa.Engine, rows: int) -> None:
    """Fill the tables of a new database."""
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE apoq_tasks SET UNLOGGED")
        indexes = connection.exec_driver_sql(INDEXES).all()
        for name, _ in indexes:
            connection.exec_driver_sql(f"DROP INDEX {name}")
        connection.execute(sa.text(TASKS), {"rows": rows, "ended": rows * 96 // 100})
        for _, definition in indexes:
            connection.exec_driver_sql(definition)
    with engine.begin() as connection:
        for statement in OTHERS.split(";"):
            connection.exec_driver_sql(statement)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")


def addresses(rows: int) -> list[str]:
    """Return all pages, with filters that match many tasks, few, and none."""
    states = ("ready", "scheduled", "retrying", "waiting", "running", "completed", "failed", "cancelled")
    return [
        "/",
        "/queue?name=emails",
        "/tasks",
        *(f"/tasks?state={state}" for state in states),
        *(f"/tasks?state={state}&queue=emails&type=send_mail" for state in states),
        *(f"/tasks?state={state}&type=none" for state in states),
        "/tasks?queue=emails",
        "/tasks?type=none",
        "/tasks?state=failed&error=ValueError",
        "/tasks?state=failed&error=none",
        "/tasks?error=none",
        f"/tasks?key=key-{rows // 100 * 100}",
        "/tasks?state=completed&key=none",
        f"/tasks/{rows // 2}",
        "/many?action=retry&state=failed",
        "/many?action=retry&state=completed&type=none",
        "/many?action=retry&state=failed&queue=emails",
        "/many?action=retry&state=failed&queue=emails&type=send_mail",
        "/many?action=retry&state=failed&error=ValueError",
        "/many?action=retry&state=completed",
        "/many?action=cancel&state=scheduled",
        "/many?action=cancel&state=waiting",
        "/tasks/1000",
        "/tasks/2000",
        "/keys",
        "/keys?waiting=1",
        "/keys?queue=emails",
        "/keys?after_queue=emails&after_kind=key&after_name=tenant-15",
        "/keys?after_queue=imports&after_kind=pool&after_name=send_mail",
        "/keys?name=tenant-14",
        "/keys?name=busy-1",
        "/keys?name=none",
        "/keys?after_limit_queue=emails&after_limit_type=&after_limit_key=tenant-2000",
        "/limit?queue=emails&of=key&name=tenant-14&at_most=0",
        "/failures",
        "/failures?queue=emails",
        "/schedules",
        "/workers",
        "/doctor",
    ]


def measure(engine: sa.Engine, rows: int, repeats: int = 0) -> Iterator[Cost]:
    """Ask for each page, and then again for the first one; yield the costs."""
    site = Site(engine, schema=None, redact=None, environment=None, secret=None)
    dashboard = Dashboard(site)
    plans: list[dict[str, Any]] = []

    @sa.event.listens_for(site.engine, "before_cursor_execute")
    def explain(_connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.lstrip().startswith(("SELECT", "WITH")):
            with cursor.connection.cursor() as own:
                own.execute(f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {statement}", parameters)
                plans.append(own.fetchone()[0][0])

    def ask(address: str) -> Cost:
        plans.clear()
        path, _, query = address.partition("?")
        fields = dict(each.split("=") for each in query.split("&")) if query else {}
        status = dashboard.respond(Request("GET", path, query=fields), "write").status
        tops = [plan["Plan"] for plan in plans]
        buffers = sum(top["Shared Hit Blocks"] + top["Shared Read Blocks"] for top in tops)
        took = sum(plan["Planning Time"] + plan["Execution Time"] for plan in plans)
        return Cost(address, status, len(plans), buffers, took)

    for address in addresses(rows):
        yield ask(address)
    for _ in range(repeats):
        time.sleep(SECONDS + 0.1)  # until the snapshot has expired
        yield ask("/")
    site.close()


def main() -> int:
    """Print the cost of each page, and whether all are below the bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dashboard", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="the number of tasks (5,000,000)")
    options = parser.parse_args()
    with PostgreSQL(settings=SETTINGS) as server:
        engine = sa.create_engine(on_psycopg(make_url(server.url)))
        prepare(engine)
        fill(engine, options.rows)
        with engine.connect() as connection:
            size = "SELECT pg_size_pretty(pg_database_size(current_database()))"
            print(f"{options.rows:,} tasks, {connection.exec_driver_sql(size).scalar_one()}")
        costs = list(measure(engine, options.rows, REPEATS))
        engine.dispose()
    for cost in costs:
        print(
            f"{cost.buffers:6,} buffers {cost.milliseconds:7.1f} ms {cost.statements:3} statements  "
            f"{cost.status} {cost.address}"
        )
    least = min(cost.milliseconds for cost in costs[-REPEATS:])
    print(f"ten viewers of the overview take {least / SECONDS / 1_000:.2%} of the database's time")
    return int(any(cost.buffers > MOST_BUFFERS for cost in costs))


if __name__ == "__main__":
    raise SystemExit(main())
