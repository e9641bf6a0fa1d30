"""Pauses of a queue under full load."""

from __future__ import annotations

import time
from bisect import bisect_left
from typing import Final

from sqlalchemy.orm import Session

from benchmarks.features.laboratory import Crew, Figure, Laboratory, percentiles
from benchmarks.scenarios.cost import REPORTING

WORKERS = 4
PAUSE_SECONDS = 0.4
SILENT_SECONDS = 3.0
"""Seconds for which the queue is paused, with a notification and without."""

BUSY_SECONDS = 0.4
"""Seconds for which the workers are busy before the next pause."""

TASK_SECONDS = 0.001

COUNTED_SECONDS = 20.0

TRANSACTIONS: Final = """
    SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()
"""


SILENT: Final = """
    INSERT INTO apoq_pauses (queue, type, paused_at, paused_by, reason)
    VALUES ('default', '', now(), 'nobody', '')
"""
"""A pause of which no worker is notified."""


def pauses(laboratory: Laboratory) -> list[Figure]:
    """Pause the queue of four busy workers; measure when the last processor begins, by the workers."""
    notified = _lasts(laboratory, laboratory.size(100, 5), PAUSE_SECONDS, is_silent=False)
    silent = _lasts(laboratory, laboratory.size(20, 2), SILENT_SECONDS, is_silent=True)
    return [
        *percentiles("the last start after the pause's commit", notified),
        Figure(f"the latest of {len(notified)}", max(notified) * 1e3, "ms", "100"),
        Figure(f"the latest of {len(silent)} without a notification", max(silent) * 1e3, "ms", "2000"),
    ]


def paused_workers(laboratory: Laboratory) -> list[Figure]:
    """Count the transactions of ten workers: without tasks, with future ones, and of a paused queue.

    Workers look through all open tasks from time to time, whatever they are; see `apoq.worker.maintenance`.
    """
    count = laboratory.size(100_000, 1_000)
    without = _transactions(laboratory, 0)
    future = _transactions(laboratory, count, delay=86_400)
    paused = _transactions(laboratory, count, is_paused=True)
    return [
        Figure("ten workers without tasks", without, "transactions/s"),
        Figure(f"ten workers with {count:,} tasks for tomorrow", future, "transactions/s"),
        Figure(f"ten workers of a paused queue with {count:,} due tasks", paused, "transactions/s"),
        Figure("paused / for tomorrow", paused / future, "times", "1"),
    ]


def _transactions(
    laboratory: Laboratory, count: int, *, delay: float = 0.0, is_paused: bool = False
) -> float:
    laboratory.clear()
    if is_paused:
        with Session(laboratory.engine) as session, session.begin():
            laboratory.queue.pause(session)
    if count:
        laboratory.add("plain", range(count), delay=delay)
        laboratory.settle()
    with laboratory.workers(*[Crew({"plain": 0.0})] * 10) as workers:
        time.sleep(REPORTING)
        before, began = laboratory.value(TRANSACTIONS), time.monotonic()
        time.sleep(COUNTED_SECONDS)
        number, took = laboratory.value(TRANSACTIONS) - before, time.monotonic() - began
        for worker in workers:
            worker.stop()
    return float(number) / took


def _lasts(laboratory: Laboratory, count: int, seconds: float, *, is_silent: bool) -> list[float]:
    """Return the seconds from each pause's commit to the last start of a task."""
    laboratory.clear()
    crew = Crew({"plain": TASK_SECONDS})
    busy_seconds = count * BUSY_SECONDS + 2
    laboratory.add("plain", range(round(WORKERS * crew.concurrency * busy_seconds / TASK_SECONDS)))
    laboratory.settle()
    spans = []
    with laboratory.workers(*[crew] * WORKERS) as workers:
        time.sleep(1)
        for _ in range(count):
            if is_silent:
                laboratory.execute(SILENT)
            else:
                with Session(laboratory.engine) as session, session.begin():
                    laboratory.queue.pause(session)
            paused = time.monotonic()
            time.sleep(seconds)
            spans.append((paused, time.monotonic()))
            with Session(laboratory.engine) as session, session.begin():
                laboratory.queue.resume(session)
            time.sleep(BUSY_SECONDS)
        starts = sorted(run.started for worker in workers for run in worker.stop())
    return [max(0.0, starts[bisect_left(starts, resumed) - 1] - paused) for paused, resumed in spans]
