"""Counts that don't depend on the speed of the machine: ``python -m benchmarks.counts --help``.

It measures what a task costs the server: WAL, shared buffers, statements, commits and updates. Each scenario
has its own database on a private server. One process does everything, from its first connection to its last,
so that all of its counts are complete when they are read. To compare two versions of apoq, run it with each
of them (--package), and look for differences that exceed the spread of the runs.

Only the scenario writes: autovacuum is off, and the only checkpoint comes before the tables are created.
Pages that are created after the checkpoint need no full-page images, so the WAL consists of the records
alone. All other settings are PostgreSQL's defaults. Statements are counted by pg_stat_statements, buffers and
commits by pg_stat_database.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import make_url

ROOT: Final = Path(__file__).parent.parent

SETTINGS: Final = {
    "autovacuum": "off",
    "checkpoint_timeout": "1d",
    "max_wal_size": "16GB",
    "shared_preload_libraries": "pg_stat_statements",
}

CONCURRENCY: Final = 4

COUNTS: Final = {
    "wal": "WAL bytes",
    "buffers": "buffers",
    "statements": "statements",
    "commits": "commits",
    "updates": "updates",
    "hot": "HOT",
}
"""The counts in --json, and their titles in the table."""

BEFORE_AND_AFTER: Final = """
    SELECT pg_current_wal_insert_lsn() - '0/0' AS wal, blks_hit + blks_read AS buffers,
        xact_commit AS commits,
        (SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE dbid = datid) AS statements
    FROM pg_stat_database WHERE datname = %s
"""

UPDATES: Final = """
    SELECT n_tup_upd AS updates, n_tup_hot_upd AS hot
    FROM pg_stat_user_tables WHERE relname = 'apoq_tasks'
"""


# In a separate process, where `apoq` may be imported from another checkout.


def child(role: str, url: str, number: int) -> None:
    """Run a scenario, with only the public names of apoq."""
    import sqlalchemy as sa

    from apoq import database_url

    random.seed(0)  # makes the jitter of a worker's polls the same each time
    engine = sa.create_engine(database_url(url), pool_size=CONCURRENCY)
    ROLES[role](engine, number)
    engine.dispose()


def make_tables(engine: Any, _number: int) -> None:
    import sqlalchemy as sa

    from apoq import prepare

    prepare(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE effects (task_id bigint NOT NULL)"))


def add(engine: Any, number: int) -> None:
    """Add tasks in one transaction, so that the counts don't depend on the number of notifications."""
    from sqlalchemy.orm import Session

    from apoq import Queue

    queue = Queue()
    with Session(engine) as session, session.begin():
        for at in range(number):
            queue.add(session, "count", {"n": at})


def add_each(engine: Any, number: int) -> None:
    """Add each task in its own transaction; the number of notifications depends on timing."""
    from sqlalchemy.orm import Session

    from apoq import Queue

    queue = Queue()
    for at in range(number):
        with Session(engine) as session, session.begin():
            queue.add(session, "count", {"n": at})


def add_many(engine: Any, number: int) -> None:
    from sqlalchemy.orm import Session

    from apoq import Queue

    with Session(engine) as session, session.begin():
        Queue().add_many(session, "count", [{"n": at} for at in range(number)])


def drain(engine: Any, number: int) -> None:
    _work(engine, number, lambda _task: None)


def drain_sessions(engine: Any, number: int) -> None:
    import sqlalchemy as sa

    effect = sa.text("INSERT INTO effects VALUES (:id)")
    _work(engine, number, lambda task: task.session.execute(effect, {"id": task.id}))


def idle(engine: Any, seconds: int) -> None:
    from apoq import Worker

    worker = Worker(engine, concurrency=CONCURRENCY)
    worker.use("count", print)
    worker.start()
    time.sleep(seconds)
    worker.stop()


def _work(engine: Any, number: int, processor: Callable[[Any], object]) -> None:
    """Run all tasks, which were added before the worker starts."""
    from apoq import Worker

    worker = Worker(engine, concurrency=CONCURRENCY, keep_completed=None, keep_failed=None)
    left = threading.Semaphore(0)

    def count(task: Any) -> None:
        processor(task)
        left.release()

    worker.use("count", count)
    worker.start()
    for _ in range(number):
        left.acquire()
    worker.stop()


