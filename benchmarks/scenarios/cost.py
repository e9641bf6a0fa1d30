"""The cost of an idle worker, of memory, and of the write-ahead log."""

from __future__ import annotations

import time
from collections.abc import Callable

import psycopg

from benchmarks.bench import Bench, Database, Workers
from benchmarks.contenders import NAMES
from benchmarks.cpu import server_cpu
from benchmarks.scenario import Scenario

SETTLING = 3.0
"""Seconds after which a started worker is idle."""

REPORTING = 11.0
"""Seconds after which all sessions have reported their transactions."""


def counted(database: Database) -> Callable[[], float] | None:
    """Return a function that counts the statements in this database; None without pg_stat_statements."""
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
    """Return the number of transactions in this database that its sessions have reported so far."""
    return float(
        database.value(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        )
    )


def idle(bench: Bench, name: str, warm: int = 0, settling: float = REPORTING) -> dict[str, float]:
    """Measure an idle worker's statements and transactions per second, and the CPU use.

    `warm`: the number of tasks that it runs first; `settling`: seconds from then to the measurement.

    BEGIN, SET LOCAL and COMMIT count as statements, if pg_stat_statements is available. Two or three of the
    transactions are the benchmark's own. The limits are the intervals of its heartbeat, and of its polls for
    tasks without a notification.
    """
    seconds = bench.sizes.idle_seconds
    with bench.database(name, counting=True) as database, database.workers(capacity=warm) as workers:
        statements = counted(database)
        workers.go()
        workers.warm_up(warm)
        time.sleep(settling)
        before = _moment(database, workers, statements)
        time.sleep(seconds)
        after = _moment(database, workers, statements)
        workers.stop()
    took = after["now"] - before["now"]
    return {
        what: (100 if "CPU" in what else 1) * (after[what] - before[what]) / took
        for what in before
        if what != "now"
    }


def _moment(database: Database, workers: Workers, statements: Callable[[], float] | None) -> dict[str, float]:
    report, server = workers.reports()[0], server_cpu(database.connection)
    return {
        "now": report["now"],
        **({"statements": statements()} if statements else {}),
        "transactions": transactions(database),
        "CPU": report["cpu"],
        **({} if server is None else {"server CPU": server}),
    }


def memory(bench: Bench, name: str) -> dict[str, float]:
    """Measure a worker's resident memory: when idle, after a tenth of a million tasks, and after all of them.

    The figures include Python, SQLAlchemy and psycopg, but not the records of the benchmark itself.
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
    """Count the bytes of write-ahead log, the transactions and the statements per task.

    It does so for a task that is added alone, a task that is added with many, and a task that is run. The
    limits are the versions of the row (an insert and two updates) with their index entries. Full-page images
    after a checkpoint are included, so there is a checkpoint before each step.
    """
    figures = {}
    each, many = bench.sizes.cost_each, bench.count(name, bench.sizes.cost)
    with bench.database(name, counting=True) as database:
        statements = counted(database)

        def add_each() -> None:
            with database.child("enqueue_each", first=0, count=each, interval=0, path="") as child:
                child.receive()
                child.ask("go", 60 + each / 20)
                child.receive()

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

IDLE_UNITS = {"CPU": "% of a core", "server CPU": "% of a core"}

SCENARIOS = (
    Scenario(
        "idle",
        "an idle worker, per second",
        "/s",
        idle,
        less_is_better=True,
        units=IDLE_UNITS,
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
        "WAL, transactions and statements per task",
        "bytes",
        writes,
        contenders=NAMES,
        less_is_better=True,
        once=True,
        units=_WRITES,
    ),
)
