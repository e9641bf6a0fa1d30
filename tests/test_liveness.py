"""A worker shows that it lives for as long as it holds anything, whatever its processors do."""

from __future__ import annotations

import threading
from datetime import timedelta
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import AsyncRunningTask, Queue, RunningTask, Task, Worker

SOON = 30.0
LEASE = timedelta(seconds=0.5)


def add(engine, type_: str = "t") -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, type_).id


def seen_at(engine, worker: Worker):
    with engine.connect() as connection:
        of_worker = {"id": worker._heartbeat.worker_id}
        return connection.scalar(sa.text("SELECT seen_at FROM apoq_workers WHERE id = :id"), of_worker)


def until(condition) -> None:
    pause = threading.Event()
    for _ in range(int(SOON / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it hasn't come to pass")


def beats(engine, times: int, worker: Worker) -> None:
    """Wait until it has beaten so many times."""
    for _ in range(times):
        before = seen_at(engine, worker)
        until(lambda before=before: seen_at(engine, worker) > before)


def test_each_start_is_a_worker_of_its_own(engine, worker):
    """What its last life left behind doesn't look alive because it has started again."""
    ids: list[UUID] = []
    for _ in range(2):
        worker.start()
        with engine.connect() as connection:
            ids += connection.scalars(sa.text("SELECT id FROM apoq_workers"))
        worker.stop()

    assert len(set(ids)) == 2


def test_it_beats_until_the_last_task_has_ended_while_it_stops(engine, make_worker):
    begun, go_on = threading.Event(), threading.Event()

    def process(_task: RunningTask) -> None:
        begun.set()
        go_on.wait(SOON)

    worker = make_worker(lease=LEASE)
    worker.use("t", process)
    worker.start()
    task_id = add(engine)
    assert begun.wait(SOON)
    others = make_worker(lease=LEASE)
    others.use("t", lambda task: None)
    others.start()
    thread = threading.Thread(target=worker.stop)
    thread.start()
    until(lambda: not worker._claiming.is_alive)

    beats(engine, 10, worker)  # two leases

    go_on.set()
    thread.join()
    with Session(engine) as session:
        task = session.get_one(Task, task_id)
    assert (task.state, task.rescue_count) == ("completed", 0)


def test_it_beats_while_a_coroutine_blocks_its_loop_and_every_connection_of_the_pool_is_taken(
    url, make_worker
):
    small = sa.create_engine(url, pool_size=1, max_overflow=0)
    begun, go_on = threading.Semaphore(0), threading.Event()

    async def block(_task: AsyncRunningTask) -> None:
        begun.release()
        go_on.wait(SOON)

    def hold(task: RunningTask) -> None:
        task.session.execute(sa.text("SELECT 1"))
        begun.release()
        go_on.wait(SOON)

    worker = Worker(small, concurrency=2, lease=LEASE)
    worker.use("block", block)
    worker.use("hold", hold)
    looking = sa.create_engine(url)
    worker.start()
    for type_ in ("block", "hold"):
        add(looking, type_)
        assert begun.acquire(timeout=SOON)

    beats(looking, 10, worker)  # two leases

    go_on.set()
    worker.stop()
    small.dispose()
    with Session(looking) as session:
        assert [(task.state, task.rescue_count) for task in session.scalars(sa.select(Task))] == [
            ("completed", 0),
            ("completed", 0),
        ]
    looking.dispose()
