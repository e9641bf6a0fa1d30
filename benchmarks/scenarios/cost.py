"""What it costs: of an idle server, of memory, of the write-ahead log."""

from __future__ import annotations

import time
from collections.abc import Callable

import psycopg

from benchmarks.bench import Bench, Database, Workers
from benchmarks.contenders import NAMES
from benchmarks.scenario import Scenario

SETTLING = 3.0
"""Seconds after which a worker that has started is at rest."""


def counted(database: Database) -> Callable[[], float] | None:
    """Answer what counts the statements of this database, where pg_stat_statements can be had."""
    try:
        database.connection.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        query = """
            SELECT coalesce(sum(calls), 0) FROM pg_stat_statements
            WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
                AND query NOT LIKE '%%pg_stat_statements%%' AND query NOT LIKE '%%pg_stat_database%%'
                AND query NOT LIKE '%%pg_current_wal_lsn%%'
        """
        database.value(query)
    except psycopg.Error:
        return None
    return lambda: float(database.value(query))


def transactions(database: Database) -> float:
    """Answer the transactions of this database, as far as its sessions have reported them."""
    return float(
        database.value(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        )
    )


def idle(bench: Bench, name: str) -> dict[str, float]:
    """Let a worker rest: statements a second at the server, and the share of a core that its process takes.

    BEGIN, SET LOCAL and COMMIT are statements, too. Bound by how often it must show that it lives, and
    look for tasks of which no notification came. Without pg_stat_statements, transactions stand instead.
    """
    seconds = bench.sizes.idle_seconds
    with bench.database(name, counting=True) as database, database.workers(capacity=0) as workers:
        statements = counted(database)
        workers.go()
        time.sleep(SETTLING)
        before = statements() if statements else transactions(database)
        began = workers.reports()[0]
        time.sleep(seconds)
        ended = workers.reports()[0]
        after = statements() if statements else transactions(database)
        took = ended["now"] - began["now"]
        workers.stop()
    return {
        "statements" if statements else "transactions (no pg_stat_statements)": (after - before) / took,
        "CPU": 100 * (ended["cpu"] - began["cpu"]) / took,
    }


def memory(bench: Bench, name: str) -> dict[str, float]:
    """Watch a worker's resident memory: at rest, after a tenth of a million tasks, after all of them.

    The figures include Python, SQLAlchemy and psycopg; what the benchmark itself notes is left out.
    """
    total = bench.count(name, bench.sizes.memory)
    tenth = total // 10
    with bench.database(name) as database, database.workers(capacity=total) as workers:
        workers.go()
        time.sleep(SETTLING)
        notes = (total + 1_000) * 24 / 2**20
        rest = workers.reports()[0]["memory"] - notes
        database.fill("due", tenth)
        warm = _when_done(workers, tenth)
        database.fill("due", total - tenth, first=tenth)
        end = _when_done(workers, total)
        database.check(workers.stop(), range(total))
    return {"at rest": rest, "growth, first tenth": warm - notes - rest, "growth, the rest": end - warm}


def _when_done(workers: Workers, count: int) -> float:
    workers.wait_handled(count)
    workers.wait_finished()
    time.sleep(1)
    return float(workers.reports()[0]["memory"])


def writes(bench: Bench, name: str) -> dict[str, float]:
    """Count the bytes of write-ahead log, the transactions and the statements of a task.

    Of one added by itself, one added with many, and one worked. Bound by the row's versions (an
    insert and two updates) with their index entries; full page images after a checkpoint are part of it, so
    one is made before each.
    """
    figures = {}
    each, many = bench.sizes.cost_each, bench.count(name, bench.sizes.cost)
    with bench.database(name, counting=True) as database:
        statements = counted(database)

        def add_each() -> None:
            with database.child("enqueue_each", first=0, count=each, interval=0, path="") as child:
                child.answer()
                child.ask("go", 60 + each / 20)
                child.answer()

        def work() -> None:
            with database.workers(capacity=each + many) as workers:
                workers.go()
                workers.wait_handled(each + many)
                workers.wait_finished()
                database.check(workers.stop(), range(each + many))

        steps = (
            ("add", each, add_each),
            ("add many", many, lambda: database.add(many, first=each)),
            ("work", each + many, work),
        )
        for step, count, act in steps:
            database.checkpoint()
            lsn = database.value("SELECT pg_current_wal_lsn()::text")
            before = transactions(database), statements() if statements else 0.0
            act()
            time.sleep(1.2)  # sessions report at most once a second
            figures[f"{step}: WAL"] = (
                float(database.value("SELECT pg_current_wal_lsn() - %s::pg_lsn", lsn)) / count
            )
            figures[f"{step}: transactions"] = (transactions(database) - before[0]) / count
            if statements:
                figures[f"{step}: statements"] = (statements() - before[1]) / count
    return figures


_WRITES = {
    f"{step}: {what}": "" for step in ("add", "add many", "work") for what in ("transactions", "statements")
}

SCENARIOS = (
    Scenario(
        "idle",
        "a worker with nothing to do, a second",
        "/s",
        idle,
        less_is_better=True,
        units={"CPU": "% of a core"},
        reference="",
    ),
    Scenario(
        "memory",
        "resident memory of a worker, and its growth over a million tasks",
        "MB",
        memory,
        contenders=("apoq",),
        less_is_better=True,
        once=True,
        reference="",
    ),
    Scenario(
        "writes",
        "WAL, transactions and statements a task",
        "bytes",
        writes,
        contenders=NAMES,
        less_is_better=True,
        once=True,
        units=_WRITES,
    ),
)
