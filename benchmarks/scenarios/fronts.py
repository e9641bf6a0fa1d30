"""Rates with a million other rows in the tables, compared with the rates without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.bench import Bench
from benchmarks.contenders import NAMES
from benchmarks.scenario import MORE_RUNS, Scenario

BEHIND = 10_000_000
"""The first number of the tasks that the workers must run."""


def behind(kind: str) -> Callable[[Bench, str], dict[str, float]]:
    """Drain due tasks with a million rows of a kind in the tables, and without them.

    The limit is the number of rows that a claim has to read before it finds a due task: none, if its index or
    its remembered position leads past the million.
    """

    def measure(bench: Bench, name: str) -> dict[str, float]:
        first = bench.count(name, bench.sizes.first)
        front = bench.count(name, bench.sizes.front)
        # If all rows are due, the comparison is with a backlog of only `first` tasks.
        without = (
            _rate(bench, name, first, kind, first) if kind == "due" else _rate(bench, name, first, "", 0)
        )
        rate = _rate(bench, name, first, kind, front)
        return {"without": without, "rate": rate, "kept": 100 * rate / without}

    measure.__doc__ = behind.__doc__
    return measure


def _rate(bench: Bench, name: str, first: int, kind: str, front: int, **options: Any) -> float:
    if kind == "due":
        return _rate_of_backlog(bench, name, first, front)
    with bench.database(name) as database:
        if kind:
            database.fill(kind, front)
        database.fill("due", first, first=BEHIND)
        database.settle()
        with database.workers(capacity=first, **options) as workers:
            workers.go()
            workers.wait_handled(first)
            end = workers.wait_finished()
            handled = workers.stop()
        if kind == "finished" and name == "floor":
            # Its table has no attempts, which distinguish these rows from the tasks that the worker has run.
            database.connection.execute(f"DELETE FROM floor_tasks WHERE (payload->>'n')::int < {BEHIND}")
        database.check(handled, range(BEHIND, BEHIND + first))
        return first / (end - min(handled.started))


def retention(bench: Bench, name: str) -> dict[str, float]:
    """Drain tasks while a million rows are past their retention, with the pruner and without it.

    The limit is the share of time that the pruner may use, on a core that others need as well.
    """
    count, front = bench.sizes.drain, bench.sizes.front
    without = _rate(bench, name, count, "finished", front, prunes=False)
    rate = _rate(bench, name, count, "finished", front)
    return {"without": without, "rate": rate, "kept": 100 * rate / without}


def first_look(bench: Bench, name: str) -> dict[str, float]:
    """Measure the time from a worker's start to its first task, behind a million tasks of other types.

    The type is not in the index: each worker scans past these tasks once, and remembers its position.
    """
    with bench.database(name) as database:
        database.fill("others", bench.sizes.front)
        database.fill("due", 1_000, first=BEHIND)
        with database.workers(capacity=1_000) as workers:
            workers.go()
            workers.wait_handled(1_000)
            workers.wait_finished()
            handled = workers.stop()
        return {"first task": (min(handled.started) - workers.began) * 1_000}


def _rate_of_backlog(bench: Bench, name: str, first: int, front: int) -> float:
    with bench.database(name) as database:
        database.fill("due", front)
        database.checkpoint()
        with database.workers(capacity=front) as workers:
            workers.go()
            begun, when = workers.wait_handled(first)
            handled = workers.stop()
        # The worker was stopped in the middle: the tasks that it has started are finished, each once.
        database.check(handled, set(handled.numbers))
        return begun / (when - min(handled.started))


def _scenario(name: str, title: str, kind: str, contenders: tuple[str, ...]) -> Scenario:
    return Scenario(
        name,
        title,
        "tasks/s",
        behind(kind),
        contenders=contenders,
        units={"kept": "%"},
        runs=MORE_RUNS,
    )


SCENARIOS = (
    _scenario("backlog", "the first 20,000 of a million due tasks", "due", NAMES),
    _scenario("others_in_front", "20,000 behind a million tasks of other types", "others", ("apoq",)),
    _scenario(
        "future_in_front", "20,000 behind a million future tasks of a higher priority", "future", ("apoq",)
    ),
    _scenario("finished_rows", "20,000 with a million finished rows", "finished", ("apoq", "floor")),
    Scenario(
        "first_look",
        "from a worker's start to its first task, behind a million tasks of other types",
        "ms",
        first_look,
        contenders=("apoq",),
        less_is_better=True,
    ),
    Scenario(
        "retention",
        "one worker process with a million rows to prune, with the pruner and without",
        "tasks/s",
        retention,
        contenders=("apoq",),
        units={"kept": "%"},
        runs=MORE_RUNS,
    ),
)
