"""The time from commit to start, by the machine's monotonic clock, which both processes share."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.bench import Bench, Database, delays, percentile, read_times
from benchmarks.scenario import Scenario

PACE = 0.01
"""Seconds between the batches of a load."""


def idle(bench: Bench, name: str) -> dict[str, float]:
    """Add a task every 20 ms for an idle worker.

    The time counts from the return of the commit in one process to the first line of the processor in the
    other. The limits are the delivery of the notification, and one claim with the fsync of its commit.
    """
    return one_at_a_time(bench, name, bench.sizes.idle_adds, bench.sizes.idle_interval)


def one_at_a_time(bench: Bench, name: str, count: int, interval: float, warm: int = 0) -> dict[str, float]:
    """Add a task at each interval for an idle worker, which has run `warm` other tasks."""
    with bench.database(name) as database:
        path = database.path()
        options: dict[str, Any] = {"first": warm, "count": count, "interval": interval, "path": path}
        with database.workers(capacity=warm + count) as workers:
            workers.go()
            workers.warm_up(warm)
            time.sleep(0.5)
            with database.child("enqueue_each", notify=True, **options) as child:
                child.receive()
                child.ask("go", 120 + count * (0.1 + interval))
                child.receive()
            workers.wait_handled(warm + count)
            workers.wait_finished()
            handled = workers.stop()
        database.check(handled, range(warm + count))
        found = [delay for _, delay in delays(handled, warm, read_times(path))]
    return {f"p{share}": percentile(found, share / 100) for share in (50, 95, 99)}


def loaded(bench: Bench, name: str) -> dict[str, float]:
    """Add tasks at half the rate at which this contender has just drained, in a batch every 10 ms.

    Each contender runs at half of its own rate. The limit is the wait for the batches before: one is claimed,
    one is settled. The adding process also uses some of the two cores.
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
    """Add tasks at a rate; return each task's commit, in seconds since the first, and its delay."""
    total = int(rate * seconds)
    path = database.path()
    options: dict[str, Any] = {"first": 0, "rate": rate, "seconds": seconds, "interval": PACE, "path": path}
    with database.workers(capacity=total) as workers:
        workers.go()
        time.sleep(0.5)
        with database.child("enqueue_rate", notify=True, **options) as child:
            child.receive()
            child.ask("go", 60 + 3 * seconds)
            child.receive()
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
        "commit to start, at half of the contender's own drain rate",
        "ms",
        loaded,
        less_is_better=True,
        units={"rate": "tasks/s"},
    ),
)
