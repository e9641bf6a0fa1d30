"""A worker reports the tasks that it cancels because a task that they wait for has not completed."""

from __future__ import annotations

import logging

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Cancel, Fail, Queue, Task, Worker
from apoq.client.cascades import fail_children
from apoq.core.outcomes import ParentFailed
from apoq.events import TaskCancelled
from apoq.metrics import exposition
from apoq.schema.statements.cascade import apply_failures

until = patience(20)


@pytest.fixture
def use(make_worker, queue):
    """Make a worker whose tasks of the type "fail" fail, and of the type "cancel" are cancelled."""

    def fail(_task):
        raise Fail("no")

    def cancel(_task):
        raise Cancel("enough")

    def use(*queues: Queue, **options) -> Worker:
        worker = make_worker(*(queues or (queue,)), poll_interval=0.2, **options)
        worker.use("fail", fail)
        worker.use("cancel", cancel)
        worker.use("t", lambda task: None)
        return worker

    return use


@pytest.fixture
def worker(use) -> Worker:
    return use()


@pytest.fixture
def reported(worker) -> list[TaskCancelled]:
    reported: list[TaskCancelled] = []
    worker.events.on(TaskCancelled, reported.append)
    return reported


def run_all(worker: Worker) -> None:
    while worker.work():
        pass


def test_each_task_of_each_level_is_reported_with_its_parent(engine, queue, worker, reported):
    with Session(engine, expire_on_commit=False) as session, session.begin():
        first = queue.add(session, "fail")
        second = queue.add(session, "t", after=[first])
        third = queue.add(session, "other", after=[second])

    worker.work()

    assert [(its.id, its.type, its.queue, its.schema, its.attempt, its.seconds) for its in reported] == [
        (second.id, "t", "default", None, 0, None),
        (third.id, "other", "default", None, 0, None),
    ]
    assert all(isinstance(its.error, ParentFailed) for its in reported)
    assert [str(its.error) for its in reported] == [
        f"parent {first.id} (fail) failed",
        f"parent {second.id} (t) cancelled",
    ]


def test_children_of_a_task_that_its_processor_cancels_are_reported_after_it(engine, queue, worker, reported):
    with Session(engine, expire_on_commit=False) as session, session.begin():
        parent = queue.add(session, "cancel")
        child = queue.add(session, "t", after=[parent])

    worker.work()

    assert [(its.id, type(its.error)) for its in reported] == [(parent.id, Cancel), (child.id, ParentFailed)]


def test_a_child_that_runs_or_stays_is_not_reported(engine, queue, worker, reported):
    with Session(engine) as session, session.begin():
        parent = queue.add(session, "fail")
        for policy in ("run", "hold"):
            queue.add(session, "t", after=[parent], on_parent_failure=policy)

    run_all(worker)

    assert reported == []


def test_a_child_in_another_queue_is_reported_with_its_own(engine, worker, queue, reported):
    with Session(engine) as session, session.begin():
        Queue("other").add(session, "t", after=[queue.add(session, "fail")])

    worker.work()

    assert [its.queue for its in reported] == ["other"]


def test_what_a_caller_cancels_no_worker_reports(engine, queue, worker, reported):
    with Session(engine, expire_on_commit=False) as session, session.begin():
        parent = queue.add(session, "t")
        child = queue.add(session, "t", after=[parent])
    with Session(engine) as session, session.begin():
        assert queue.cancel(session, parent)

    run_all(worker)

    with Session(engine) as session:
        assert session.get(Task, child.id).state == "cancelled"
    assert reported == []


def test_among_several_workers_each_task_is_reported_once(engine, use, queue):
    reported: list[int] = []
    for _ in range(3):
        worker = use()
        worker.events.on(TaskCancelled, lambda event: reported.append(event.id))
        worker.start()
    with Session(engine) as session, session.begin():
        for _ in range(20):
            parent = queue.add(session, "fail")
            for _ in range(10):
                queue.add(session, "t", after=[parent])

    def cancelled() -> list[int]:
        with Session(engine) as session:
            return list(session.scalars(sa.select(Task.id).where(Task.state == "cancelled")))

    until(lambda: len(cancelled()) == 200)

    until(lambda: len(reported) >= 200)
    assert sorted(reported) == sorted(cancelled())


def test_metrics_count_them_as_cancelled(engine, use, queue):
    worker = use(metrics=True)
    with Session(engine) as session, session.begin():
        for type_ in ("fail", "cancel"):
            parent = queue.add(session, type_)
            queue.add(session, "t", after=[parent])

    run_all(worker)

    _, body = exposition(worker.metrics)
    lines = [line for line in body.decode().splitlines() if 'outcome="cancelled"' in line]
    counts = {line.split('type="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}
    assert counts == {"fail": 0, "cancel": 1, "t": 2}


def test_they_are_logged_for_debugging(engine, worker, queue, caplog):
    caplog.set_level(logging.DEBUG, "apoq.worker")
    with Session(engine, expire_on_commit=False) as session, session.begin():
        parent = queue.add(session, "fail")
        child = queue.add(session, "t", after=[parent])

    worker.work()

    expected = f"task {child.id} (t) is cancelled with its parent: parent {parent.id} (fail) failed"
    assert expected in [record.getMessage() for record in caplog.records]


def test_without_a_listener_nothing_is_read_of_them():
    sent = []

    def execute(statement, _parameters):
        sent.append(statement)
        return []

    fail_children(execute, None, [1])
    fail_children(execute, None, [1], report=print)

    assert list(map(str, sent)) == [str(apply_failures(None)), str(apply_failures(None, reports=True))]
    assert "reason" not in str(sent[0])


def test_a_listener_can_not_wait_for_its_own_worker(engine, worker, queue):
    raised: list[BaseException] = []

    def stop(_event: TaskCancelled) -> None:
        try:
            worker.stop()
        except RuntimeError as error:
            raised.append(error)

    worker.events.on(TaskCancelled, stop)
    with Session(engine) as session, session.begin():
        queue.add(session, "t", after=[queue.add(session, "fail")])
    worker.start()

    until(lambda: raised)
    assert "stop waits for the processors and listeners that run" in str(raised[0])
