"""Draining a backlog."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench, percentile
from benchmarks.scenario import Scenario


def one(bench: Bench, name: str) -> dict[str, float]:
    """Drain no-op tasks with one worker process.

    The limits are the server's two updates per task on one core, and the worker's Python code on the other.
    """
    return {"rate": bench.drain(name, bench.sizes.drain)}


def two(bench: Bench, name: str) -> dict[str, float]:
    """The same with two worker processes; on two cores, the limit is CPU time."""
    return {"rate": bench.drain(name, bench.sizes.drain, processes=2)}


def threads(bench: Bench, name: str) -> dict[str, float]:
    """The same with other numbers of slots; for no-op tasks, more threads can only cost time."""
    return {
        f"{concurrency} slots": bench.drain(name, bench.sizes.drain // 2, concurrency=concurrency)
        for concurrency in (1, 4, 16)
    }


def coroutines(bench: Bench, name: str) -> dict[str, float]:
    """The same with coroutine functions, on the worker's event loop."""
    return {"rate": bench.drain(name, bench.sizes.drain // 2, kind="coroutine")}


def sessions(bench: Bench, name: str) -> dict[str, float]:
    """Insert a row through `task.session`, or in a loop without a queue.

    Each insert is a transaction with an fsync; the commits of several threads can share one. The loop has as
    many threads as apoq has slots.
    """
    rates = {}
    for slots in (1, 4):
        if name == "apoq":
            rate = bench.drain(name, bench.sizes.sessions, kind="session", concurrency=slots)
        else:
            rate = _loop(bench, name, slots)
        rates[f"{slots} slots"] = rate
    return rates


def _loop(bench: Bench, name: str, slots: int) -> float:
    count = bench.sizes.sessions
    with bench.database(name) as database:
        database.connection.execute("CREATE TABLE effects (n bigint NOT NULL)")
        database.checkpoint()
        with database.child("loop", count=count, threads=slots) as child:
            child.receive()
            seconds = float(child.ask("go", 120 + count / 50)["seconds"])
        database.check_finished(count)
    return count / seconds


def busy(bench: Bench, name: str) -> dict[str, float]:
    """Run tasks that sleep in 4 slots, and measure the share of the slots' time that is spent in processors.

    The time counts from the first start to the last end. The rest is the time from the end of a task to the
    start of the next one in the same slot, which is limited by the hand-over between threads.
    """
    figures = {}
    slots = 4
    for milliseconds in (1, 10, 100):
        count = max(8 * slots, round(bench.sizes.busy_seconds * slots / milliseconds * 1_000))
        with bench.database(name) as database:
            database.add(count)
            database.checkpoint()
            options: dict[str, Any] = {"concurrency": slots, "seconds": milliseconds / 1_000}
            with database.workers(capacity=count, **options) as workers:
                workers.go()
                workers.wait_handled(count)
                workers.wait_finished()
                handled = workers.stop()
            database.check(handled, range(count))
        ends = [start + took for start, took in zip(handled.started, handled.took, strict=True)]
        available = slots * (max(ends) - min(handled.started))
        worked = sum(handled.took)
        figures[f"busy at {milliseconds} ms"] = 100 * worked / available
        figures[f"overhead at {milliseconds} ms"] = (available - worked) / count * 1_000
    return figures


def start(bench: Bench, name: str) -> dict[str, float]:
    """Measure the time from a worker's start to its first task of 1,000: it connects and claims."""
    times = []
    with bench.database(name) as database:
        count = bench.count(name, 1_000)
        database.add(count)
        with database.workers(capacity=count) as workers:
            workers.go()
            workers.wait_handled(count)
            workers.wait_finished()
            handled = workers.stop()
        database.check(handled, range(count))
        times.append((min(handled.started) - workers.began) * 1_000)
    return {"first task": percentile(times, 0.5)}


_UNITS = {f"overhead at {ms} ms": "ms" for ms in (1, 10, 100)}

SCENARIOS = (
    Scenario("drain", "one worker process", "tasks/s", one, quick=True),
    Scenario("drain_two", "two worker processes", "tasks/s", two, quick=True),
    Scenario(
        "drain_slots", "one worker process with 1, 4 and 16 slots", "tasks/s", threads, contenders=("apoq",)
    ),
    Scenario("drain_coroutines", "coroutine processors", "tasks/s", coroutines, contenders=("apoq",)),
    Scenario(
        "drain_sessions",
        "processors that insert through task.session",
        "tasks/s",
        sessions,
        contenders=("apoq",),
        baselines=("plain loop",),
        reference="plain loop",
        quick=True,
    ),
    Scenario(
        "busy",
        "processors of 1, 10 and 100 ms in 4 slots: busy slots, overhead per task",
        "%",
        busy,
        contenders=("apoq", "Procrastinate"),
        reference="",
        units=_UNITS,
    ),
    Scenario("start", "from a worker's start to its first task", "ms", start, less_is_better=True),
)
