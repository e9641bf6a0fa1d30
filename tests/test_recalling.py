"""How those that run a task which was cancelled are told, wherever they are just then."""

from __future__ import annotations

import asyncio
import logging
import threading
from datetime import timedelta

import probe
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import AsyncRunningTask, Queue, RunningTask, Task, prepare

SOON = 10.0

until = patience(SOON)
LONG = 60.0
RARELY = timedelta(seconds=LONG)
"""A lease whose heartbeats come too late for a test: what is told is told by a notification."""


def add(engine, type_: str = "t", queue=None) -> int:
    with Session(engine) as session, session.begin():
        return (queue or Queue()).add(session, type_).id


def load(engine, task_id: int) -> Task:
    with Session(engine) as session:
        return session.get_one(Task, task_id)


def cancel(engine, task_id: int, queue=None) -> bool:
    with Session(engine) as session, session.begin():
        return (queue or Queue()).cancel(session, task_id)


class TestCoroutines:
    def test_one_whose_turn_on_the_loop_has_not_come_does_not_begin(self, engine, make_worker):
        blocking, go_on = threading.Event(), threading.Event()
        ran: list[int] = []

        async def block(_task: AsyncRunningTask) -> None:
            blocking.set()
            go_on.wait(SOON)  # and with it the whole loop

        async def process(task: AsyncRunningTask) -> None:
            ran.append(task.id)

        worker = make_worker(lease=RARELY)
        worker.use("block", block)
        worker.use("t", process)
        worker.start()
        add(engine, "block")
        assert blocking.wait(SOON)
        task_id = add(engine)
        until(lambda: task_id in {task.id for task in probe.executor(worker).running()})

        cancel(engine, task_id)

        until(
            lambda: all(task.should_stop for task in probe.executor(worker).running() if task.id == task_id)
        )
        go_on.set()
        until(lambda: probe.executor(worker).load == 0)
        assert ran == []

    def test_one_that_waits_for_the_database_is_undone_and_leaves_no_connection_behind(
        self, engine, make_worker
    ):
        begun = threading.Event()

        async def process(task: AsyncRunningTask) -> None:
            await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
            begun.set()
            await task.session.execute(sa.text("SELECT pg_sleep(:long)"), {"long": LONG})

        worker = make_worker(lease=RARELY)
        worker.use("t", process)
        worker.start()
        task_id = add(engine)
        assert begun.wait(SOON)

        cancel(engine, task_id)

        until(lambda: probe.executor(worker).load == 0)
        sleeping = sa.text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'")
        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM ledger")) == 0
            assert connection.scalar(sleeping) == 0

    def test_one_with_a_timeout_is_cancelled_as_well_and_has_not_failed(self, engine, make_worker, caplog):
        caplog.set_level(logging.INFO, "apoq")
        begun, cancelled = threading.Event(), threading.Event()

        async def process(_task: AsyncRunningTask) -> None:
            begun.set()
            try:
                await asyncio.sleep(LONG)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        worker = make_worker(lease=RARELY)
        worker.use("t", process, timeout=LONG)
        worker.events.on("task.failed", lambda *_: pytest.fail("nobody is told of a failure"))
        worker.events.on("task.retried", lambda *_: pytest.fail("nobody is told of a retry"))
        worker.start()
        task_id = add(engine)
        assert begun.wait(SOON)

        cancel(engine, task_id)

        assert cancelled.wait(SOON)
        until(lambda: "its result is ignored" in caplog.text)
        task = load(engine, task_id)
        assert (task.state, task.attempt, task.fail_count) == ("cancelled", 1, 0)

    def test_one_that_takes_no_notice_is_cancelled_once_and_its_result_is_refused(self, engine, make_worker):
        begun, looked = threading.Event(), threading.Semaphore(0)
        cancellations: list[str] = []
        go_on = threading.Event()

        async def process(task: AsyncRunningTask) -> None:
            begun.set()
            while not go_on.is_set():
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError as error:
                    cancellations.append(str(error))
            await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

        worker = make_worker(lease=timedelta(seconds=0.5))
        worker.use("t", process)
        worker.start()
        task_id = add(engine)
        assert begun.wait(SOON)
        probe.on_lost_tasks(worker, lambda tasks: looked.release(len(tasks) or 1))

        cancel(engine, task_id)

        for _ in range(5):
            assert looked.acquire(timeout=SOON)
        go_on.set()
        until(lambda: probe.executor(worker).load == 0)
        assert cancellations == ["the worker no longer owns the task"]
        assert load(engine, task_id).state == "cancelled"
        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM ledger")) == 0


