"""First figures: tasks a second of one worker process, and the time from a commit to the start of its task.

Default settings, no-op tasks of about 100 bytes; on DATABASE_URL, or else on a private PostgreSQL with stock
durability (fsync and synchronous_commit on):

    python benchmarks/first.py
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time

import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import Queue, RunningTask, Task, Worker, prepare
from apoq.embedded import database

RUNS = 5
TASKS = 50_000
SAMPLES = 300


def drain(engine: sa.Engine) -> float:
    """Add tasks, start a worker, and answer how many it completed a second, each of them once."""
    queue, ran, last = Queue(), itertools.count(1), threading.Event()
    with Session(engine) as session, session.begin():
        session.execute(sa.delete(Task))
        queue.add_many(session, "noop", ({"text": "x" * 80} for _ in range(TASKS)))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("VACUUM ANALYZE apoq_tasks"))

    def noop(_task: RunningTask) -> None:
        if next(ran) == TASKS:
            last.set()

    worker = Worker(engine, queue)
    worker.use("noop", noop)
    began = time.perf_counter()
    worker.start()
    last.wait()
    worker.stop()  # when the last completion has been written
    took = time.perf_counter() - began
    with Session(engine) as session:
        completed = session.scalar(sa.select(sa.func.count()).where(Task.state == "completed"))
    assert completed == TASKS, f"{completed} of {TASKS} tasks are completed"
    assert next(ran) == TASKS + 1, "a task ran twice"
    return TASKS / took


def latencies(engine: sa.Engine) -> list[float]:
    """Add tasks one by one to an idle worker; answer the milliseconds from each commit to its start."""
    queue, started, began_at = Queue(), threading.Event(), 0.0

    def noop(_task: RunningTask) -> None:
        nonlocal began_at
        began_at = time.perf_counter()
        started.set()

    worker = Worker(engine, queue)
    worker.use("noop", noop)
    worker.start()
    samples = []
    with Session(engine) as session:
        for _ in range(SAMPLES):
            started.clear()
            queue.add(session, "noop", {"text": "x" * 80})
            session.commit()
            committed_at = time.perf_counter()
            started.wait()
            samples.append((began_at - committed_at) * 1000)
            time.sleep(0.01)
    worker.stop()
    return samples


def main(url: str) -> None:
    engine = sa.create_engine(url)
    prepare(engine)
    rates = [drain(engine) for _ in range(RUNS)]
    print(
        f"one process, {TASKS:,} tasks, {RUNS} runs: median {statistics.median(rates):,.0f} tasks/s "
        f"({min(rates):,.0f} to {max(rates):,.0f})"
    )
    cuts = statistics.quantiles(latencies(engine), n=100)
    print(
        f"commit to start, {SAMPLES} samples: p50 {cuts[49]:.1f}, p95 {cuts[94]:.1f}, p99 {cuts[98]:.1f} ms"
    )
    engine.dispose()


if __name__ == "__main__":
    with database() as url:
        main(url)
