"""Adding tasks."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

from benchmarks.bench import Bench, WrongCount, percentile
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
    it is the lock that the commit holds until its end. apoq's worker runs the tasks at the same time, on the
    same two cores.
    """
    who, _, rest = name.partition(", ")
    sizes = bench.sizes
    threads = sizes.clients // sizes.client_processes
    with bench.database(who) as database, ExitStack() as stack:
        worked = who == "apoq" and not rest
        capacity = sizes.clients * MOST if worked else 0
        workers = stack.enter_context(database.workers(capacity=capacity)) if worked else None
        children = [
            stack.enter_context(
                database.child(
                    "clients",
                    first=process * threads * MOST,
                    threads=threads,
                    seconds=sizes.client_seconds,
                    most=MOST,
                )
            )
            for process in range(sizes.client_processes)
        ]
        if workers:
            workers.go()
        for child in children:
            child.receive()
        for child in children:
            child.say("go")
        responses = [child.receive(sizes.client_seconds + 60) for child in children]
        counts = [count for response in responses for count in response["counts"]]
        if workers:
            workers.wait_handled(sum(counts))
            workers.wait_finished()
            numbers = (which * MOST + n for which, count in enumerate(counts) for n in range(count))
            database.check(workers.stop(), numbers)
        _check_rows(database.value(f"SELECT count(*) FROM {database.who.table}"), sum(counts), name)
        # The first task of each client was added before the start.
        return {"rate": (sum(counts) - len(counts)) / max(response["seconds"] for response in responses)}


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
        "32 clients, one per transaction; apoq with a worker that runs them meanwhile",
        "tasks/s",
        clients,
        contenders=("apoq",),
        baselines=("apoq, no worker", "plain ORM", "plain psycopg", "psycopg + NOTIFY"),
        reference="plain ORM",
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
