"""Working tasks: claim, run, settle."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import UTC, datetime, timedelta

import probe
import pytest
import sqlalchemy as sa
from claims import asked, hold_lease
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq import (
    AsyncRunningTask,
    Cancel,
    Fail,
    Queue,
    Retry,
    RunningTask,
    SessionMisused,
    Snooze,
    Task,
    Worker,
    prepare,
)
from apoq.schema.statements.claim import ID, claim

SOON = 10.0
"""Seconds within which what a test waits for has long happened."""

until = patience(SOON)


def add(engine, type_="t", data=None, queue=None, **options) -> int:
    with Session(engine) as session, session.begin():
        return (queue or Queue()).add(session, type_, data, **options).id


def load(engine, task_id: int) -> Task:
    with Session(engine) as session:
        return session.get(Task, task_id)


def states(engine) -> dict[str, int]:
    with engine.connect() as connection:
        return dict(connection.execute(sa.select(Task.state, sa.func.count()).group_by(Task.state)).all())


def ledger(engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT task_id FROM ledger ORDER BY task_id")))


def write(task: RunningTask) -> None:
    task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})


def fail(_task: object) -> None:
    raise ValueError("no luck")


class TestWork:
    """One due task at a time."""

    def test_it_works_one_due_task_and_answers_it(self, engine, worker):
        ran = []
        worker.use("t", lambda task: ran.append(task.data))
        first, second = add(engine, data=1), add(engine, data=2)

        task = worker.work()

        assert (task.id, task.state, ran) == (first, "completed", [1])
        assert load(engine, second).state == "pending"

    def test_it_answers_none_where_nothing_is_due(self, engine, worker):
        worker.use("t", fail)
        add(engine, delay=timedelta(hours=1))

        assert worker.work() is None

    def test_the_oldest_comes_first(self, engine, worker):
        ran = []
        worker.use("t", lambda task: ran.append(task.data))
        now = datetime.now(UTC)
        for minutes in (2, 3, 1):
            add(engine, data=minutes, process_at=now - timedelta(minutes=minutes))

        while worker.work():
            pass

        assert ran == [3, 2, 1]

    def test_a_higher_priority_comes_first(self, engine, worker):
        ran = []
        worker.use("t", lambda task: ran.append(task.data))
        for priority in (0, -5, 10):
            add(engine, data=priority, priority=priority)

        while worker.work():
            pass

        assert ran == [10, 0, -5]

    def test_future_tasks_of_a_higher_priority_do_not_hide_due_ones(self, engine, worker):
        worker.use("t", lambda task: None)
        add(engine, priority=10, delay=timedelta(hours=1))
        due = add(engine, priority=1)

        assert worker.work().id == due

    def test_a_type_that_is_not_configured_waits_untouched(self, engine, worker):
        worker.use("t", fail)
        other = add(engine, "other")

        assert worker.work() is None
        assert (load(engine, other).state, load(engine, other).attempt) == ("pending", 0)

    def test_a_worker_without_processors_works_nothing(self, engine, worker):
        add(engine)

        assert worker.work() is None

    def test_a_queue_is_worked_by_its_own_workers(self, engine, make_worker):
        emails = Queue("emails")
        of_default, of_emails = make_worker(), make_worker(emails)
        for each in (of_default, of_emails):
            each.use("t", lambda task: None)
        task_id = add(engine, queue=emails)

        assert of_default.work() is None
        assert of_emails.work().id == task_id

    def test_a_worker_of_several_queues_starves_none(self, engine, make_worker):
        a, b = Queue("a"), Queue("b")
        worker = make_worker(a, b)
        worker.use("t", lambda task: None)
        for _ in range(4):
            add(engine, queue=a)
        add(engine, queue=b)

        worked = [worker.work().queue for _ in range(2)]

        assert sorted(worked) == ["a", "b"]

    def test_a_queue_in_a_schema_is_worked_there(self, engine, make_worker):
        prepare(engine, schema="my Jobs")
        queue = Queue("emails", schema="my Jobs")
        worker = make_worker(queue)
        worker.use("t", lambda task: None)
        add(engine, queue=queue)

        task = worker.work()

        assert (task.state, type(task)) == ("completed", queue.task_class)

    def test_a_processor_gets_the_task(self, engine, worker):
        got = []
        worker.use("t", got.append)
        task_id = add(engine, data={"color": "💖"}, priority=3)

        worker.work()

        (task,) = got
        assert (task.id, task.type, task.data, task.fail_count) == (task_id, "t", {"color": "💖"}, 0)
        assert (task.attempt, task.queue, task.priority) == (1, "default", 3)
        assert task.created_at <= task.process_at <= datetime.now(UTC) + timedelta(minutes=1)

    def test_the_times_are_those_of_the_claim_and_of_the_end(self, engine, worker):
        worker.use("t", lambda task: time.sleep(0.05))
        add(engine)

        task = worker.work()

        assert timedelta(milliseconds=50) <= task.completed_at - task.claimed_at < timedelta(seconds=5)

    def test_a_coroutine_function_is_awaited(self, engine, worker):
        ran = []

        async def process(task: AsyncRunningTask) -> None:
            await asyncio.sleep(0)
            ran.append(task.id)

        worker.use("t", process)
        task_id = add(engine)

        assert worker.work().state == "completed"
        assert ran == [task_id]

    def test_no_transaction_is_open_while_a_processor_runs(self, engine, worker):
        def process(_task: RunningTask) -> None:
            with engine.connect() as connection:
                open_.extend(
                    connection.scalars(
                        sa.text(
                            "SELECT state FROM pg_stat_activity WHERE datname = current_database() "
                            "AND state LIKE 'idle in transaction%'"  # a heartbeat may be under way
                        )
                    )
                )

        open_: list[str] = []
        worker.use("t", process)
        add(engine)

        worker.work()

        assert open_ == []

    def test_several_threads_may_work_at_once(self, engine, worker):
        worker.use("t", write)
        ids = [add(engine) for _ in range(40)]

        def work() -> None:
            while worker.work():
                pass

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert ledger(engine) == ids
        assert states(engine) == {"completed": 40}


class TestRetries:
    def test_a_failure_is_tried_again_after_a_delay(self, engine, worker):
        worker.use("t", fail, retry_delay=lambda fail_count: timedelta(minutes=fail_count))
        add(engine)

        task = worker.work()

        assert (task.state, task.fail_count, task.attempt) == ("pending", 1, 1)
        assert timedelta(seconds=55) < task.process_at - task.failed_at <= timedelta(seconds=60)

    def test_the_last_error_is_kept(self, engine, worker):
        worker.use("t", fail)
        add(engine)

        error = worker.work().error

        assert (error["class"], error["message"]) == ("ValueError", "no luck")
        assert 'raise ValueError("no luck")' in error["traceback"]

    def test_six_attempts_are_made_by_default(self, engine, worker):
        attempts = []

        def process(task: RunningTask) -> None:
            attempts.append((task.attempt, task.fail_count))
            fail(task)

        worker.use("t", process, retry_delay=lambda fail_count: 0)
        task_id = add(engine)

        while worker.work():
            pass

        assert attempts == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5)]
        assert (load(engine, task_id).state, load(engine, task_id).fail_count) == ("failed", 6)

    def test_the_default_delay_is_exponential_with_jitter(self, engine, worker):
        worker.use("t", fail)
        ids = [add(engine) for _ in range(5)]
        for _ in ids:
            worker.work()

        waits = [load(engine, id_).process_at - load(engine, id_).failed_at for id_ in ids]

        assert all(timedelta(seconds=0.9) < wait < timedelta(seconds=2.1) for wait in waits)

    def test_no_retry_where_the_type_has_none(self, engine, worker):
        worker.use("t", fail, retry_limit=0)
        add(engine)

        assert worker.work().state == "failed"

    def test_a_task_may_have_a_limit_and_a_delay_of_its_own(self, engine, worker):
        worker.use("t", fail)
        add(engine, retry_limit=1, retry_delay=0)

        assert worker.work().state == "pending"
        assert worker.work().state == "failed"

    def test_a_success_after_failures_keeps_their_count(self, engine, worker):
        def process(task: RunningTask) -> None:
            if task.fail_count < 2:
                fail(task)

        worker.use("t", process, retry_delay=lambda fail_count: 0)
        add(engine)

        tasks = [worker.work() for _ in range(3)]

        assert [task.state for task in tasks] == ["pending", "pending", "completed"]
        assert (tasks[-1].fail_count, tasks[-1].attempt, tasks[-1].claim_token) == (2, 3, 3)


class TestOutcomes:
    """A processor chooses what becomes of its task by raising."""

    def run(self, engine, worker, outcome: BaseException, **options) -> Task:
        def process(_task: RunningTask) -> None:
            raise outcome

        worker.use("t", process, **options)
        add(engine)
        return worker.work()

    def test_retry_after_a_delay_of_its_own(self, engine, worker):
        task = self.run(engine, worker, Retry("busy", delay=timedelta(hours=1)))

        assert (task.state, task.fail_count, task.error["message"]) == ("pending", 1, "busy")
        assert timedelta(minutes=59) < task.process_at - task.failed_at < timedelta(minutes=61)

    @pytest.mark.parametrize("error", [Fail("wrong"), ValueError("wrong")], ids=["Fail", "ValueError"])
    def test_fail_is_final_although_there_are_attempts_left(self, engine, worker, error):
        failed = []
        worker.events.on("task.failed", lambda task, error: failed.append(task.id))

        task = self.run(engine, worker, error, retry_limit=5)

        is_final = isinstance(error, Fail)
        assert (task.state, task.fail_count) == ("failed" if is_final else "pending", 1)
        assert len(failed) == is_final
        assert (task.error["class"], task.error["message"]) == (type(error).__name__, "wrong")

    def test_retry_uses_up_attempts(self, engine, worker):
        assert self.run(engine, worker, Retry(delay=1), retry_limit=0).state == "failed"

    def test_cancel(self, engine, worker):
        task = self.run(engine, worker, Cancel("no such user"))

        assert (task.state, task.error["message"], task.fail_count) == ("cancelled", "no such user", 0)
        assert task.cancelled_at is not None

    def test_snooze_uses_no_attempt(self, engine, worker):
        task = self.run(engine, worker, Snooze(60))

        assert (task.state, task.fail_count, task.attempt, task.error) == ("pending", 0, 0, None)
        assert task.process_at > datetime.now(UTC) + timedelta(seconds=30)

    def test_a_token_grows_even_where_an_attempt_is_taken_back(self, engine, worker):
        assert self.run(engine, worker, Snooze(0)).claim_token == 1
        assert worker.work().claim_token == 2


class TestTaskSession:
    """The processor's writes and the completion commit together, or not at all."""

    def test_a_write_and_the_completion_are_committed(self, engine, worker):
        worker.use("t", write)
        task_id = add(engine)

        assert worker.work().state == "completed"
        assert ledger(engine) == [task_id]

    def test_no_write_is_committed_if_the_processor_raises(self, engine, worker):
        def process(task: RunningTask) -> None:
            write(task)
            fail(task)

        worker.use("t", process)
        add(engine)

        assert worker.work().state == "pending"
        assert ledger(engine) == []

    def test_no_write_is_committed_if_the_task_was_taken_away(self, engine, worker):
        def process(task: RunningTask) -> None:
            write(task)
            with engine.begin() as connection:
                connection.execute(sa.update(Task).values(state="pending", claim_token=Task.claim_token + 1))

        worker.use("t", process)
        add(engine)

        assert worker.work().state == "pending"
        assert ledger(engine) == []

    def test_what_is_pending_in_the_session_is_flushed(self, engine, worker):
        worker.use("t", lambda task: task.session.add(Task(type="next")))
        add(engine)

        worker.work()

        assert states(engine) == {"completed": 1, "pending": 1}

    def test_a_processor_enqueues_in_its_own_transaction(self, engine, worker, queue):
        def process(task: RunningTask) -> None:
            queue.add(task.session, "next")
            fail(task)

        worker.use("t", process)
        add(engine)

        worker.work()

        assert states(engine) == {"pending": 1}

    def test_the_asyncio_twin(self, engine, worker):
        async def process(task: AsyncRunningTask) -> None:
            assert isinstance(task.session, AsyncSession)
            await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
            if task.fail_count == 0:
                fail(task)

        worker.use("t", process, retry_delay=lambda fail_count: 0)
        task_id = add(engine)

        assert worker.work().state == "pending"
        assert ledger(engine) == []
        assert worker.work().state == "completed"
        assert ledger(engine) == [task_id]

    def test_a_worker_on_an_async_engine(self, engine, url):
        worker = Worker(create_async_engine(url))
        worker.use("t", write)
        task_id = add(engine)

        assert worker.work().state == "completed"
        assert ledger(engine) == [task_id]

    def test_a_commit_by_the_processor_is_refused(self, engine, worker):
        def process(task: RunningTask) -> None:
            write(task)
            task.session.commit()

        worker.use("t", process)
        add(engine)

        assert worker.work().error["class"] == SessionMisused.__name__
        assert ledger(engine) == []

    @pytest.mark.parametrize(
        "end",
        [
            lambda task: Queue().cancel(task.session, task.id),
            lambda task: task.session.delete(task.session.get(Task, task.id)),
            lambda task: setattr(task.session.get(Task, task.id), "state", "completed"),
            lambda task: setattr(task.session.get(Task, task.id), "claim_token", 0),
        ],
        ids=["cancel", "delete", "state", "claim_token"],
    )
    def test_a_processor_may_not_end_its_task_there(self, engine, worker, end):
        def process(task: RunningTask) -> None:
            write(task)
            end(task)

        worker.use("t", process)
        add(engine)

        assert worker.work().error["class"] == SessionMisused.__name__
        assert ledger(engine) == []

    def test_a_processor_may_change_other_columns_of_its_task_there(self, engine, worker):
        def process(task: RunningTask) -> None:
            row = task.session.get(Task, task.id)
            row.data, row.priority = {"progress": 100}, 5

        worker.use("t", process)
        task_id = add(engine)

        assert worker.work().state == "completed"
        with Session(engine) as session:
            row = session.get(Task, task_id)
            assert (row.state, row.data, row.priority) == ("completed", {"progress": 100}, 5)

    def test_a_savepoint_is_not_a_commit(self, engine, worker):
        def process(task: RunningTask) -> None:
            with task.session.begin_nested():
                write(task)

        worker.use("t", process)
        task_id = add(engine)

        assert worker.work().state == "completed"
        assert ledger(engine) == [task_id]

    def test_a_with_block_does_not_close_it(self, engine, worker):
        def process(task: RunningTask) -> None:
            with task.session:
                write(task)

        worker.use("t", process)
        task_id = add(engine)

        worker.work()

        assert ledger(engine) == [task_id]

    def test_no_connection_is_held_unless_it_is_used(self, engine, worker):
        held = []
        worker.use("t", lambda task: held.append(engine.pool.checkedout()))
        add(engine)

        worker.work()

        assert held == [0]

    def test_every_connection_goes_back_to_the_pool(self, engine, worker):
        def process(task: RunningTask) -> None:
            write(task)
            if task.data:
                fail(task)

        worker.use("t", process)
        for data in (False, True):
            add(engine, data=data)
            worker.work()

        assert engine.pool.checkedout() == 0

    def test_a_constraint_that_fails_at_commit_fails_the_attempt(self, engine, worker):
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "ALTER TABLE ledger ADD CONSTRAINT once UNIQUE (task_id) DEFERRABLE INITIALLY DEFERRED"
            )

        def process(task: RunningTask) -> None:
            write(task)
            write(task)

        worker.use("t", process)
        add(engine)

        task = worker.work()

        assert (task.state, task.error["class"]) == ("pending", "IntegrityError")
        assert ledger(engine) == []


