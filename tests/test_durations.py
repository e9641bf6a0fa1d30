"""Every parameter that is a duration takes seconds and timedeltas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import probe
import pytest
from pyramid.request import Request
from sqlalchemy.orm import Session

from apoq import Queue, Retry, Snooze, Task, Worker
from apoq.core.retry import RetryPolicy
from apoq.fastapi import lifespan
from apoq.flask.settings import Settings as FlaskSettings
from apoq.pyramid.requests import RequestTasks
from apoq.pyramid.settings import Settings as PyramidSettings
from apoq.testing import freeze

SECONDS = timedelta(seconds=90)

NOW = datetime(2031, 5, 4, tzinfo=UTC)

Act = Callable[[Session, Worker, Any], timedelta | float]
"""Passes a duration, and returns the one that takes effect."""


def due_in(task: Task) -> timedelta:
    return task.process_at - NOW


def retried(session: Session, value: Any, retry: Callable[..., bool]) -> timedelta:
    task = Queue().add(session, "t")
    task.state = "failed"
    session.flush()
    assert retry(task, delay=value)
    return due_in(task)


def request_tasks(session: Session) -> RequestTasks:
    request = Request.blank("/")
    request.dbsession = session
    return RequestTasks(request, PyramidSettings(), None)


def typed(session: Session, **options: Any) -> Task:
    @Queue().task
    def send() -> None: ...

    return send.using(**options).add(session)


def used(worker: Worker, **options: Any) -> Any:
    worker.use("t", print, **options)
    return worker.processors(worker.queues[0])["t"]


def option(worker: Worker, name: str, value: Any) -> timedelta:
    return getattr(Worker(probe.engine(worker), **{name: value}).options, name)


def stopped(worker: Worker, value: Any) -> float:
    with probe.recorded_stop(worker) as waits:
        worker.stop(value)
    return waits[0]


def run(worker: Worker, value: Any) -> float:
    with probe.recorded_stop(worker) as waits:
        worker.run(timeout=value, on_start=lambda stop: stop())
    return waits[0]


PARAMETERS: dict[str, Act] = {
    "Queue.add(delay)": lambda session, _, value: due_in(Queue().add(session, "t", delay=value)),
    "Queue.add(retry_delay)": lambda session, _, value: (
        Queue().add(session, "t", retry_delay=value).retry_delay
    ),
    "Queue.add(timeout)": lambda session, _, value: Queue().add(session, "t", timeout=value).timeout,
    "Queue.retry(delay)": lambda session, _, value: retried(
        session, value, lambda task, delay: Queue().retry(session, task, delay=delay)
    ),
    "TypedTask.using(delay)": lambda session, _, value: due_in(typed(session, delay=value)),
    "TypedTask.using(retry_delay)": lambda session, _, value: typed(session, retry_delay=value).retry_delay,
    "TypedTask.using(timeout)": lambda session, _, value: typed(session, timeout=value).timeout,
    "Queue.task(retry_delay)": lambda _, __, value: (
        Queue().task(type="t", retry_delay=value)(print_it).processor.policy.delay_after(1)
    ),
    "Queue.task(timeout)": lambda _, __, value: (
        Queue().task(type="t", timeout=value)(print_it).processor.timeout
    ),
    "Worker.use(retry_delay)": lambda _, worker, value: used(worker, retry_delay=value).policy.delay_after(1),
    "Worker.use(retry_delay=function)": lambda _, worker, value: used(
        worker, retry_delay=lambda _: value
    ).policy.delay_after(1),
    "Worker.use(timeout)": lambda _, worker, value: used(worker, timeout=value).timeout,
    "Worker(poll_interval)": lambda _, worker, value: option(worker, "poll_interval", value),
    "Worker(lease)": lambda _, worker, value: option(worker, "lease", value),
    "Worker(keep_completed)": lambda _, worker, value: option(worker, "keep_completed", value),
    "Worker(keep_failed)": lambda _, worker, value: option(worker, "keep_failed", value),
    "Worker.stop(timeout)": lambda _, worker, value: stopped(worker, value),
    "Worker.run(timeout)": lambda _, worker, value: run(worker, value),
    "Retry(delay)": lambda _, __, value: Retry(delay=value).delay,
    "Snooze(delay)": lambda _, __, value: Snooze(value).delay,
    "fastapi.lifespan(timeout)": lambda _, worker, value: probe.timeout_of(lifespan(worker, timeout=value)),
    "request.apoq.add(delay)": lambda session, _, value: due_in(request_tasks(session).add("t", delay=value)),
    "request.apoq.retry(delay)": lambda session, _, value: retried(
        session, value, request_tasks(session).retry
    ),
    **{
        f"APOQ_{name.upper()}": lambda _, __, value, name=name: FlaskSettings.read(
            {f"APOQ_{name.upper()}": value}
        ).worker[name]
        for name in ("poll_interval", "lease", "keep_completed", "keep_failed")
    },
    **{
        f"apoq.{name}": lambda _, __, value, name=name: PyramidSettings.read({f"apoq.{name}": value}).worker[
            name
        ]
        for name in ("poll_interval", "lease", "keep_completed", "keep_failed")
    },
}


def print_it() -> None: ...


@pytest.fixture
def worker(shared_engine) -> Iterator[Worker]:
    worker = Worker(shared_engine)
    yield worker
    worker.stop()


parameters = pytest.mark.parametrize("act", PARAMETERS.values(), ids=PARAMETERS)


@parameters
@pytest.mark.parametrize("value", [90, 90.0, SECONDS], ids=repr)
def test_it_takes_seconds_and_timedeltas(session, worker, act, value):
    with freeze(session, NOW):
        taken = act(session, worker, value)

    assert (taken if isinstance(taken, timedelta) else timedelta(seconds=taken)) == SECONDS


@pytest.mark.parametrize(
    "act",
    [act for name, act in PARAMETERS.items() if not name.startswith("apoq.") and "function" not in name],
    ids=[name for name in PARAMETERS if not name.startswith("apoq.") and "function" not in name],
)
@pytest.mark.parametrize("value", ["90", True, Decimal(90), -1, float("nan"), timedelta.max], ids=repr)
def test_anything_else_is_rejected(session, worker, act, value):
    with pytest.raises(
        (TypeError, ValueError), match=r" must be (a number of seconds|between zero and a century)"
    ):
        act(session, worker, value)


def test_a_worker_keeps_tasks_for_ever_with_none(shared_engine):
    options = Worker(shared_engine, keep_completed=None, keep_failed=None).options

    assert (options.keep_completed, options.keep_failed) == (None, None)


def test_a_worker_deletes_completed_tasks_at_once_with_zero_seconds(shared_engine):
    assert not Worker(shared_engine, keep_completed=0).options.keeps_completed


def test_a_retry_comes_after_the_same_number_of_seconds_each_time():
    policy = RetryPolicy(delay=30)

    assert [policy.delay_after(fail_count) for fail_count in (1, 2, 7)] == [30, 30, 30]
