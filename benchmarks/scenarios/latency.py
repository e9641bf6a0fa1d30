"""From commit to start: both taken from the machine's one monotonic clock, in two processes."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.bench import Bench, Database, delays, percentile, read_times
from benchmarks.scenario import Scenario

PACE = 0.01
"""Seconds between the batches of a load."""


def idle(bench: Bench, name: str) -> dict[str, float]:
    """Add a task every 20 ms to a worker that has nothing else to do.

    From the return of the commit in one process to the first line of the processor in the other. Bound by the
    notification's way through the server, one claim, and the commit's fsync of that.
    """
    count = bench.sizes.idle_adds
    with bench.database(name) as database:
        path = database.path()
        options: dict[str, Any] = {
            "first": 0,
            "count": count,
            "interval": bench.sizes.idle_interval,
            "path": path,
        }
        with database.workers(capacity=count) as workers:
            workers.go()
            time.sleep(0.5)
            with database.child("enqueue_each", notify=True, **options) as child:
                child.answer()
                child.ask("go", 120 + count * 0.1)
                child.answer()
            workers.wait_handled(count)
            workers.wait_finished()
            handled = workers.stop()
        database.check(handled, range(count))
        found = [delay for _, delay in delays(handled, 0, read_times(path))]
    return {f"p{share}": percentile(found, share / 100) for share in (50, 95, 99)}


def loaded(bench: Bench, name: str) -> dict[str, float]:
    """Add at half the rate at which this contender has just drained, in a batch every 10 ms.

    Each contender at half of its own rate. Bound by what waits for the batches before it: one claimed, one
    settled; the adding process takes its share of the two cores, too.
    """
    capacity = bench.drain(name, max(2_000, bench.sizes.drain // 4))
    rate = capacity / 2
    seconds = bench.sizes.load_seconds
    with bench.database(name) as database:
        found = under_rate(database, rate, seconds)
        return {
            "rate": rate,
            **{f"p{share}": percentile([d for _, d in found], share / 100) for share in (50, 95, 99)},
        }


def under_rate(database: Database, rate: float, seconds: float) -> list[tuple[float, float]]:
    """Add at a rate to a worker; answer each task's commit, in seconds from the first, and its delay."""
    total = int(rate * seconds)
    path = database.path()
    options: dict[str, Any] = {"first": 0, "rate": rate, "seconds": seconds, "interval": PACE, "path": path}
    with database.workers(capacity=total) as workers:
        workers.go()
        time.sleep(0.5)
        with database.child("enqueue_rate", notify=True, **options) as child:
            child.answer()
            child.ask("go", 60 + 3 * seconds)
            child.answer()
        workers.wait_handled(total)
        workers.wait_finished()
        handled = workers.stop()
    database.check(handled, range(total))
    found = sorted(delays(handled, 0, read_times(path)))
    begin = found[0][0]
    return [(committed - begin, delay) for committed, delay in found]


SCENARIOS = (
    Scenario("latency", "commit to start, idle worker", "ms", idle, less_is_better=True, quick=True),
    Scenario(
        "latency_loaded",
        "commit to start, under half of one's own drain rate",
        "ms",
        loaded,
        less_is_better=True,
        units={"rate": "tasks/s"},
    ),
)