class TestEvents:
    def test_completed_comes_after_the_commit(self, engine, worker):
        heard = []
        worker.events.on("task.completed", lambda task: heard.append((task, load(engine, task.id).state)))
        worker.use("t", write)
        worker.use("plain", lambda task: None)
        add(engine, data={"color": "💖"})
        add(engine, "plain")

        worker.work(), worker.work()

        assert [state for _, state in heard] == ["completed", "completed"]
        task, _ = heard[0]
        assert isinstance(task, Task)
        assert (task.type, task.data, task.state) == ("t", {"color": "💖"}, "completed")
        assert task.completed_at > task.created_at

    def test_failed_is_for_final_failures_only(self, engine, worker):
        heard = []
        for name in ("task.failed", "task.retried"):
            worker.events.on(
                name, lambda task, error, name=name: heard.append((name, task.fail_count, str(error)))
            )
        worker.use("t", fail, retry_limit=1, retry_delay=lambda fail_count: 0)
        add(engine)

        worker.work(), worker.work()

        assert heard == [("task.retried", 1, "no luck"), ("task.failed", 2, "no luck")]

    def test_a_snooze_and_a_cancellation_are_neither(self, engine, worker):
        heard = []
        for name in ("task.completed", "task.failed", "task.retried"):
            worker.events.on(name, lambda *arguments: heard.append(arguments))

        def process(task: RunningTask) -> None:
            raise Snooze(0) if task.claim_token == 1 else Cancel

        worker.use("t", process)
        add(engine)

        worker.work(), worker.work()

        assert heard == []
        assert states(engine) == {"cancelled": 1}