class TestFunctions:
    def test_each_of_two_runs_of_a_task_in_one_worker_is_told_of_its_own_end(self, engine, make_worker):
        """The first was cancelled, the second is its retry: only the first runs in vain."""
        begun, go_on = threading.Semaphore(0), threading.Event()
        stopped: list[int] = []

        def process(task: RunningTask) -> None:
            begun.release()
            until(lambda: task.should_stop or go_on.is_set())
            if task.should_stop:
                stopped.append(task.claim_token)

        worker = make_worker(lease=timedelta(seconds=0.5))
        worker.use("t", process)
        worker.start()
        task_id = add(engine)
        assert begun.acquire(timeout=SOON)

        with Session(engine) as session, session.begin():
            assert Queue().cancel(session, task_id) is True
            assert Queue().retry(session, task_id) is True

        assert begun.acquire(timeout=SOON)
        until(lambda: stopped == [1])
        go_on.set()
        until(lambda: load(engine, task_id).state == "completed")
        assert stopped == [1]

    def test_two_tasks_of_one_id_in_two_schemas_are_not_taken_for_each_other(self, engine, make_worker):
        jobs = Queue(schema="jobs")
        prepare(engine, schema="jobs")
        begun, go_on = threading.Semaphore(0), threading.Event()
        stopped: list[str | None] = []

        def process(task: RunningTask) -> None:
            begun.release()
            until(lambda: task.should_stop or go_on.is_set())
            if task.should_stop:
                stopped.append(task.from_queue.schema)

        worker = make_worker(Queue(), jobs, lease=RARELY)
        worker.use("t", process)
        worker.start()
        task_id = add(engine)
        assert add(engine, queue=jobs) == task_id
        for _ in range(2):
            assert begun.acquire(timeout=SOON)

        cancel(engine, task_id)

        until(lambda: stopped)
        with Session(engine) as session, session.begin():
            assert jobs.cancel(session, task_id) is True
        until(lambda: len(stopped) == 2)
        go_on.set()
        assert stopped == [None, "jobs"]

    def test_while_its_worker_waits_for_it_to_stop(self, engine, make_worker):
        begun, stopping, told = threading.Event(), threading.Event(), threading.Event()

        def process(task: RunningTask) -> None:
            begun.set()
            until(lambda: task.should_stop)
            stopping.set()
            told.wait(SOON)
            task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

        worker = make_worker(lease=RARELY)
        worker.use("t", process)
        worker.start()
        task_id = add(engine)
        assert begun.wait(SOON)
        thread = threading.Thread(target=worker.stop)
        thread.start()
        assert stopping.wait(SOON)

        assert cancel(engine, task_id) is True

        told.set()
        thread.join(SOON)
        assert load(engine, task_id).state == "cancelled"
        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM ledger")) == 0


def test_the_log_has_a_line_when_it_is_told_and_one_when_it_has_ended(engine, make_worker, caplog):
    caplog.set_level(logging.INFO, "apoq.worker")
    begun = threading.Event()

    def process(task: RunningTask) -> None:
        begun.set()
        until(lambda: task.should_stop)
        raise ValueError("what it fails with is nobody's business any more")

    worker = make_worker(lease=RARELY)
    worker.use("t", process)
    worker.start()
    task_id = add(engine)
    assert begun.wait(SOON)

    cancel(engine, task_id)

    until(lambda: not probe.claim_log(worker).held())
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "has started" not in line] == [
        f"this worker no longer owns these tasks, and tells them to stop: {task_id}",
        f"task {task_id} (t) no longer belonged to this worker when it ended: its result is ignored",
    ]
    assert load(engine, task_id).error["class"] == "Cancel"


def test_what_was_never_claimed_is_cancelled_without_a_notification(engine, url):
    """Nobody runs it; so a thousand that are cancelled at once tell nobody a thousand times."""
    waiting, claimed = add(engine), add(engine)
    with engine.begin() as connection:
        connection.execute(
            sa.update(Task).where(Task.id == claimed).values(state="running", claimed_at=sa.func.now())
        )
    dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn, autocommit=True) as listening:
        listening.execute("LISTEN apoq_cancelled")

        cancel(engine, waiting)
        cancel(engine, claimed)

        (heard,) = listening.notifies(timeout=SOON, stop_after=1)
    assert heard.payload == str(claimed)


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_above_read_committed_a_cancellation_beside_a_completion_is_a_serialization_failure(
    engine, queue, worker, level
):
    worker.use("t", lambda task: None)
    task_id = add(engine)
    with Session(engine.execution_options(isolation_level=level)) as session:
        assert session.get_one(Task, task_id).state == "pending"
        assert worker.work() is not None

        with pytest.raises(sa.exc.OperationalError) as raised:
            queue.cancel(session, task_id)

    assert raised.value.orig.sqlstate == "40001"


@pytest.mark.parametrize("uses_session", [False, True])
def test_tasks_that_complete_while_the_worker_looks_for_lost_ones_are_not_lost(
    engine, make_worker, uses_session, caplog
):
    with Session(engine) as session, session.begin():
        Queue().add_many(session, "t", range(2_000))
    worker = make_worker(lease=RARELY)
    worker.use("t", lambda task: uses_session and task.session.execute(sa.text("SELECT 1")))
    monitor = probe.runtime(worker).lost_task_monitor
    with caplog.at_level(logging.INFO, "apoq"):
        worker.start()
        until(lambda: monitor.look_for(None) or worker.stats().completed == 2_000, 30)
        worker.stop()

    assert not [message for message in caplog.messages if "no longer" in message]
