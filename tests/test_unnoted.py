"""Running tasks that no claim has noted: after a restore or a replication of the task table alone."""

from __future__ import annotations

import threading
from datetime import timedelta
from uuid import uuid4

import probe
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, Task, prepare
from apoq.worker.maintenance import sweep

SOON = 20.0

until = patience(SOON)

LEASE = timedelta(seconds=1)


def add_running(engine: sa.Engine, queue: Queue | None = None, **columns: object) -> int:
    queue = queue or Queue()
    values = {"state": "running", "attempt": 1, "claim_token": 1, "worker_id": uuid4(), **columns}
    with Session(engine) as session, session.begin():
        task_id = queue.add(session, "t").id
        session.flush()
        session.execute(sa.update(queue.task_class).values(values))
    return task_id


def load(engine: sa.Engine, task_class: type[Task] = Task) -> Task:
    with Session(engine) as session:
        return session.scalars(sa.select(task_class)).one()


@pytest.mark.parametrize("queue", [Queue(), Queue("nobody works it")], ids=["its queue", "another queue"])
def test_one_is_pending_again_whatever_its_queue(engine, make_worker, queue, caplog):
    add_running(engine, queue)
    worker = make_worker(lease=LEASE)
    worker.use("other", lambda task: None)

    worker.start()

    until(lambda: load(engine).state == "pending")
    task = load(engine)
    assert (task.rescue_count, task.fail_count, task.error["class"]) == (1, 1, "WorkerDied")
    assert "1 running tasks that no worker owned are pending again" in caplog.messages


def test_one_of_any_schema_and_any_priority_is_found(engine, make_worker):
    prepare(engine, schema="other")
    other = Queue("b", schema="other")
    add_running(engine, Queue("a"), priority=-5)
    add_running(engine, other, priority=32767)
    worker = make_worker(Queue(), other, lease=LEASE)
    worker.use("other", lambda task: None)

    worker.start()

    until(lambda: load(engine).state == load(engine, other.task_class).state == "pending")


def test_one_is_found_behind_many_that_wait(engine, queue, make_worker, monkeypatch):
    monkeypatch.setattr(sweep, "STEP_SIZE", 10)
    with Session(engine) as session, session.begin():
        queue.add_many(session, "unknown", range(95))
        ids = session.scalars(sa.select(Task.id).order_by(Task.id)).all()
        session.execute(sa.update(Task).where(Task.id == ids[-3]).values(state="running", worker_id=uuid4()))
    worker = make_worker(lease=LEASE)
    worker.use("t", lambda task: None)

    worker.start()

    with engine.connect() as connection:
        pending = sa.select(sa.func.count()).where(Task.state == "pending")
        until(lambda: connection.rollback() or connection.scalar(pending) == 95)


def test_one_that_a_live_worker_has_is_left_to_it(engine, queue, make_worker):
    """Its notes are gone, as if another program had emptied their table."""
    began, may_end, attempts = threading.Event(), threading.Event(), []

    def process(task) -> None:
        attempts.append(task.attempt)
        began.set()
        may_end.wait(SOON)

    first, second = (make_worker(lease=LEASE) for _ in range(2))
    for worker in (first, second):
        worker.use("t", process)
    first.start()
    with Session(engine) as session, session.begin():
        queue.add(session, "t")
    assert began.wait(SOON)
    with engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE apoq_claims")
    second.start()

    until(lambda: probe.sweep_level(second) is None)
    for _ in range(2):
        probe.sweep(second)
    may_end.set()
    until(lambda: load(engine).state == "completed")

    assert attempts == [1]


def test_no_more_than_a_statement_a_pass_is_sent_if_there_is_nothing_to_find(engine, worker):
    found = sweep.next_level(None)
    with engine.connect() as connection:
        assert connection.execute(found, sweep.BEFORE_ALL).all() == []