class TestStartAndStop:
    def test_tasks_are_worked_in_the_background_until_it_stops(self, engine, worker):
        done = threading.Event()
        worker.use("t", lambda task: done.set())
        worker.start()
        add(engine)

        assert done.wait(SOON)
        worker.stop()
        later = add(engine)
        assert load(engine, later).state == "pending"
        assert states(engine) == {"completed": 1, "pending": 1}

    def test_starting_and_stopping_twice_is_harmless(self, engine, worker):
        worker.stop()
        worker.start()
        worker.start()
        worker.stop()
        worker.stop()

        assert not [
            thread for thread in threading.enumerate() if thread.name.startswith(("apoq-c", "apoq-s"))
        ]

    def test_it_can_start_again(self, engine, worker):
        done = threading.Semaphore(0)
        worker.use("t", lambda task: done.release())
        for _ in range(3):
            add(engine)
            worker.start()
            assert done.acquire(timeout=SOON)
            worker.stop()

        assert states(engine) == {"completed": 3}

    def test_stop_waits_for_what_runs(self, engine, worker):
        begun, may_end = threading.Event(), threading.Event()

        def process(_task: RunningTask) -> None:
            begun.set()
            may_end.wait(SOON)

        worker.use("t", process)
        task_id = add(engine)
        worker.start()
        begun.wait(SOON)
        stopping = threading.Thread(target=worker.stop)
        stopping.start()

        assert load(engine, task_id).state == "running"
        may_end.set()
        stopping.join(SOON)
        assert load(engine, task_id).state == "completed"

    def test_what_never_ends_is_given_back_at_the_deadline(self, engine, worker):
        begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

        def process(_task: RunningTask) -> None:
            begun.set()
            may_end.wait(SOON)
            ended.set()

        worker.use("t", process)
        task_id = add(engine)
        worker.start()
        begun.wait(SOON)

        worker.stop(timeout=0.05)

        task = load(engine, task_id)
        assert (task.state, task.attempt, task.fail_count) == ("pending", 0, 0)
        may_end.set()
        assert ended.wait(SOON)
        assert load(engine, task_id).state == "pending"

    def test_a_task_that_was_given_back_can_run_again_beside_its_first_run(self, engine, worker):
        begun, may_end, ended = threading.Semaphore(0), threading.Event(), threading.Semaphore(0)

        def process(_task: RunningTask) -> None:
            begun.release()
            may_end.wait(SOON)
            ended.release()

        worker.use("t", process)
        task_id = add(engine)
        worker.start()
        begun.acquire(timeout=SOON)
        worker.stop(timeout=0.05)
        worker.start()
        begun.acquire(timeout=SOON)
        may_end.set()
        for _ in range(2):
            assert ended.acquire(timeout=SOON)
        worker.stop()

        task = load(engine, task_id)
        assert (task.state, task.attempt, task.claim_token) == ("completed", 1, 2)
        assert probe.executor(worker).free == 4

    def test_a_coroutine_that_never_ends_is_cancelled_and_given_back(self, engine, worker):
        begun, cancelled = threading.Event(), threading.Event()

        async def process(_task: AsyncRunningTask) -> None:
            begun.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        worker.use("t", process)
        task_id = add(engine)
        worker.start()
        begun.wait(SOON)

        worker.stop(timeout=0.05)

        assert cancelled.wait(SOON)
        task = load(engine, task_id)
        assert (task.state, task.attempt, task.fail_count) == ("pending", 0, 0)

    def test_what_was_claimed_and_has_not_begun_is_given_back(self, engine, make_worker):
        worker = make_worker(concurrency=1)
        begun, may_end = threading.Event(), threading.Event()

        def process(task: RunningTask) -> None:
            if task.data == "long":
                begun.set()
                may_end.wait(SOON)

        worker.use("t", process)
        for n in range(600):
            add(engine, data="long" if n == 200 else "short")
        worker.start()
        begun.wait(SOON)
        assert states(engine)["running"] > 1
        stopping = threading.Thread(target=worker.stop)
        stopping.start()

        # At once, and not when the long one has ended.
        until(lambda: states(engine)["running"] == 1)
        may_end.set()
        stopping.join(SOON)
        with engine.connect() as connection:
            used = connection.scalar(
                sa.text("SELECT count(*) FROM apoq_tasks WHERE state = 'pending' AND attempt > 0")
            )
        assert used == 0

    def test_coroutines_run_on_the_applications_loop(self, engine, worker):
        async def main() -> bool:
            mine, loops, done = asyncio.get_running_loop(), [], asyncio.Event()

            async def process(task: AsyncRunningTask) -> None:
                loops.append(asyncio.get_running_loop())
                await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
                done.set()

            worker.use("t", process)
            await asyncio.to_thread(add, engine)
            worker.start(loop=mine)
            await asyncio.wait_for(done.wait(), SOON)
            with pytest.raises(RuntimeError, match="to_thread"):
                worker.stop()
            await asyncio.to_thread(worker.stop)
            return loops == [mine]

        assert asyncio.run(main())
        assert states(engine) == {"completed": 1}
        assert len(ledger(engine)) == 1

    def test_slots_that_need_a_loop_at_once_begin_one(self, engine, make_worker):
        """An asyncio engine serves one only."""
        size = 16
        worker = make_worker(concurrency=size)
        together, loops, ended = threading.Barrier(size), [], threading.Semaphore(0)

        def plain(_task: RunningTask) -> None:
            together.wait(SOON)

        async def coroutine(_task: AsyncRunningTask) -> None:
            loops.append(asyncio.get_running_loop())
            ended.release()

        worker.use("plain", plain)
        worker.use("coroutine", coroutine)
        for _ in range(20):
            loops.clear()
            with Session(engine) as session, session.begin():
                Queue().add_many(session, "plain", [None] * size, priority=1)
                Queue().add_many(session, "coroutine", [None] * size)
            worker.start()
            for _ in range(size):
                assert ended.acquire(timeout=SOON)
            worker.stop()
            assert len(set(loops)) == 1

    @pytest.mark.parametrize("kind", ["plain", "coroutine", "both"])
    def test_no_more_tasks_run_at_once_than_concurrency_allows(self, engine, make_worker, kind):
        worker = make_worker(concurrency=3)
        lock, running, most, left = threading.Lock(), 0, 0, threading.Semaphore(0)

        def count(step: int) -> None:
            nonlocal running, most
            with lock:
                running += step
                most = max(most, running)

        def plain(_task: RunningTask) -> None:
            count(1)
            time.sleep(0.005)
            count(-1)
            left.release()

        async def coroutine(_task: AsyncRunningTask) -> None:
            count(1)
            await asyncio.sleep(0.005)
            count(-1)
            left.release()

        worker.use("plain", plain)
        worker.use("coroutine", coroutine)
        types = ["plain", "coroutine"] if kind == "both" else [kind]
        for n in range(60):
            add(engine, types[n % len(types)])
        worker.start()
        for _ in range(60):
            assert left.acquire(timeout=SOON)
        worker.stop()

        assert most == 3
        assert states(engine) == {"completed": 60}

    def test_every_task_runs_once_beside_other_workers(self, engine, make_worker):
        workers = [make_worker() for _ in range(3)]
        done = threading.Semaphore(0)
        for worker in workers:
            worker.use("t", write)
            worker.events.on("task.completed", lambda task: done.release())
        with Session(engine) as session, session.begin():
            Queue().add_many(session, "t", range(300))
        for worker in workers:
            worker.start()
        for _ in range(300):
            assert done.acquire(timeout=SOON)

        assert len(ledger(engine)) == len(set(ledger(engine))) == 300
        assert states(engine) == {"completed": 300}

    def test_every_task_runs_once_beside_a_program_that_writes_to_those_that_wait(self, engine, make_worker):
        workers = [make_worker() for _ in range(2)]
        done = threading.Semaphore(0)
        for worker in workers:
            worker.use("t", write)
            worker.events.on("task.completed", lambda task: done.release())
        with Session(engine) as session, session.begin():
            Queue().add_many(session, "t", range(2_000))
        over = threading.Event()

        def meddle() -> None:
            touch = "UPDATE apoq_tasks SET retry_limit = {} WHERE state = 'pending' AND mod(id, 7) = {}"
            while not over.is_set():
                for number in range(7):
                    with engine.begin() as connection:
                        connection.exec_driver_sql(touch.format(number, number))

        meddler = threading.Thread(target=meddle)
        meddler.start()
        for worker in workers:
            worker.start()
        for _ in range(2_000):
            assert done.acquire(timeout=SOON)
        over.set()
        meddler.join()

        assert len(ledger(engine)) == len(set(ledger(engine))) == 2_000
        assert states(engine) == {"completed": 2_000}

    @pytest.mark.parametrize("where", ["processor", "listener"])
    def test_stopping_from_within_is_refused_and_not_waited_for(self, engine, worker, where):
        errors, done = [], threading.Event()

        def stop(_task: object) -> None:
            try:
                worker.stop()
            except RuntimeError as error:
                errors.append(str(error))
            done.set()

        worker.use("t", stop if where == "processor" else lambda task: None)
        if where == "listener":
            worker.events.on("task.completed", stop)
        add(engine)
        worker.start()

        assert done.wait(SOON)
        assert "this is one of them" in errors[0]

    def test_run_refuses_to_handle_signals_on_another_thread(self, worker):
        errors = []

        def run() -> None:
            try:
                worker.run()
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(SOON)

        assert "call start and stop" in errors[0]

    def test_starting_touches_no_signals(self, worker):
        import signal

        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        worker.start()
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

        assert before == after

    def test_a_worker_is_listed_while_it_is_at_work(self, engine, make_worker):
        worker = make_worker(Queue("emails"), concurrency=2)
        worker.start()
        with engine.connect() as connection:
            (row,) = connection.execute(sa.text("SELECT * FROM apoq_workers")).mappings().all()
        worker.stop()
        with engine.connect() as connection:
            left = connection.scalar(sa.text("SELECT count(*) FROM apoq_workers"))

        assert (row["queues"], row["concurrency"], left) == (["emails"], 2, 0)


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_worker_works_on_an_engine_at_any_isolation_level(url, engine, level):
    strict = sa.create_engine(url, isolation_level=level, pool_size=1, max_overflow=0)
    workers = [Worker(strict) for _ in range(2)]
    done = threading.Semaphore(0)
    for worker in workers:
        worker.use("t", lambda task: done.release())
        worker.start()
    for _ in range(50):
        add(engine)
    for _ in range(50):
        assert done.acquire(timeout=SOON)
    for worker in workers:
        worker.stop()
    strict.dispose()

    assert states(engine) == {"completed": 50}


