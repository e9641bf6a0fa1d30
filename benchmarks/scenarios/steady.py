"""A steady load: tasks are added at fixed times, and the queue has time to spare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.bench import Bench, Database, Workers, delays, percentile, read_times
from benchmarks.contenders import FAST
from benchmarks.cpu import server_cpu
from benchmarks.scenario import Scenario

OLD = 10_000
"""Number of tasks that are run before, so that the server doesn't plan its statements for an empty table."""

WARM = 50
"""Number of batches that are added, and not measured, before the load begins."""

PACE = 0.01
"""Seconds between the batches of a load."""


def steady(rate: int, batch: int) -> Callable[[Bench, str], dict[str, float]]:
    def measure(bench: Bench, name: str) -> dict[str, float]:
        """Add batches at fixed times to one worker process, and measure from their commits to the starts.

        The adding process doesn't wait for the queue. If it is late itself, it adds the batches that it has
        missed, as fast as it can; "adder late" is the time from when a batch was due to its first statement.
        The limits are the delivery of the notification, the commit of a claim, and the statements in progress
        when a task comes.
        """
        with bench.database(name) as database:
            total = OLD + WARM * batch + round(rate * bench.sizes.steady_seconds / batch) * batch
            path = database.path()
            with database.workers(capacity=total) as workers:
                workers.go()
                workers.warm_up(OLD)
                database.settle()
                added, use = _add(database, workers, path, rate, batch, bench.sizes.steady_seconds)
                workers.wait_handled(total)
                workers.wait_finished()
                handled = workers.stop()
            database.check(handled, range(total))
            found = [delay for _, delay in delays(handled, OLD, read_times(path))]
        return {
            **{f"p{share}": percentile(found, share / 100) for share in (50, 90, 99)},
            "max": max(found),
            "rate": len(found) / added["seconds"],
            "adder late p99": percentile(added["late"], 0.99) * 1_000,
            **use,
        }

    return measure


def _add(
    database: Database, workers: Workers, path: str, rate: int, batch: int, seconds: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """Add the tasks; return what the adding process reports, and the CPU use meanwhile."""
    options: dict[str, Any] = {
        "first": OLD,
        "warm": WARM,
        "rate": rate,
        "batch": batch,
        "seconds": seconds,
        "path": path,
    }
    with database.child("enqueue_steady", notify=True, **options) as child:
        child.receive()
        workers.wait_handled(OLD + WARM * batch)
        workers.wait_finished()
        began, server = workers.reports()[0], server_cpu(database.connection)
        added = child.ask("go", 60 + 3 * seconds)
        ended, server_after = workers.reports()[0], server_cpu(database.connection)
        child.receive()
    took = ended["now"] - began["now"]
    use = {"CPU worker": ended["cpu"] - began["cpu"], "CPU adder": added["cpu"]}
    if server is not None and server_after is not None:
        use["CPU server"] = server_after - server
    return added, {what: 100 * cpu / took for what, cpu in use.items()}


def _scenario(rate: int, batch: int) -> Scenario:
    how = "one per transaction" if batch == 1 else f"{batch} per transaction, every {PACE * 1_000:.0f} ms"
    return Scenario(
        f"steady_{rate}",
        f"commit to start at {rate:,} tasks/s, {how}",
        "ms",
        steady(rate, batch),
        contenders=FAST,
        less_is_better=True,
        quick=batch == 1,
        units={"rate": "tasks/s", **dict.fromkeys(("CPU worker", "CPU adder", "CPU server"), "% of a core")},
    )


SCENARIOS = (
    _scenario(400, 1),
    *(_scenario(rate, round(rate * PACE)) for rate in (1_000, 5_000, 10_000)),
)
