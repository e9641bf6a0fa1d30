"""One worker with 200 queues, in one schema or in a schema each, compared with one queue."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.many import QUEUES
from benchmarks.scenario import Scenario
from benchmarks.scenarios import cost, latency

SETTLING = 30.0
"""Seconds after which a worker of 200 schemas has nothing more to do than in the next minutes."""

PREPARED = 6
"""psycopg prepares a statement that has been executed so many times."""


def idle(bench: Bench, name: str) -> dict[str, float]:
    """Measure an idle worker. The limit is the number of queues that one statement asks for tasks."""
    return cost.idle(bench, name, warm=QUEUES, settling=SETTLING)


def one_at_a_time(bench: Bench, name: str) -> dict[str, float]:
    """Add one task at a time, each to a queue far from the last one's, for an idle worker."""
    sizes = bench.sizes
    return latency.one_at_a_time(bench, name, sizes.many_adds, sizes.many_interval, warm=QUEUES)


def drain(bench: Bench, name: str) -> dict[str, float]:
    """Let an idle worker run tasks that are all in one of its queues, then as many in all of them.

    The tasks are added in one transaction. Before them, the worker has run a task of each queue.
    """
    one = _rate(bench, name, QUEUES)
    return {"one is full": one, "all are full": one if name == "apoq" else _rate(bench, name, 1)}


def _rate(bench: Bench, name: str, step: int) -> float:
    """Return the rate at which tasks whose numbers are `step` apart are run."""
    count = bench.sizes.drain // 2
    with bench.database(name) as database:
        for _ in range(PREPARED):  # the plan for 200 schemas takes longer than the last settlement
            database.value(database.who.unfinished)
        with database.workers(capacity=QUEUES + count) as workers:
            workers.go()
            workers.warm_up(QUEUES)
            database.add(count, first=QUEUES, step=step)
            workers.wait_handled(QUEUES + count)
            end = workers.wait_finished()
            handled = workers.stop()
        numbers = range(QUEUES, QUEUES + count * step, step)
        database.check(handled, [*range(QUEUES), *numbers])
        first = min(
            start for number, start in zip(handled.numbers, handled.started, strict=True) if number >= QUEUES
        )
        return count / (end - first)


LAYOUTS = ("apoq, 200 queues", "apoq, 200 schemas")

SCENARIOS = (
    Scenario(
        "many_idle",
        "an idle worker of one queue, and of 200, per second",
        "/s",
        idle,
        contenders=("apoq",),
        baselines=LAYOUTS,
        reference="apoq",
        less_is_better=True,
        units=cost.IDLE_UNITS,
    ),
    Scenario(
        "many_latency",
        "commit to start, one task at a time in any of 200 queues",
        "ms",
        one_at_a_time,
        contenders=("apoq",),
        baselines=LAYOUTS,
        reference="apoq",
        less_is_better=True,
    ),
    Scenario(
        "many_drain",
        "one worker process with one queue, and with 200",
        "tasks/s",
        drain,
        contenders=("apoq",),
        baselines=LAYOUTS,
        reference="apoq",
    ),
)