def test_the_search_path_of_the_engine_is_the_workers(url, engine):
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA tenant")
        connection.exec_driver_sql(f'ALTER DATABASE "{url.database}" SET search_path = public')
    tenant = sa.create_engine(url)

    @sa.event.listens_for(tenant, "connect")
    def set_search_path(connection, _record) -> None:
        connection.execute("SET search_path = tenant")
        connection.commit()

    prepare(tenant, schema="tenant")  # by its name, because there are tables in another schema
    worker = Worker(tenant)
    worker.use("t", lambda task: None)
    add(tenant)

    assert worker.work().state == "completed"
    assert states(engine) == {}
    tenant.dispose()


def test_claims_under_way_at_once_pass_over_each_others_tasks(engine):
    ids = [add(engine) for _ in range(4)]

    with engine.begin() as one, engine.begin() as other:
        other.exec_driver_sql("SET LOCAL lock_timeout = '2s'")
        claimed = [sorted(connection.scalars(claim(None), asked(at_most=2))) for connection in (one, other)]

    assert claimed == [ids[:2], ids[2:]]


def test_what_a_dead_worker_held_is_claimed_only_where_it_can_begin_at_once(engine, worker):
    """It may kill this one, too, and is to take nothing with it that merely waited."""
    worker.use("t", fail)
    fresh, rescued = add(engine), add(engine)
    with engine.begin() as connection:
        connection.execute(sa.update(Task).where(Task.id == rescued).values(rescue_count=1))
    hold_lease(worker)

    more_than_find_a_slot, all_find_one = probe.claim(worker, 3, 2), probe.claim(worker, 3, 3)
    probe.own_engine(worker).dispose()

    assert [row[ID] for row in more_than_find_a_slot] == [fresh]
    assert [row[ID] for row in all_find_one] == [rescued]
    assert not load(engine, rescued).prefetched


@pytest.mark.parametrize(("free", "is_ahead"), [(0, True), (1, True), (2, False), (3, False)])
def test_tasks_are_claimed_ahead_if_there_are_more_of_them_than_free_slots(engine, worker, free, is_ahead):
    worker.use("t", fail)
    ids = [add(engine) for _ in range(2)]
    hold_lease(worker)

    probe.claim(worker, 1_000, free)
    probe.own_engine(worker).dispose()

    assert [load(engine, task_id).prefetched for task_id in ids] == [is_ahead] * 2


def test_a_claim_can_be_printed():
    assert "FOR UPDATE SKIP LOCKED" in str(claim(None).compile(dialect=sa.dialects.postgresql.dialect()))
