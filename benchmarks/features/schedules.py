"""Many schedules that are due at once, beside plain tasks."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

from sqlalchemy.orm import Session

from benchmarks.bench import percentile
from benchmarks.features.laboratory import Crew, Figure, Laboratory, wait_for_runs

INTERVAL = 60.0
"""Seconds between the ticks of a schedule."""

ADD_INTERVAL = 0.02


def ticks(laboratory: Laboratory) -> list[Figure]:
    """Let 10,000 schedules be due at once; measure plain tasks before and meanwhile.

    Once the worker only adds the tasks of the ticks, and once it runs them as well.
    """
    return [*_ticks(laboratory, runs_them=False), *_ticks(laboratory, runs_them=True)]


def _ticks(laboratory: Laboratory, *, runs_them: bool) -> list[Figure]:
    laboratory.clear()
    count = laboratory.size(10_000, 200)
    crew = Crew({"plain": 0.0, "tick": 0.0} if runs_them else {"plain": 0.0})
    added_at: dict[int, float] = {}
    ends = threading.Event()

    def add_plain() -> None:
        number = 0
        while not ends.wait(ADD_INTERVAL):
            laboratory.add("plain", range(number, number + 1))
            added_at[number] = time.monotonic()
            number += 1

    with laboratory.workers(crew) as [worker]:
        _sleep_until_after_a_tick()
        with Session(laboratory.engine) as session, session.begin():
            for number in range(count):
                laboratory.queue.schedule(
                    session, f"s{number}", "tick", number, every=timedelta(seconds=INTERVAL)
                )
        due = time.monotonic() + INTERVAL - time.time() % INTERVAL
        adding = threading.Thread(target=add_plain)
        adding.start()
        while laboratory.value("SELECT count(*) FROM apoq_tasks WHERE schedule IS NOT NULL") < count:
            assert time.monotonic() < due + INTERVAL - 1, "not all ticks were added before the next ones"
            time.sleep(0.05)
        ticked = time.monotonic()
        laboratory.execute("DELETE FROM apoq_schedules")
        ends.set()
        adding.join()
        wait_for_runs([worker], {"plain": len(added_at)})
        runs = [run for run in worker.stop() if run.type == "plain"]
    before = [run.started - at for run in runs if (at := added_at[run.number]) < due - 1]
    during = [run.started - at for run in runs if due <= (at := added_at[run.number]) <= ticked]
    title = "ticks that are run, too" if runs_them else "ticks only"
    quiet, busy = percentile(before, 0.99), percentile(during, 0.99)
    return [
        Figure(f"{title}: {count:,} added in", ticked - due, "s", "10"),
        Figure(f"{title}: p99 of plain tasks before", quiet * 1e3, "ms"),
        Figure(f"{title}: p99 of plain tasks meanwhile", busy * 1e3, "ms"),
        Figure(f"{title}: meanwhile / before", busy / quiet, "times", "2"),
    ]


def _sleep_until_after_a_tick() -> None:
    """Sleep until there is enough time to add all schedules before they are due."""
    time.sleep(INTERVAL - time.time() % INTERVAL + 0.1)
