"""Cancelling tasks, and trying ended ones again."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from typing import Any

import probe
import psycopg
import pytest
import sqlalchemy as sa
import transaction
import zope.sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from waiting import patience

from apoq import AsyncRunningTask, InvalidTask, Queue, RunningTask, Task
from apoq.core.states import CANCELLED, FINAL, STATES, TRANSITIONS
from apoq.schema.statements.claim import ID

SOON = 10.0
"""Seconds within which what a test waits for has long happened."""

until = patience(SOON)

LONG = 60.0
"""Seconds that nobody waits for."""


def add(engine, queue=None, **options) -> int:
    with Session(engine) as session, session.begin():
        return (queue or Queue()).add(session, "t", **options).id


def load(engine, task_id: int) -> Task:
    with Session(engine) as session:
        return session.get_one(Task, task_id)


def cancel(engine, task_id: int, **options: Any) -> bool:
    with Session(engine) as session, session.begin():
        return Queue().cancel(session, task_id, **options)


def retry(engine, task_id: int, **options: Any) -> bool:
    with Session(engine) as session, session.begin():
        return Queue().retry(session, task_id, **options)


class TestInTheCallersTransaction:
    def test_a_pending_task_is_cancelled_at_the_commit(self, engine):
        task_id = add(engine)
        with Session(engine) as session:
            assert Queue().cancel(session, task_id, reason="no longer wanted") is True
            assert load(engine, task_id).state == "pending"
            session.commit()

        task = load(engine, task_id)
        assert task.state == "cancelled"
        assert task.cancelled_at is not None
        assert task.error is not None
        assert (task.error["class"], task.error["message"]) == ("Cancel", "no longer wanted")

    def test_a_rollback_undoes_it(self, engine):
        task_id = add(engine)
        with Session(engine) as session:
            Queue().cancel(session, task_id)
            session.rollback()

        assert load(engine, task_id).state == "pending"

    @pytest.mark.parametrize("change", ["cancel", "retry"])
    def test_what_does_not_exist_is_not_changed(self, session, queue, change):
        assert getattr(queue, change)(session, 404) is False

    @pytest.mark.parametrize("state", STATES)
    def test_it_is_cancelled_from_where_the_table_of_states_says(self, session, queue, state):
        task = Task(type="t", state=state)
        session.add(task)
        session.flush()

        is_possible = CANCELLED in TRANSITIONS[state]
        assert queue.cancel(session, task) is is_possible
        assert task.state == ("cancelled" if is_possible else state)

    @pytest.mark.parametrize("state", STATES)
    def test_it_is_retried_where_it_has_ended(self, session, queue, state):
        task = Task(type="t", state=state)
        session.add(task)
        session.flush()

        assert queue.retry(session, task) is (state in FINAL)
        assert task.state == ("pending" if state in FINAL else state)

    @pytest.mark.parametrize("state", ["completed", "failed", "cancelled"])
    def test_what_has_ended_is_retried_with_all_its_attempts(self, session, queue, state):
        error = {"class": "E", "message": "m", "traceback": ""}
        task = Task(
            type="t", state=state, attempt=6, fail_count=6, claim_token=9, rescue_count=1, error=error
        )
        task.completed_at = task.failed_at = task.cancelled_at = sa.func.now()
        session.add(task)
        session.flush()

        assert queue.retry(session, task.id) is True

        session.expire(task)
        assert (task.state, task.attempt, task.fail_count, task.rescue_count) == ("pending", 0, 0, 0)
        assert (task.completed_at, task.failed_at, task.cancelled_at) == (None, None, None)
        assert (task.claim_token, task.error) == (9, error)

    def test_a_retry_may_have_a_delay(self, session, queue):
        task = Task(type="t", state="failed")
        session.add(task)
        session.flush()

        queue.retry(session, task, delay=timedelta(hours=1))

        began = session.scalar(sa.select(sa.func.now()))
        assert timedelta(minutes=59) < task.process_at - began < timedelta(minutes=61)

    def test_its_times_are_those_of_the_call_and_not_of_the_transactions_beginning(self, session, queue):
        cancelled, retried = Task(type="t"), Task(type="t", state="failed")
        session.add_all([cancelled, retried])
        session.flush()
        called = session.scalar(sa.select(sa.func.clock_timestamp()))

        queue.cancel(session, cancelled)
        queue.retry(session, retried, delay=timedelta(hours=1))

        assert cancelled.cancelled_at > called
        assert retried.process_at > called + timedelta(hours=1)

    @pytest.mark.parametrize("change", ["cancel", "retry"])
    def test_a_task_of_another_queue_is_left_alone(self, session, change):
        task = Queue("emails").add(session, "t")
        session.execute(sa.update(Task).values(state="pending" if change == "cancel" else "failed"))

        assert getattr(Queue(), change)(session, task) is False
        assert getattr(Queue("emails"), change)(session, task) is True

    @pytest.mark.parametrize("change", ["cancel", "retry"])
    def test_it_is_one_statement_and_nothing_else(self, engine, change):
        task_id = add(engine)
        if change == "retry":
            cancel(engine, task_id)
        sent: list[str] = []
        with engine.connect() as connection:
            sa.event.listen(engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
            sa.event.listen(engine, "savepoint", lambda *args: sent.append("SAVEPOINT"))
            sa.event.listen(engine, "commit", lambda *args: sent.append("COMMIT"))
            assert getattr(Queue(), change)(connection, task_id) is True

        (statement,) = sent
        assert statement.startswith("UPDATE apoq_tasks")
        assert "notify" not in statement

    @pytest.mark.parametrize("change", ["cancel", "retry"])
    def test_a_session_that_zope_commits_is_committed_though_it_does_nothing_else(self, engine, change):
        task_id = add(engine)
        if change == "retry":
            cancel(engine, task_id)
        session = sessionmaker(engine)()
        zope.sqlalchemy.register(session)

        with transaction.manager:
            getattr(Queue(), change)(session, task_id)

        assert load(engine, task_id).state == ("cancelled" if change == "cancel" else "pending")


class TestTheTaskInTheSession:
    def test_it_is_as_in_the_database_without_another_statement(self, engine, queue):
        with Session(engine) as session, session.begin():
            task = queue.add(session, "t")
            queue.cancel(session, task)
            sent: list[str] = []
            sa.event.listen(engine, "before_cursor_execute", lambda *args: sent.append(args[2]))

            assert task.state == "cancelled"
            assert task.cancelled_at is not None
            assert sent == []

    def test_what_was_changed_beside_it_is_kept(self, engine, queue):
        task_id = add(engine)
        with Session(engine) as session, session.begin():
            task = session.get_one(Task, task_id)
            task.data = {"new": True}
            queue.cancel(session, task)

        task = load(engine, task_id)
        assert (task.state, task.data) == ("cancelled", {"new": True})

    def test_a_savepoint_that_is_rolled_back_takes_it_back(self, engine, queue):
        with Session(engine) as session, session.begin():
            task = queue.add(session, "t")
            with session.begin_nested() as savepoint:
                queue.cancel(session, task)
                savepoint.rollback()

            assert task.state == "pending"
            assert task.cancelled_at is None

    def test_one_that_has_not_been_flushed_has_no_id(self, session, queue):
        task = Task(type="t")
        session.add(task)

        with pytest.raises(InvalidTask, match=r"must have an id, .* flush the session"):
            queue.cancel(session, task)


class TestEveryKindOfSession:
    def test_core(self, engine, queue):
        task_id = add(engine)
        with engine.begin() as connection:
            assert queue.cancel(connection, task_id) is True
            assert queue.retry(connection, task_id) is True

    def test_psycopg(self, engine, url, queue):
        task_id = add(engine)
        with psycopg.connect(url.set(drivername="postgresql").render_as_string(False)) as connection:
            assert queue.cancel(connection, task_id) is True
            assert queue.retry(connection, task_id) is True

    def test_asyncio(self, engine, url, queue):
        async def both() -> None:
            async_engine = create_async_engine(url)
            async with AsyncSession(async_engine) as session, session.begin():
                task = await queue.add(session, "t")
                assert await queue.cancel(session, task) is True
                assert task.state == "cancelled"
                assert await queue.retry(session, task) is True
                assert task.state == "pending"
            await async_engine.dispose()

        asyncio.run(both())

    def test_a_schema_of_its_own(self, engine):
        from apoq import prepare

        queue = Queue(schema="jobs")
        prepare(engine, schema="jobs")
        with Session(engine) as session, session.begin():
            task = queue.add(session, "t")

            assert queue.cancel(session, task) is True
            assert task.state == "cancelled"
            with pytest.raises(InvalidTask, match="must be in the schema of"):
                queue.cancel(session, Task(type="t"))
            with pytest.raises(InvalidTask, match="must be in the schema of"):
                Queue().retry(session, task)


@pytest.mark.parametrize("task", [None, "7", True, 2**63, 1.0], ids=repr)
@pytest.mark.parametrize("change", ["cancel", "retry"])
def test_a_task_is_a_task_or_its_id(session, queue, change, task):
    with pytest.raises(InvalidTask, match="a task's id must be a whole number"):
        getattr(queue, change)(session, task)


def test_a_reason_is_text(session, queue):
    with pytest.raises(InvalidTask, match="reason must be text"):
        queue.cancel(session, 1, reason=7)


class TestARunningTask:
    def test_a_plain_function_is_told_to_stop_and_its_writes_are_undone(self, engine, make_worker):
        begun, told = threading.Event(), threading.Event()

        def process(task: RunningTask) -> None:
            task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
            begun.set()
            until(lambda: task.should_stop)
            told.set()

        worker = make_worker(lease=timedelta(seconds=LONG))
        worker.use("t", process)
        worker.start()
        task_id = add(engine)
        assert begun.wait(SOON)

        assert cancel(engine, task_id) is True

        assert told.wait(SOON)
        worker.stop()
        task = load(engine, task_id)
        assert (task.state, task.fail_count) == ("cancelled", 0)
        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM ledger")) == 0

    def test_a_coroutine_is_cancelled_and_its_slot_goes_on(self, engine, make_worker):
        begun, cancelled, ran = threading.Event(), threading.Event(), threading.Event()

        async def wait(_task: AsyncRunningTask) -> None:
            begun.set()
            try:
                await asyncio.sleep(LONG)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        async def next_one(_task: AsyncRunningTask) -> None:
            async with asyncio.timeout(SOON):  # counts the cancellations of its slot
                await asyncio.sleep(0)
            ran.set()

        worker = make_worker(concurrency=1, lease=timedelta(seconds=LONG))
        worker.use("t", wait)
        worker.use("next", next_one)
        worker.start()
        task_id = add(engine)
        assert begun.wait(SOON)
        with Session(engine) as session, session.begin():
            next_id = Queue().add(session, "next").id

        assert cancel(engine, task_id) is True

        assert cancelled.wait(SOON)
        assert ran.wait(SOON)
        until(lambda: load(engine, next_id).state == "completed")
        assert load(engine, task_id).state == "cancelled"

    def test_a_rollback_tells_nobody(self, engine, make_worker):
        begun, go_on = threading.Event(), threading.Event()
        told: list[bool] = []

        def process(task: RunningTask) -> None:
            begun.set()
            go_on.wait(SOON)
            told.append(task.should_stop)

        worker = make_worker(lease=timedelta(seconds=3))
        worker.use("t", process)
        worker.start()
        task_id = add(engine)
        assert begun.wait(SOON)

        with Session(engine) as session:
            Queue().cancel(session, task_id)
            session.rollback()
        probe.after_look_for_lost_tasks(worker, go_on.set)

        until(lambda: load(engine, task_id).state == "completed")
        assert told == [False]

    def test_it_is_told_even_where_no_notification_arrives(self, engine, url, make_worker):
        begun, told = threading.Event(), threading.Event()

        def process(task: RunningTask) -> None:
            begun.set()
            until(lambda: task.should_stop)
            told.set()

        worker = make_worker(lease=timedelta(seconds=0.5))
        worker.use("t", process)
        worker.start()
        task_id = add(engine)
        assert begun.wait(SOON)

        with psycopg.connect(url.set(drivername="postgresql").render_as_string(False)) as connection:
            assert Queue().cancel(connection, task_id) is True

        assert told.wait(SOON)

    def test_a_task_that_was_deleted_is_told_as_well(self, engine, make_worker):
        begun, told = threading.Event(), threading.Event()

        def process(task: RunningTask) -> None:
            begun.set()
            until(lambda: task.should_stop)
            told.set()

        worker = make_worker(lease=timedelta(seconds=0.5))
        worker.use("t", process)
        worker.start()
        task_id = add(engine)
        assert begun.wait(SOON)

        with engine.begin() as connection:
            connection.execute(sa.delete(Task).where(Task.id == task_id))

        assert told.wait(SOON)

    def test_what_waits_for_a_slot_does_not_begin(self, engine, make_worker):
        begun, go_on = threading.Event(), threading.Event()
        ran: list[int] = []

        def process(task: RunningTask) -> None:
            ran.append(task.id)
            begun.set()
            go_on.wait(SOON)

        worker = make_worker(concurrency=1, lease=timedelta(seconds=LONG))
        worker.use("t", process)
        probe.executor(worker).run_time = 0.001  # so that it claims ahead
        first, second = add(engine), add(engine)
        worker.start()
        assert begun.wait(SOON)
        until(lambda: load(engine, second).state == "running")

        assert cancel(engine, second) is True

        until(lambda: second not in {row[ID] for row in probe.claim_log(worker).held()})
        go_on.set()
        until(lambda: load(engine, first).state == "completed")
        worker.stop()
        assert ran == [first]
        assert load(engine, second).state == "cancelled"

    def test_one_that_work_runs_is_told(self, engine, make_worker):
        worker = make_worker(lease=timedelta(seconds=0.5))
        task_id = add(engine)

        def process(task: RunningTask) -> None:
            cancel(engine, task_id)
            until(lambda: task.should_stop)

        worker.use("t", process)

        found = worker.work()

        assert found is not None
        assert found.state == "cancelled"

    def test_it_can_be_retried_while_it_still_runs(self, engine, make_worker):
        begun, go_on = threading.Event(), threading.Event()
        attempts: list[int] = []

        def process(task: RunningTask) -> None:
            attempts.append(task.claim_token)
            if len(attempts) == 1:
                begun.set()
                go_on.wait(SOON)

        worker = make_worker(concurrency=2)
        worker.use("t", process)
        worker.start()
        task_id = add(engine)
        assert begun.wait(SOON)

        assert cancel(engine, task_id) is True
        assert retry(engine, task_id) is True

        until(lambda: load(engine, task_id).state == "completed")
        go_on.set()
        worker.stop()
        task = load(engine, task_id)
        assert (task.state, task.attempt, len(attempts)) == ("completed", 1, 2)


def test_a_processor_that_cancels_its_own_task_in_its_session_is_told_what_to_do_instead(engine, make_worker):
    worker = make_worker()
    worker.use("t", lambda task: Queue().cancel(task.session, task.id))
    task_id = add(engine)

    worker.work()

    task = load(engine, task_id)
    assert (task.state, task.fail_count) == ("pending", 1)
    assert task.error is not None
    assert "raise Cancel" in task.error["message"]


def test_a_retried_task_is_run_at_once(engine, make_worker):
    ran = threading.Event()
    worker = make_worker(poll_interval=timedelta(seconds=LONG))
    worker.use("t", lambda task: ran.set())
    worker.start()
    with Session(engine) as session, session.begin():
        session.add(Task(type="t", state="failed", attempt=6, fail_count=6))
        session.flush()
        (task_id,) = session.scalars(sa.select(Task.id))

    assert retry(engine, task_id) is True

    assert ran.wait(SOON)
    until(lambda: load(engine, task_id).state == "completed")


def test_a_cancellation_beside_a_completion_waits_for_it(engine, make_worker):
    """Whoever is first wins, and the other learns of it."""
    completing, go_on = threading.Event(), threading.Event()
    worker = make_worker()

    def process(task: RunningTask) -> None:
        task.session.execute(sa.text("SELECT 1"))

        @sa.event.listens_for(task.session, "before_commit")
        def hold(_session: Session) -> None:
            completing.set()  # the completion is written, and not yet committed
            go_on.wait(SOON)

    worker.use("t", process)
    worker.start()
    task_id = add(engine)
    assert completing.wait(SOON)
    answers: list[bool] = []
    caller = threading.Thread(target=lambda: answers.append(cancel(engine, task_id)))
    caller.start()
    waits = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")

    def is_waited_for() -> bool:
        with engine.connect() as connection:
            return bool(connection.scalar(waits))

    until(is_waited_for)
    go_on.set()
    caller.join(SOON)

    assert answers == [False]
    assert load(engine, task_id).state == "completed"


@pytest.mark.parametrize("turn", range(4))
def test_of_a_cancellation_and_a_completion_one_wins(engine, make_worker, turn):
    worker = make_worker()
    worker.use(
        "t", lambda task: task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
    )
    task_ids = [add(engine) for _ in range(25)]
    worker.start()

    cancelled = {task_id for task_id in task_ids if cancel(engine, task_id)}

    until(lambda: all(load(engine, task_id).state in {"completed", "cancelled"} for task_id in task_ids))
    worker.stop()
    with engine.connect() as connection:
        effects = set(connection.scalars(sa.text("SELECT task_id FROM ledger")))
    assert effects == set(task_ids) - cancelled
