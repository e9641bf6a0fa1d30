"""CPU usage of one and two worker processes, compared with the floor's.

While the middle of a backlog is drained, it measures the tasks per second, the CPU time per task of the
server and of the workers, and the share of time in which the machine's CPUs were idle.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.bench import Bench, Database, Workers
from benchmarks.server import Server
from benchmarks.sizes import Sizes

TASKS = 200_000
RUNS = 3
CONTENDERS = ("floor", "apoq")


class Moment(NamedTuple):
    """A point in time, with the CPU seconds used until then."""

    at: float
    tasks: int
    server: float
    workers: float
    idle: float


class Use(NamedTuple):
    """CPU usage between two moments: tasks per second, microseconds per task, and the idle share."""

    rate: float
    server: float
    workers: float
    idle: float


def _used(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return 0.0  # the process has ended


def _moment(database: Database, workers: Workers, count: int) -> Moment:
    """Wait until so many tasks have started, and return the usage until then."""
    workers.wait_handled(count)
    reports = workers.reports()
    tasks = sum(report["count"] for report in reports)
    pids = database.connection.execute("SELECT pid FROM pg_stat_activity").fetchall()
    idle = int(Path("/proc/stat").read_text().split(maxsplit=5)[4]) / os.sysconf("SC_CLK_TCK")
    return Moment(
        time.monotonic(),
        tasks,
        sum(_used(pid) for (pid,) in pids),
        sum(report["cpu"] for report in reports),
        idle,
    )


def _use(bench: Bench, name: str, processes: int) -> Use:
    with bench.database(name) as database:
        database.add(TASKS)
        database.settle()
        with database.workers(capacity=TASKS, processes=processes) as workers:
            workers.go()
            first, last = (_moment(database, workers, TASKS * share // 10) for share in (2, 8))
            workers.wait_handled(TASKS)
            workers.wait_finished()
            workers.stop()
    took, tasks = last.at - first.at, last.tasks - first.tasks
    return Use(
        tasks / took,
        (last.server - first.server) / tasks * 1e6,
        (last.workers - first.workers) / tasks * 1e6,
        (last.idle - first.idle) / took / (os.cpu_count() or 1),
    )


def show() -> None:
    """Measure each several times, alternating, and print the medians."""
    if not Path("/proc/self/schedstat").exists():
        print("processes: skipped, because it needs Linux's /proc/…/schedstat")
        return
    kinds = [(name, processes) for processes in (1, 2) for name in CONTENDERS]
    found: dict[tuple[str, int], list[Use]] = {kind: [] for kind in kinds}
    with Server() as server, tempfile.TemporaryDirectory() as folder:
        bench = Bench(server, Sizes(), Path(folder))
        for _ in range(RUNS):
            for kind in kinds:
                found[kind].append(_use(bench, *kind))
    print(f"{'processes':36}{'tasks/s':>15}{'server µs':>12}{'workers µs':>12}{'idle':>8}")
    for (name, processes), uses in found.items():
        use = Use(*map(statistics.median, zip(*uses, strict=True)))
        title = f"{name}, {processes}"
        print(f"{title:36}{use.rate:15,.0f}{use.server:12.1f}{use.workers:12.1f}{use.idle:8.0%}")
