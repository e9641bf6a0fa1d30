"""Concurrency keys: handing over, rates, and many tasks of a full key."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import Limit, Task
from benchmarks.features.laboratory import (
    Crew,
    Figure,
    Laboratory,
    Run,
    percentiles,
    rate,
    wait_for_runs,
)

SERIAL = Limit(1, key=True)
PENDING = "SELECT EXISTS (SELECT FROM apoq_tasks WHERE key = 'k' AND state = 'pending')"
KEYED = Crew({"keyed": 0.0, "plain": 0.0}, {"keyed": SERIAL})


def hand_over(laboratory: Laboratory) -> list[Figure]:
    """Measure the time from the end of a task of a serial key to the start of the next one."""
    count = laboratory.size(300, 30)
    bounds = ("3", "15")
    figures = []
    for title, workers, plain in (
        ("idle", 1, 0),
        # So many that they are not all run before the keyed ones.
        ("beside due plain tasks", 1, laboratory.size(500_000, 5_000)),
        ("three workers", 3, 0),
    ):
        laboratory.clear()
        if plain:
            laboratory.add("plain", range(plain))
        laboratory.add("keyed", range(count), key="k")
        laboratory.settle()
        runs = laboratory.run(*[KEYED] * workers, wait_for={"keyed": count})
        until = max((run.started for run in runs if run.type == "plain"), default=math.inf)
        figures += percentiles(f"hand-over, {title}", _gaps(runs, until), *bounds)
    return figures + _with_a_held_snapshot(laboratory)


def _with_a_held_snapshot(laboratory: Laboratory) -> list[Figure]:
    """Hand over while a snapshot keeps all dead rows alive: the first tenth, and the last."""
    laboratory.clear()
    count = laboratory.size(10_000, 100)
    laboratory.add("keyed", range(count), key="k")
    laboratory.settle()
    with laboratory.engine.connect().execution_options(isolation_level="REPEATABLE READ") as holder:
        holder.execute(sa.text("SELECT count(*) FROM apoq_tasks"))
        gaps = _gaps(laboratory.run(KEYED, wait_for={"keyed": count}))
    tenth = len(gaps) // 10
    return [
        *percentiles("hand-over, held snapshot, first tenth", gaps[:tenth]),
        *percentiles("hand-over, held snapshot, last tenth", gaps[-tenth:]),
    ]


def _gaps(runs: list[Run], until: float = math.inf) -> list[float]:
    keyed = [run for run in runs if run.type == "keyed" and run.started <= until]
    keyed.sort(key=lambda run: run.started)
    return [later.started - earlier.ended for earlier, later in pairwise(keyed)]


def rates(laboratory: Laboratory) -> list[Figure]:
    """Run tasks of 1,000 keys, and plain ones, for as long as it takes with autovacuum at its defaults."""
    count, found = laboratory.size(1_000_000, 20_000), {}
    for type_ in ("plain", "keyed"):
        _add(laboratory, type_, count)
        before = laboratory.value("SELECT pg_current_wal_insert_lsn() - '0/0'")
        runs = laboratory.run(KEYED, wait_for={type_: count})
        wal = laboratory.value("SELECT pg_current_wal_insert_lsn() - '0/0'") - before
        dead = laboratory.value("SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'apoq_tasks'")
        found[type_] = rate(runs), float(wal) / count, float(dead)
    by_workers = []
    for workers in (1, 2):
        few = laboratory.size(150_000, 10_000)
        _add(laboratory, "keyed", few)
        by_workers.append(rate(laboratory.run(*[KEYED] * workers, wait_for={"keyed": few})))
    (plain, plain_wal, plain_dead), (keyed, wal, dead) = found["plain"], found["keyed"]
    return [
        Figure("plain tasks", plain, "tasks/s"),
        Figure("tasks of 1,000 keys", keyed, "tasks/s"),
        Figure("keyed / plain", keyed / plain, "times", "at least 0.4"),
        Figure("two workers with the same keys / one", by_workers[1] / by_workers[0], "times"),
        Figure("WAL of a plain task, full-page images included", plain_wal, "bytes"),
        Figure("WAL of a keyed task", wal, "bytes"),
        Figure("dead rows after plain tasks", plain_dead, "rows"),
        Figure("dead rows after keyed tasks", dead, "rows"),
    ]


def _add(laboratory: Laboratory, type_: str, count: int) -> None:
    """Add tasks to an empty table: those of the type `keyed` have 1,000 keys."""
    laboratory.clear()
    key: Callable[[int], str] | None = (lambda number: f"k{number % 1_000}") if type_ == "keyed" else None
    for first in range(0, count, 50_000):
        laboratory.add(type_, range(first, min(count, first + 50_000)), key=key)
    laboratory.settle()


def full_key(laboratory: Laboratory) -> list[Figure]:
    """Add a million tasks of a full key at once; meanwhile, plain tasks begin; then drain behind them."""
    laboratory.clear()
    front, drained = laboratory.size(1_000_000, 5_000), laboratory.size(100_000, 2_000)
    alone = _drain(laboratory, drained)
    with Session(laboratory.engine) as session, session.begin():
        laboratory.queue.limit(session, key="k", at_most=0)
    added_at: dict[int, float] = {}
    ends = threading.Event()

    def add_plain() -> None:
        number = 0
        while not ends.wait(0.05):
            laboratory.add("plain", range(number, number + 1))
            added_at[number] = time.monotonic()
            number += 1

    with laboratory.workers(KEYED) as [worker]:
        adding = threading.Thread(target=add_plain)
        adding.start()
        time.sleep(2)
        laboratory.execute(
            "INSERT INTO apoq_tasks (type, data, key) "
            f"SELECT 'keyed', to_jsonb(n), 'k' FROM generate_series(1, {front}) n"
        )
        began = time.monotonic()
        while laboratory.value(PENDING):
            time.sleep(0.1)
        blocked_in = time.monotonic() - began
        ends.set()
        adding.join()
        wait_for_runs([worker], {"plain": len(added_at)})
        runs = worker.stop()
    delays = [run.started - added_at[run.number] for run in runs if added_at[run.number] >= began]
    laboratory.settle()
    behind = _drain(laboratory, drained)
    return [
        Figure("tasks of the full key", front, "tasks"),
        Figure("blocked", front / blocked_in, "tasks/s"),
        *percentiles("a plain task meanwhile", delays, "", "100"),
        Figure("the slowest plain task", max(delays, default=0.0) * 1e3, "ms", "100"),
        Figure("plain tasks behind those that wait / alone", behind / alone, "times", "at least 0.95"),
    ]


def _drain(laboratory: Laboratory, count: int) -> float:
    """Return the rate of plain tasks: the median of three runs."""
    found = []
    for _ in range(3):
        laboratory.add("plain", range(count))
        laboratory.settle()
        found.append(rate(laboratory.run(KEYED, wait_for={"plain": count})))
    return sorted(found)[1]


def held_places(laboratory: Laboratory) -> list[Figure]:
    """Measure for how long tasks have places and don't run: two workers, one of which has long tasks as well.

    A place is held from the claim to the end of the attempt.
    """
    laboratory.clear()
    count = laboratory.size(2_000, 100)
    laboratory.add("slow", range(laboratory.size(400, 20)))
    laboratory.add("keyed", range(count), key=lambda number: f"k{number % 100}")
    busy = Crew({"slow": 1.0, "keyed": 0.1}, {"keyed": SERIAL})
    other = Crew({"keyed": 0.1}, {"keyed": SERIAL})
    runs = laboratory.run(busy, other, wait_for={"keyed": count})
    with Session(laboratory.engine) as session:
        times = session.execute(
            sa.select(Task.id, sa.func.extract("epoch", Task.claimed_at)).where(Task.type == "keyed")
        )
        claimed_at = {task_id: float(at) for task_id, at in times}
    keyed = [run for run in runs if run.type == "keyed"]
    waited = sum(run.started_at - claimed_at[run.id] for run in keyed)
    ran = sum(run.ended - run.started for run in keyed)
    took = max(run.ended for run in keyed) - min(run.started for run in keyed)
    return [
        Figure("held without running, of the time held", 100 * waited / (waited + ran), "%", "5"),
        Figure("held without running, of all the time of 100 keys", waited / took, "%"),
        Figure("tasks with places", rate(keyed), "tasks/s"),
    ]
