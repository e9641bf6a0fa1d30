"""Adding tasks."""

from __future__ import annotations

from array import array
from contextlib import ExitStack, nullcontext
from itertools import chain
from typing import Any

from benchmarks.bench import Bench, WrongCount, delays, percentile, read_times
from benchmarks.contenders import FAST, NAMES
from benchmarks.scenario import Scenario

MOST = 20_000
"""Maximum number of tasks that one client adds."""


def each(bench: Bench, name: str) -> dict[str, float]:
    """Add one task per transaction from one client. The limits are one fsync each, then the round trips."""
    count = bench.sizes.each
    with bench.database(name) as database:
        database.checkpoint()
        with database.child("enqueue_each", first=0, count=count, interval=0, path="") as child:
            child.receive()
            added = child.ask("go", 120 + count / 20)
            child.receive()
        _check_rows(database.value(f"SELECT count(*) FROM {database.who.table}"), count, name)
    return {"rate": added["count"] / added["seconds"]}


def clients(bench: Bench, name: str) -> dict[str, float]:
    """Let 32 clients, 8 threads in each of 4 processes, add one task per transaction.

    With 32 clients, many commits share an fsync, so the limit is CPU time; if a commit sends a notification,
    it is the lock that the commit holds until its end. A contender's worker runs the tasks at the same time,
    on the same two cores; "rate, no worker" is without it.
    """
    if name not in NAMES:
        return {"rate": _clients(bench, name, works=False)[0]}
    rate, found = _clients(bench, name, works=True)
    percentiles = {f"p{share}": percentile(found, share / 100) for share in (50, 99)}
    return {"rate": rate, "rate, no worker": _clients(bench, name, works=False)[0], **percentiles}


def _clients(bench: Bench, name: str, *, works: bool) -> tuple[float, list[float]]:
    """Return the rate, and the milliseconds from each commit to the task's start."""
    sizes = bench.sizes
    threads = sizes.clients // sizes.client_processes
    options: dict[str, Any] = {
        "threads": threads,
        "seconds": sizes.client_seconds,
        "most": MOST,
        "notify": True,
    }
    found: list[float] = []
    with bench.database(name) as database, ExitStack() as stack:
        workers = stack.enter_context(database.workers(capacity=sizes.clients * MOST)) if works else None
        paths = [database.path() for _ in range(sizes.client_processes)]
        children = [
            stack.enter_context(
                database.child("clients", first=process * threads * MOST, path=path, **options)
            )
            for process, path in enumerate(paths)
        ]
        if workers:
            workers.go()
        for child in children:
            child.receive()
        for child in children:
            child.say("go")
        responses = [child.receive(sizes.client_seconds + 60) for child in children]
        for child in children:
            child.receive()
        counts = [count for response in responses for count in response["counts"]]
        committed = array("d", chain.from_iterable(read_times(path) for path in paths))
        if workers:
            workers.wait_handled(sum(counts))
            workers.wait_finished()
            handled = workers.stop()
            numbers = (which * MOST + n for which, count in enumerate(counts) for n in range(count))
            database.check(handled, numbers)
            found = [delay for _, delay in delays(handled, 0, committed)]
        else:
            _check_rows(database.value(f"SELECT count(*) FROM {database.who.table}"), sum(counts), name)
    # The first task of each client was added before the start.
    return (sum(counts) - len(counts)) / max(response["seconds"] for response in responses), found


def bulk(bench: Bench, name: str) -> dict[str, float]:
    """Add 50,000 tasks in one transaction. The limit is the server's writing of rows and index entries."""
    count = bench.count(name, bench.sizes.bulk)
    with bench.database(name) as database:
        database.checkpoint()
        seconds = database.add(count)
        _check_rows(database.value(f"SELECT count(*) FROM {database.who.table}"), count, name)
    return {"rate": count / seconds}


def inside(bench: Bench, name: str) -> dict[str, float]:
    """Time `add` in a transaction that does other work: one round trip and the Python code."""
    count = bench.sizes.add_times
    with bench.database(name) as database, nullcontext(database.connection) as connection:
        connection.execute("CREATE TABLE effects (n bigint NOT NULL)")
        with database.child("add_times", count=count) as child:
            child.receive()
            took = child.ask("go", 120)["took"]
        _check_rows(database.value(f"SELECT count(*) FROM {database.who.table}"), count + 50, name)
    return {"p50": percentile(took, 0.5) * 1e6, "p99": percentile(took, 0.99) * 1e6}


def _check_rows(found: int, wanted: int, name: str) -> None:
    if found != wanted:
        raise WrongCount(f"{name}: {wanted} tasks were added, but the database has {found} rows")


SCENARIOS = (
    Scenario(
        "enqueue", "one per transaction, one client", "tasks/s", each, baselines=("plain ORM",), quick=True
    ),
    Scenario(
        "enqueue_clients",
        "32 clients, one per transaction, with a worker that runs them meanwhile and without",
        "tasks/s",
        clients,
        contenders=FAST,
        baselines=("plain ORM", "plain psycopg", "psycopg + NOTIFY"),
        reference="plain ORM",
        units={"p50": "ms", "p99": "ms"},
    ),
    Scenario("enqueue_bulk", "50,000 in one call", "tasks/s", bulk, quick=True),
    Scenario(
        "enqueue_inside",
        "time of add in a transaction that does other work",
        "µs",
        inside,
        contenders=("apoq",),
        baselines=("plain ORM",),
        reference="plain ORM",
        less_is_better=True,
        quick=True,
    ),
)
