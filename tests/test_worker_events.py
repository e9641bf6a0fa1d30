"""What a worker reports while it works, as the classes of `apoq.events`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta

import probe
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import AsyncRunningTask, Cancel, Queue, Retry, RunningTask, Snooze, Task, Worker
from apoq.events import (
    Event,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskEvent,
    TaskFailed,
    TaskLost,
    TaskReleased,
    TaskRetried,
    TaskSnoozed,
    TaskStarted,
    WorkerEvent,
    WorkerStarted,
    WorkerStopped,
    WorkerStopping,
)
from apoq.schema.statements.claim import CLAIM

SOON = 10.0
"""Seconds within which what a test waits for has long happened."""

until = patience(SOON)


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
def reported(worker) -> list[Event]:
    reported: list[Event] = []
    worker.events.on(TaskEvent, reported.append)
    return reported


def add(engine, type_: str = "t", **options) -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, type_, **options).id


def classes(events: list[Event]) -> list[type[Event]]:
    return [type(event) for event in events]


def nap(_task: RunningTask) -> None:
    threading.Event().wait(0.05)


async def async_nap(_task: AsyncRunningTask) -> None:
    nap(_task)


def nap_in_session(task: RunningTask) -> None:
    task.session.execute(sa.select(1))
    nap(task)


@pytest.mark.parametrize("processor", [nap, async_nap, nap_in_session])
@pytest.mark.parametrize("is_started", [True, False], ids=["start", "work"])
def test_a_task_is_claimed_starts_and_is_completed(engine, worker, reported, processor, is_started):
    worker.use("t", processor)
    task_id = add(engine)

    if is_started:
        worker.start()
        until(lambda: len(reported) == 3)
        worker.stop()
    else:
        worker.work()

    assert classes(reported) == [TaskClaimed, TaskStarted, TaskCompleted]
    claimed, started, completed = reported
    assert claimed == TaskClaimed(task_id, "t", "default", None, 1)
    assert {event.id for event in reported} == {task_id}
    assert 0 <= started.lag < SOON
    assert 0.05 <= completed.seconds < SOON


def raiser(error: BaseException) -> Callable[[RunningTask], None]:
    def process(_task: RunningTask) -> None:
        raise error

    return process


@pytest.mark.parametrize(
    ("outcome", "expected", "known"),
    [
        (ValueError("no"), TaskRetried, {"fail_count": 1}),
        (Retry(delay=7), TaskRetried, {"fail_count": 1, "delay": 7.0}),
        (Cancel("enough"), TaskCancelled, {}),
        (Snooze(60), TaskSnoozed, {"delay": 60.0}),
    ],
    ids=["a failure", "a retry", "a cancellation", "a snooze"],
)
def test_how_an_attempt_ends_is_reported(engine, worker, reported, outcome, expected, known):
    worker.use("t", raiser(outcome))
    task_id = add(engine)

    worker.work()

    assert classes(reported) == [TaskClaimed, TaskStarted, expected]
    (*_, event) = reported
    assert (event.id, event.attempt) == (task_id, 1)
    assert event.seconds is not None
    assert {name: getattr(event, name) for name in known} == known
    if hasattr(event, "error"):
        assert event.error is outcome


def test_the_last_failure_is_reported_as_such(engine, worker, reported):
    error = ValueError("no")
    worker.use("t", raiser(error), retry_limit=0)
    add(engine)

    worker.work()

    (*_, event) = reported
    assert isinstance(event, TaskFailed)
    assert (event.error, event.fail_count) == (error, 1)


def test_a_task_that_is_cancelled_elsewhere_is_reported_as_lost(engine, worker, reported):
    def cancel(task: RunningTask) -> None:
        with Session(engine) as session, session.begin():
            assert Queue().cancel(session, task.id)

    worker.use("t", cancel)
    task_id = add(engine)

    worker.work()

    assert classes(reported) == [TaskClaimed, TaskStarted, TaskLost]
    assert reported[-1].id == task_id
    assert not reported[-1].is_late


def test_a_task_that_returns_after_its_timeout_is_reported_as_late(engine, worker, reported):
    may_return = threading.Event()
    worker.use("t", lambda task: may_return.wait(SOON), timeout=0.1, retry_limit=0)
    add(engine)

    worker.start()
    until(lambda: TaskFailed in classes(reported))
    may_return.set()
    worker.stop()

    assert classes(reported) == [TaskClaimed, TaskStarted, TaskFailed, TaskLost]
    assert isinstance(reported[2].error, TimeoutError)
    assert reported[3].is_late


def test_what_is_given_back_at_a_stop_is_reported(engine, worker, reported):
    has_begun, may_return = threading.Event(), threading.Event()
    worker.use("t", lambda task: (has_begun.set(), may_return.wait(SOON)))
    add(engine)

    worker.start()
    assert has_begun.wait(SOON)
    worker.stop(timeout=timedelta(0))
    may_return.set()

    assert classes(reported) == [TaskClaimed, TaskStarted, TaskReleased]


def test_the_worker_reports_that_it_starts_and_stops(worker):
    heard: list[Event] = []
    worker.events.on(WorkerEvent, heard.append)

    worker.start()
    worker.start()
    worker.stop()
    worker.stop()

    assert classes(heard) == [WorkerStarted, WorkerStopping, WorkerStopped]
    assert {event.worker for event in heard} == {repr(worker)}


class TestNothingIsPreparedThatNobodyListensTo:
    @pytest.fixture
    def timed(self, engine, worker) -> list[bool]:
        """Whether each task that was processed is timed."""
        timed: list[bool] = []
        worker.use("t", lambda task: timed.append(probe.attempt_of(task).row[CLAIM].on_start is not None))
        add(engine)
        return timed

    def test_by_default(self, worker, timed):
        worker.work()

        assert timed == [False]

    @pytest.mark.parametrize("event", [TaskStarted, TaskCompleted])
    def test_until_somebody_does(self, worker, timed, event):
        worker.events.on(event, lambda event: None)

        worker.work()

        assert timed == [True]

    def test_the_log_of_each_task_at_debug_counts_as_a_listener(self, worker, timed, caplog):
        with caplog.at_level(logging.DEBUG, logger="apoq"):
            worker.work()

        assert timed == [True]


def test_at_debug_the_log_says_when_a_task_starts_and_how_long_it_took(engine, worker, caplog):
    worker.use("t", nap)
    task_id = add(engine)

    with caplog.at_level(logging.DEBUG, logger="apoq.worker"):
        worker.work()

    said = [record.getMessage() for record in caplog.records if f"task {task_id} " in record.getMessage()]
    claimed, started, completed = said
    assert claimed == f"task {task_id} (t) is claimed, for attempt 1"
    assert started.startswith(f"task {task_id} (t) starts, attempt 1, 0.")
    assert completed.startswith(f"task {task_id} (t) is completed, after 0.")


def test_a_listener_that_raises_does_no_harm(engine, worker, caplog):
    def raising(_event: TaskEvent) -> None:
        raise ValueError("oops")

    worker.events.on(TaskEvent, raising)
    worker.use("t", lambda task: None)
    task_id = add(engine)

    worker.work()

    with Session(engine) as session:
        assert session.get_one(Task, task_id).state == "completed"
    assert "a listener of TaskStarted raised" in caplog.text


def test_events_of_several_tasks_tell_which(engine, make_worker):
    worker: Worker = make_worker(concurrency=4)
    completed: list[TaskCompleted] = []
    worker.events.on(TaskCompleted, completed.append)
    worker.use("t", lambda task: None)
    ids = [add(engine) for _ in range(50)]

    worker.start()
    until(lambda: len(completed) == len(ids))
    worker.stop()

    assert sorted(event.id for event in completed) == ids
    assert all(event.seconds is not None for event in completed)


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Cancel("enough"), "is cancelled by its processor: enough"),
        (Snooze(60), "is put off for 60 s by its processor"),
    ],
    ids=["a cancellation", "a snooze"],
)
def test_at_debug_the_log_says_what_else_became_of_a_task(engine, worker, caplog, outcome, expected):
    worker.use("t", raiser(outcome))
    task_id = add(engine)

    with caplog.at_level(logging.DEBUG, logger="apoq.worker"):
        worker.work()

    assert f"task {task_id} (t) {expected}" in caplog.messages
