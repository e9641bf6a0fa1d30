"""What somebody has locked, such as a caller who cancels a task and is slow to commit, holds up no other."""

from __future__ import annotations

import logging
import threading
from datetime import timedelta

import probe
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, RunningTask, Snooze, Task, prepare
from apoq.worker import runtime as runtime_module

SOON = 10.0

until = patience(SOON)
LONG = timedelta(hours=1)


def add(engine, type_: str = "t") -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, type_).id


def states(engine) -> dict[int, str]:
    with engine.connect() as connection:
        return {task.id: task.state for task in connection.execute(sa.select(Task.id, Task.state))}


def is_waited_for(engine) -> bool:
    with engine.connect() as connection:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        return bool(connection.exec_driver_sql(waiting).scalar())


@pytest.fixture
def running(engine, make_worker):
    """Ten tasks that run, and what lets them end."""
    begun, go_on = threading.Semaphore(0), threading.Event()

    def process(task: RunningTask) -> None:
        begun.release()
        go_on.wait(SOON)
        if task.id % 2:
            raise Snooze(LONG)

    worker = make_worker(concurrency=10)
    worker.use("t", process)
    worker.use("next", lambda task: None)
    task_ids = [add(engine) for _ in range(10)]
    worker.start()
    for _ in task_ids:
        assert begun.acquire(timeout=SOON)
    yield worker, task_ids, go_on
    go_on.set()


@pytest.mark.parametrize("commits", [True, False])
def test_the_others_are_settled_beside_an_open_cancellation(engine, queue, running, commits, caplog):
    _, task_ids, go_on = running
    with Session(engine) as session:
        assert queue.cancel(session, task_ids[2]) is True
        assert queue.cancel(session, task_ids[5]) is True

        go_on.set()

        until(lambda: list(states(engine).values()).count("running") == 2)
        next_id = add(engine, "next")
        until(lambda: states(engine)[next_id] == "completed")
        (session.commit if commits else session.rollback)()

    until(lambda: "running" not in states(engine).values())
    found = states(engine)
    for task_id in (task_ids[2], task_ids[5]):
        assert found[task_id] == ("cancelled" if commits else "pending" if task_id % 2 else "completed")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_who_cancels_two_that_are_being_settled_is_never_told_of_a_deadlock(engine, queue, running):
    """He has locked the later one, and waits for the earlier: in the other order than the worker."""
    _, task_ids, go_on = running
    with Session(engine) as session:
        queue.cancel(session, task_ids[9])
        go_on.set()
        until(lambda: is_waited_for(engine))

        answers = [queue.cancel(session, task_id) for task_id in reversed(task_ids[:9])]
        session.commit()

    until(lambda: "running" not in states(engine).values())
    found = states(engine)
    assert [found[task_id] == "cancelled" for task_id in reversed(task_ids[:9])] == answers


def test_a_worker_that_stops_meanwhile_settles_the_others_and_says_what_it_leaves(
    engine, queue, running, caplog, monkeypatch
):
    monkeypatch.setattr(runtime_module, "SETTLE_ON_STOP_SECONDS", 2.0)
    worker, task_ids, go_on = running
    with Session(engine) as session:
        queue.cancel(session, task_ids[0])
        go_on.set()

        worker.stop()

        found = states(engine)
        session.commit()
    assert found.pop(task_ids[0]) == "running"
    assert "running" not in found.values()
    assert "the results of 1 tasks could not be written" in caplog.text
    assert states(engine)[task_ids[0]] == "cancelled"


def test_work_waits_for_it(engine, queue, worker):
    """There is nobody else who would settle it later."""
    with Session(engine) as session:
        worker.use("t", lambda task: queue.cancel(session, task.id))
        add(engine)

        def roll_back() -> None:
            until(lambda: probe.put_off_count(worker))
            session.rollback()

        thread = threading.Thread(target=roll_back)
        thread.start()

        found = worker.work()

        thread.join()

    assert found is not None
    assert found.state == "completed"


class TestAWholeTable:
    """As a migration locks it."""

    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch) -> None:
        # As a worker's own engine is, that doesn't wait behind a migration.
        monkeypatch.setattr(runtime_module, "LOCK_TIMEOUT", "100ms")

    def test_what_has_ended_is_settled_when_it_is_free(self, engine, running, caplog):
        _, task_ids, go_on = running
        with caplog.at_level(logging.INFO, "apoq.worker"), engine.connect() as migrating:
            migrating.execute(sa.text("LOCK apoq_tasks"))
            go_on.set()
            locked = probe.locked_schemas(running[0])
            until(lambda: locked)
            first = locked[None]
            until(lambda: locked[None].pause > first.pause)
            # Between two looks: in one, they are on their way.
            until(lambda: probe.put_off_count(running[0]) == len(task_ids))
            migrating.rollback()

        until(lambda: "running" not in states(engine).values())
        assert not locked
        assert (
            len([message for message in caplog.messages if "has locked the table apoq_tasks" in message]) == 1
        )

    def test_another_schema_is_settled_meanwhile(self, engine, make_worker):
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE SCHEMA other")
        prepare(engine, schema="other")
        here, there = Queue(), Queue(schema="other")
        begun, go_on = threading.Semaphore(0), threading.Event()
        worker = make_worker(here, there, concurrency=2)
        worker.use("t", lambda task: begun.release() or go_on.wait(SOON))
        with Session(engine) as session, session.begin():
            here.add(session, "t")
            there.add(session, "t")
        worker.start()
        for _ in range(2):
            assert begun.acquire(timeout=SOON)
        state = sa.text("SELECT state FROM other.apoq_tasks")
        with engine.connect() as migrating, engine.connect() as looking:
            migrating.execute(sa.text("LOCK apoq_tasks"))
            go_on.set()
            until(lambda: looking.scalar(state) == "completed" or looking.rollback())
            migrating.rollback()

        until(lambda: "running" not in states(engine).values())

    def test_a_worker_that_stops_meanwhile_waits_no_longer_than_it_should(
        self, engine, running, caplog, monkeypatch
    ):
        monkeypatch.setattr(runtime_module, "SETTLE_ON_STOP_SECONDS", 2.0)
        worker, task_ids, go_on = running
        with engine.connect() as migrating:
            migrating.execute(sa.text("LOCK apoq_tasks"))
            go_on.set()
            until(lambda: not probe.executor(worker).running())
            worker.stop()
            migrating.rollback()

        assert f"the results of {len(task_ids)} tasks could not be written" in caplog.text
