"""Attempts that take longer than they may."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import timedelta

import probe
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import AsyncRunningTask, Queue, RunningTask, Task
from apoq.events import TaskReleased
from apoq.schema.statements.claim import ID
from apoq.worker.execution.event_loop import CANCELLATION_SECONDS

SOON = 10.0
"""Seconds within which what a test waits for has long happened."""

until = patience(SOON)

LONG = 3600.0


def add(engine, data=None, type_="t", **options) -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, type_, data, **options).id


def load(engine, task_id: int) -> Task:
    with Session(engine) as session:
        return session.get(Task, task_id)


def ledger(engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT task_id FROM ledger ORDER BY task_id")))


def write(task: RunningTask) -> None:
    task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})


def now(_fail_count: int) -> float:
    return 0


def failed(engine, task_id: int, times: int = 1) -> bool:
    task = load(engine, task_id)
    return task.fail_count == times and task.error["class"] == "TimeoutError"


class TestCoroutines:
    def test_one_over_its_limit_is_cancelled_and_fails_the_attempt(self, engine, worker):
        ended = []

        async def dawdle(_task: AsyncRunningTask) -> None:
            try:
                await asyncio.sleep(LONG)
            finally:
                ended.append(True)

        worker.use("t", dawdle, timeout=0.05)
        add(engine)

        task = worker.work()

        assert (task.state, task.attempt, task.fail_count, ended) == ("pending", 1, 1, [True])
        assert task.error["class"] == "TimeoutError"
        assert task.error["message"] == "ran longer than its timeout of 0.05 s"
        assert "in dawdle" in task.error["traceback"]

    def test_one_that_ends_in_time_is_completed(self, engine, worker):
        async def process(task: AsyncRunningTask) -> None:
            await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

        worker.use("t", process, timeout=timedelta(seconds=LONG))
        task_id = add(engine)

        assert worker.work().state == "completed"
        assert ledger(engine) == [task_id]
        assert probe.limited_attempts(worker) == ({}, set())

    def test_a_timeout_of_its_own_is_its_own(self, engine, worker):
        async def process(_task: AsyncRunningTask) -> None:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(LONG)

        worker.use("t", process, timeout=LONG)
        add(engine)

        assert worker.work().error["message"] == ""

    @pytest.mark.parametrize("late", ["returns", "raises"])
    def test_what_it_makes_of_the_cancellation_is_refused(self, engine, worker, late):
        seen = []

        async def swallow(task: AsyncRunningTask) -> None:
            await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
            try:
                await asyncio.sleep(LONG)
            except asyncio.CancelledError:
                seen.append(task.should_stop)
                if late == "raises":
                    raise ValueError("in the middle of it") from None

        worker.use("t", swallow, timeout=0.3)
        add(engine)

        task = worker.work()

        assert (task.state, task.fail_count, task.error["class"]) == ("pending", 1, "TimeoutError")
        assert ("in the middle of it" in task.error["traceback"]) == (late == "raises")
        assert (ledger(engine), seen) == ([], [True])

    @pytest.mark.parametrize("how", ["swallows", "blocks"])
    def test_one_that_takes_no_notice_has_failed_all_the_same(self, engine, worker, how):
        told, may_end = [], threading.Event()

        async def ignore(task: AsyncRunningTask) -> None:
            if task.attempt == 1:
                while not may_end.is_set():
                    if how == "blocks":
                        may_end.wait(SOON)
                    with suppress(asyncio.CancelledError):
                        await asyncio.sleep(0.01)
            await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

        worker.use("t", ignore, timeout=2, retry_delay=now)
        worker.events.on("task.completed", lambda task: told.append("completed"))
        worker.events.on("task.retried", lambda task, error: told.append(str(error)))
        task_id = add(engine)
        worker.start()

        began = time.monotonic()
        until(lambda: failed(engine, task_id))
        took = time.monotonic() - began
        may_end.set()
        until(lambda: load(engine, task_id).state == "completed")
        worker.stop()

        assert took >= CANCELLATION_SECONDS
        assert (load(engine, task_id).attempt, ledger(engine)) == (2, [task_id])
        assert told == ["ran longer than its timeout of 2 s", "completed"]
        assert probe.executor(worker).free == 4


class TestFunctions:
    def test_one_over_its_limit_has_failed_while_it_still_runs(self, engine, worker):
        seen = []

        def dawdle(task: RunningTask) -> None:
            seen.append(task.should_stop)
            until(lambda: failed(engine, task.id))
            seen.append(task.should_stop)

        worker.use("t", dawdle, timeout=0.05)
        add(engine)

        task = worker.work()

        assert (task.state, task.attempt, task.fail_count, seen) == ("pending", 1, 1, [False, True])
        assert task.error["message"] == "ran longer than its timeout of 0.05 s"

    def test_the_error_tells_where_it_was(self, engine, worker):
        def wait_for_the_service(task: RunningTask) -> None:
            until(lambda: failed(engine, task.id))

        worker.use("t", wait_for_the_service, timeout=0.05)
        add(engine)

        assert "in wait_for_the_service" in worker.work().error["traceback"]

    def test_the_retry_runs_beside_it_and_its_late_result_is_refused(self, engine, worker):
        told, completed, late = [], threading.Event(), threading.Event()

        def process(task: RunningTask) -> None:
            write(task)
            if task.attempt == 1:
                completed.wait(SOON)
                late.set()

        worker.use("t", process, timeout=0.1, retry_delay=now)
        worker.events.on("task.retried", lambda task, error: told.append(type(error)))
        worker.events.on("task.completed", lambda task: (told.append("completed"), completed.set()))
        task_id = add(engine)
        worker.start()
        assert late.wait(SOON)
        worker.stop()

        task = load(engine, task_id)
        assert (task.state, task.attempt, task.fail_count) == ("completed", 2, 1)
        assert ledger(engine) == [task_id]
        assert told == [TimeoutError, "completed"]
        assert probe.executor(worker).free == 4

    @pytest.mark.parametrize("late", ["returns", "writes", "raises"])
    def test_whatever_it_comes_to_late_is_refused(self, engine, worker, late, caplog):
        told, ended = [], threading.Event()

        def process(task: RunningTask) -> None:
            if late == "writes":
                write(task)
            until(lambda: failed(engine, task.id))
            ended.set()
            if late == "raises":
                raise ValueError("too late")

        worker.use("t", process, timeout=0.05, retry_limit=0)
        worker.events.on("task.completed", told.append)
        worker.events.on("task.failed", lambda task, error: told.append(type(error)))
        task_id = add(engine)
        worker.start()
        assert ended.wait(SOON)
        worker.stop()

        task = load(engine, task_id)
        assert (task.state, task.fail_count, task.error["class"]) == ("failed", 1, "TimeoutError")
        assert (ledger(engine), told) == ([], [TimeoutError])
        assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
            f"task {task_id} (t) failed for good, with failure 1"
        ]

    def test_its_task_is_held_until_its_failure_is_written(self, engine, worker, caplog):
        """Or nobody would find it, if the worker died between its late return and that."""
        caplog.set_level("INFO", "apoq")
        returns = threading.Event()
        worker.use("t", lambda task: returns.wait(SOON), retry_limit=0)
        task_id = add(engine, timeout=timedelta(seconds=0.3))
        worker.start()
        until(lambda: load(engine, task_id).state == "running")
        with engine.connect() as holding:
            holding.execute(sa.select(Task.id).where(Task.id == task_id).with_for_update())
            until(lambda: probe.put_off_count(worker))
            returns.set()
            until(lambda: "returned after its timeout" in caplog.text)

            assert [row[ID] for row in probe.claim_log(worker).held()] == [task_id]
            assert probe.has_settled_claims(worker)

        until(lambda: failed(engine, task_id))
        until(lambda: not probe.has_settled_claims(worker))

    def test_its_slot_stays_taken_until_it_returns(self, engine, make_worker):
        worker = make_worker(concurrency=1)
        order, may_end = [], threading.Event()

        def process(task: RunningTask) -> None:
            if task.data == "first":
                may_end.wait(SOON)
            order.append(task.data)

        worker.use("t", process, timeout=0.05, retry_limit=0)
        first = add(engine, "first")
        worker.start()
        until(lambda: failed(engine, first))
        second = add(engine, "second")
        threading.Event().wait(0.2)

        assert (order, load(engine, second).attempt, probe.executor(worker).free) == ([], 0, 0)
        may_end.set()
        until(lambda: load(engine, second).state == "completed")
        assert order == ["first", "second"]

    def test_a_long_limit_does_not_hide_a_short_one(self, engine, worker):
        begun, may_end = threading.Event(), threading.Event()

        def process(_task: RunningTask) -> None:
            begun.set()
            may_end.wait(SOON)

        worker.use("t", process, timeout=LONG)
        long = add(engine)
        worker.start()
        assert begun.wait(SOON)
        short = add(engine, timeout=0.05)

        until(lambda: failed(engine, short))
        may_end.set()
        until(lambda: load(engine, long).state == "completed")

    def test_a_worker_that_has_started_again_watches_again(self, engine, worker):
        begun, may_end = threading.Event(), threading.Event()

        def process(_task: RunningTask) -> None:
            begun.set()
            may_end.wait(SOON)

        worker.use("t", process, timeout=0.5)
        task_id = add(engine)
        worker.start()
        assert begun.wait(SOON)
        worker.stop(timeout=0)
        assert load(engine, task_id).fail_count == 0

        worker.start()
        until(lambda: failed(engine, task_id))
        may_end.set()

    def test_one_that_has_failed_is_not_given_back_at_a_stop(self, engine, worker):
        may_end, ended = threading.Event(), threading.Event()

        def process(_task: RunningTask) -> None:
            may_end.wait(SOON)
            ended.set()

        worker.use("t", process, timeout=0.05)
        task_id = add(engine)
        worker.start()
        until(lambda: failed(engine, task_id))

        worker.stop(timeout=0.05)

        may_end.set()
        assert ended.wait(SOON)
        task = load(engine, task_id)
        assert (task.state, task.attempt, task.fail_count) == ("pending", 1, 1)

    def test_an_interrupt_reaches_the_program_even_late(self, engine, worker):
        def process(task: RunningTask) -> None:
            until(lambda: failed(engine, task.id))
            raise KeyboardInterrupt

        worker.use("t", process, timeout=0.05)
        task_id = add(engine)

        with pytest.raises(KeyboardInterrupt):
            worker.work()

        assert failed(engine, task_id)


class TestLimits:
    @pytest.mark.parametrize("kind", ["function", "coroutine"])
    @pytest.mark.parametrize(
        ("types", "own", "state"),
        [
            (0.05, LONG, "completed"),
            (LONG, 0.05, "pending"),
            (None, 0.05, "pending"),
            (0.05, None, "pending"),
        ],
    )
    def test_a_tasks_own_stands_for_its_types(self, engine, worker, kind, types, own, state):
        def function(_task: RunningTask) -> None:
            time.sleep(0.2)

        async def coroutine(_task: AsyncRunningTask) -> None:
            await asyncio.sleep(0.2)

        worker.use("t", function if kind == "function" else coroutine, timeout=types)
        add(engine, timeout=own)

        assert worker.work().state == state

    def test_add_many_gives_them_all_one(self, engine, worker):
        worker.use("t", lambda task: time.sleep(0.2))
        with Session(engine) as session, session.begin():
            Queue().add_many(session, "t", [1, 2], timeout=timedelta(milliseconds=50))

        assert [worker.work().fail_count for _ in range(2)] == [1, 1]

    def test_where_there_is_none_nobody_watches(self, engine, worker):
        done = threading.Semaphore(0)
        worker.use("t", lambda task: done.release())
        for _ in range(20):
            add(engine)
        worker.start()
        for _ in range(20):
            assert done.acquire(timeout=SOON)

        assert probe.deadlines_thread(worker) is None

    def test_those_that_have_ended_are_forgotten(self, engine, worker):
        done = threading.Semaphore(0)
        worker.use("t", lambda task: done.release(), timeout=LONG)
        with Session(engine) as session, session.begin():
            Queue().add_many(session, "t", range(500))
        worker.start()
        for _ in range(500):
            assert done.acquire(timeout=SOON)
        worker.stop()

        assert probe.limited_attempts(worker) == ({}, set())
        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM apoq_tasks WHERE fail_count > 0")) == 0


RACE, ATTEMPTS = 0.5, 3
"""The limit of the attempts that end at their limit, and how many attempts do."""


def until_about_the_limit_of(task: RunningTask | AsyncRunningTask) -> float:
    return max(0, probe.attempt_of(task).ends_at - time.monotonic() + random.uniform(-0.002, 0.001))


def end_at_the_limit(task: RunningTask) -> None:
    if task.data % 2:
        write(task)
    if task.attempt <= ATTEMPTS:
        time.sleep(until_about_the_limit_of(task))
        if task.data % 5 == 0:
            raise ValueError("at that very moment")


async def end_at_the_limit_on_a_loop(task: AsyncRunningTask) -> None:
    if task.data % 2:
        await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
    if task.attempt <= ATTEMPTS:
        await asyncio.sleep(
            max(0, probe.attempt_of(task).ends_at - time.monotonic() + random.uniform(-0.002, 0.001))
        )
        if task.data % 5 == 0:
            raise ValueError("at that very moment")


@pytest.mark.parametrize("processor", [end_at_the_limit, end_at_the_limit_on_a_loop])
def test_an_attempt_that_ends_at_its_limit_is_settled_once(engine, make_worker, processor):
    """Some end just before it and some just after: each of them either has failed or has not."""
    worker = make_worker(concurrency=15)
    told: Counter[tuple[str, int]] = Counter()
    released: Counter[int] = Counter()
    worker.events.on(TaskReleased, lambda event: released.update([event.id]))
    worker.use("t", processor, timeout=RACE, retry_limit=100, retry_delay=now)
    for name in ("completed", "retried"):
        worker.events.on(f"task.{name}", lambda task, *_, name=name: told.update([(name, task.id)]))
    with Session(engine) as session, session.begin():
        Queue().add_many(session, "t", range(100))
    worker.start()

    def tasks() -> list[Task]:
        with Session(engine) as session:
            return list(session.scalars(sa.select(Task).order_by(Task.id)))

    until(lambda: {task.state for task in tasks()} == {"completed"}, timeout=120)
    worker.stop()

    assert ledger(engine) == [task.id for task in tasks() if task.data % 2]
    for task in tasks():
        # On a busy machine, a task may have waited for a slot for so long that it was released.
        assert task.attempt == task.fail_count + 1 == task.claim_token - released[task.id]
        assert (told["completed", task.id], told["retried", task.id]) == (1, task.fail_count)
    others = {task.fail_count for task in tasks() if task.data % 5}
    assert len(others) > 1, "it was no race"
    assert probe.limited_attempts(worker) == ({}, set())