ROLES: Final = {
    role.__name__: role for role in (make_tables, add, add_each, add_many, drain, drain_sessions, idle)
}


# In the process that reads the counts.


class Counter:
    """Reads the counts of a package on a private server."""

    def __init__(self, server: str, package: Path) -> None:
        self._server = make_url(server).set(drivername="postgresql")
        self._package = package

    def count(self, role: str, number: int, *, filled: int = 0) -> dict[str, int]:
        """Return the counts of one process in a new database that has `filled` tasks."""
        import psycopg

        name = f"counts_{uuid4().hex[:10]}"
        url = self._server.set(database=name).render_as_string(hide_password=False)
        with psycopg.connect(self._server.render_as_string(hide_password=False), autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {name} TEMPLATE template0")
            admin.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
            admin.execute("CHECKPOINT")
            self._run("make_tables", url, 0)
            if filled:
                self._run("add_many", url, filled)
            before = self._read(admin, name)
            self._run(role, url, number)
            found = self._read(admin, name)
            counts = {key: int(found[key] - before[key]) for key in found}
            with psycopg.connect(url, row_factory=psycopg.rows.dict_row) as connection:
                counts |= connection.execute(UPDATES).fetchone() or {}
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        return counts

    def _run(self, role: str, url: str, number: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(self._package)}
        words = [sys.executable, "-P", __file__, "--child", role, url, str(number)]
        subprocess.run(words, check=True, env=environment)

    def _read(self, admin: Any, name: str) -> dict[str, Any]:
        """Read the counts of a database after its last session has ended."""
        import psycopg

        sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
        while admin.execute(sessions, [name]).fetchone()[0]:
            time.sleep(0.05)  # a session's counts are complete when it has ended
        with admin.cursor(row_factory=psycopg.rows.dict_row) as cursor:
            found: dict[str, Any] = cursor.execute(BEFORE_AND_AFTER, [name]).fetchone()
            return found


def scenarios(counter: Counter, tasks: int, seconds: int) -> dict[str, dict[str, float]]:
    """Run all scenarios; return the counts per task or per second."""
    some = max(1, tasks // 10)

    def each(counts: dict[str, int], number: float) -> dict[str, float]:
        return {key: counts[key] / number for key in COUNTS}

    start = counter.count("idle", 0)
    whole = counter.count("idle", seconds)
    return {
        f"drain {tasks:,}, per task": each(counter.count("drain", tasks, filled=tasks), tasks),
        f"task.session {some:,}, per task": each(counter.count("drain_sessions", some, filled=some), some),
        f"add {some:,}, per task": each(counter.count("add", some), some),
        f"add {some:,} and commit each, per task": each(counter.count("add_each", some), some),
        f"add_many {tasks:,}, per task": each(counter.count("add_many", tasks), tasks),
        "start and stop, in total": each(start, 1),
        f"idle for {seconds} s, per second": each({key: whole[key] - start[key] for key in whole}, seconds),
    }


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """Return a table of the medians, with their spread if there are several runs."""
    lines = [f"{'':38}" + "".join(f"{title:>22}" for title in COUNTS.values())]
    for name in runs[0]:
        cells = []
        for key in COUNTS:
            values = [run[name][key] for run in runs]
            spread = f" ±{(max(values) - min(values)) / 2:.3g}" if len(runs) > 1 else ""
            cells.append(f"{median(values):,.3f}{spread}")
        lines.append(f"{name:38}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--package", type=Path, default=ROOT, help="checkout of apoq to measure (this one)")
    parser.add_argument("--runs", type=int, default=1, help="number of runs, whose spread is shown (1)")
    parser.add_argument("--tasks", type=int, default=20_000, help="number of tasks to drain (20,000)")
    parser.add_argument("--idle", type=int, default=30, help="seconds for which a worker idles (30)")
    parser.add_argument("--json", action="store_true", help="print each run as a line of JSON")
    options = parser.parse_args(words)

    from apoq.embedded import PostgreSQL

    runs = []
    for _ in range(options.runs):
        with PostgreSQL(settings=SETTINGS) as server:
            counter = Counter(server.url, options.package.resolve())
            runs.append(scenarios(counter, options.tasks, options.idle))
        if options.json:
            print(json.dumps(runs[-1]), flush=True)
    if not options.json:
        print(table(runs))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        sys.exit(main())
