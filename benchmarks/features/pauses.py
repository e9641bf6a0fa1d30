"""Pauses of a queue under full load."""

from __future__ import annotations

import time
from bisect import bisect_left

from sqlalchemy.orm import Session

from benchmarks.features.laboratory import Crew, Figure, Laboratory, percentiles

WORKERS = 4
PAUSE_SECONDS = 0.4
"""Seconds for which the queue is paused, and for which the workers are busy before the next pause."""

TASK_SECONDS = 0.001


def pauses(laboratory: Laboratory) -> list[Figure]:
    """Pause the queue of four busy workers a hundred times; measure when the last processor begins."""
    laboratory.clear()
    count = laboratory.size(100, 5)
    crew = Crew({"plain": TASK_SECONDS})
    busy_seconds = count * PAUSE_SECONDS + 2
    laboratory.add("plain", range(round(WORKERS * crew.concurrency * busy_seconds / TASK_SECONDS)))
    laboratory.settle()
    spans = []
    with laboratory.workers(*[crew] * WORKERS) as workers:
        time.sleep(1)
        for _ in range(count):
            with Session(laboratory.engine) as session, session.begin():
                laboratory.queue.pause(session)
            paused = time.monotonic()
            time.sleep(PAUSE_SECONDS)
            spans.append((paused, time.monotonic()))
            with Session(laboratory.engine) as session, session.begin():
                laboratory.queue.resume(session)
            time.sleep(PAUSE_SECONDS)
        runs = [run for worker in workers for run in worker.stop()]
    starts = sorted(run.started for run in runs)
    lasts = []
    for paused, resumed in spans:
        last = starts[bisect_left(starts, resumed) - 1]
        lasts.append(max(0.0, last - paused))
    return [
        *percentiles("the last start after the pause's commit", lasts),
        Figure("the latest of all", max(lasts) * 1e3, "ms", "100"),
        Figure("pauses", count, ""),
    ]
