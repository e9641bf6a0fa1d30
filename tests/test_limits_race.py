"""Races for the places of keys: workers that stop, callers, and a monitor that never sees too many."""

from __future__ import annotations

import random
import threading
import time

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Limit, Retry, Snooze, Task
from apoq.core.states import FINAL, RUNNING

pytestmark = pytest.mark.slow

until = patience(240)

MONITOR = sa.text("""
    SELECT key, count(*) AS number, count(slot) AS placed, count(DISTINCT slot) AS places
    FROM apoq_tasks WHERE state = 'running' AND key IS NOT NULL
    GROUP BY key HAVING count(*) > :at_most
""")


def process(task) -> None:
    chance = random.random()
    if chance < 0.3:
        time.sleep(random.random() * 0.01)
    elif chance < 0.35:
        raise Snooze(random.random() * 0.02)
    elif chance < 0.4:
        raise Retry("again", delay=0.01)
    elif chance < 0.45:
        raise ValueError


class Monitor(threading.Thread):
    """Looks again and again whether too many tasks of a key are running."""

    def __init__(self, engine: sa.Engine, at_most: int) -> None:
        super().__init__(daemon=True)
        self.found: list[object] = []
        self.looks = 0
        self._engine = engine
        self._at_most = at_most
        self._ends = threading.Event()

    def run(self) -> None:
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not self._ends.wait(0.002):
                self.found += connection.execute(MONITOR, {"at_most": self._at_most}).all()
                self.looks += 1

    def end(self) -> None:
        self._ends.set()
        self.join()


@pytest.mark.parametrize("keys", [5, 200])
def test_never_more_than_two_of_a_key_run_whatever_happens_to_them(engine, queue, make_worker, keys):
    total = 3_000
    workers = []
    for _ in range(4):
        worker = make_worker(concurrency=6)
        worker.use("t", process, limit=Limit(2, key=True), retry_limit=50, retry_delay=0.01)
        workers.append(worker)
    with Session(engine) as session, session.begin():
        queue.add_many(session, "t", [{"n": n} for n in range(total)], key=lambda data: data["n"] % keys)
    monitor = Monitor(engine, 2)
    monitor.start()
    for worker in workers:
        worker.start()
    with Session(engine) as session:
        ids = session.scalars(sa.select(Task.id)).all()
    meddled = threading.Event()

    def meddle() -> None:
        """Cancel and delete tasks, and change the limits, while they run."""
        rng = random.Random(7)
        while not meddled.wait(0.01):
            with Session(engine) as session, session.begin():
                queue.cancel(session, rng.choice(ids))
            with Session(engine) as session, session.begin():
                session.execute(sa.delete(Task).where(Task.id == rng.choice(ids)))
            with Session(engine) as session, session.begin():
                queue.limit(session, rng.choice([0, 1, 2, None]), key=str(rng.randrange(keys)))

    meddler = threading.Thread(target=meddle)
    meddler.start()
    time.sleep(3)
    workers[0].stop(timeout=0)
    workers[0].start()
    meddled.set()
    meddler.join()
    with Session(engine) as session, session.begin():
        for limit in queue.limits(session):
            if limit.key is not None:
                queue.limit(session, None, key=limit.key)
    left = sa.select(sa.func.count()).where(Task.state.not_in(FINAL))

    def is_over() -> bool:
        with engine.connect() as connection:
            return connection.scalar(left) == 0

    until(is_over)
    monitor.end()
    assert monitor.looks > 100
    assert not monitor.found
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).where(Task.held_key.is_not(None))) == 0
        assert connection.scalar(sa.select(sa.func.count()).where(Task.state == RUNNING)) == 0
