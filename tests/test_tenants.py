"""`TypedTask.to`: one function for the queues of many tenants."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import InvalidProcessor, Queue, Task, TaskFailure, prepare
from apoq.testing import drain


def test_it_adds_to_another_queue_whose_workers_run_it(session):
    ran: list[tuple[int, str]] = []
    main, tenant = Queue(), Queue("tenant-7")
    task = main.task(type="send", aliases=["old"])(lambda n: ran.append(n))  # noqa: PLW0108

    there = task.to(tenant)
    added = there.using(priority=5).add(session, 1)
    there.add_many(session, [{"n": 2}])
    main.add(session, "send", {"n": 3})

    assert (added.queue, added.priority, there.queue, task.queue) == ("tenant-7", 5, tenant, main)
    assert [task.queue for task in drain(session, tenant)] == ["tenant-7"] * 2
    assert ran == [1, 2]
    assert set(tenant.tasks) == {"send", "old"}


def test_options_and_keys_stay(session):
    task = Queue().task(type="send", unique=True, retry_limit=9)(lambda n: None)
    there = task.using(priority=3).to(Queue("other"))

    assert there.add(session, 1).priority == 3
    assert not there.add(session, 1).is_new
    assert task.add(session, 1).is_new
    assert there.processor.policy.limit == 9


def test_it_may_be_called_again_and_again():
    task, tenant = Queue().task(type="send")(lambda: None), Queue("tenant-8")

    first = task.to(tenant)
    assert task.to(tenant).to(Queue("tenant-8")).processor is first.processor
    assert list(tenant.tasks) == ["send"]


def test_a_started_worker_runs_what_comes_later(engine, make_worker):
    prepare(engine, schema="tenant")
    queue = Queue("mail", schema="tenant")
    worker = make_worker(queue, poll_interval=timedelta(seconds=1))
    task = Queue("mail").task(type="send")(lambda: None)
    with Session(engine) as session, session.begin():
        task.to(queue).add(session)

    assert worker.work().state == "completed"
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM tenant.apoq_tasks")) == 1


def test_a_schedule_stays_that_of_the_first_queue():
    task, other = Queue().task(type="daily", cron="@daily")(lambda: None), Queue("tenant-9")
    task.to(other)

    assert list(other.scheduled_tasks()) == []
    assert task.schedule


def test_the_task_of_on_failure_follows(session):
    told: list[TaskFailure] = []
    main, tenant = Queue(), Queue("tenant-10")

    @main.task
    def tell(failure: TaskFailure) -> None:
        told.append(failure)

    failing = main.task(type="charge", retry_limit=0, on_failure=tell)(lambda: 1 / 0)
    failing.to(tenant).add(session)
    drain(session, tenant, errors="record")

    assert [failure.queue for failure in told] == ["tenant-10"]
    assert session.scalars(sa.select(Task.queue).distinct()).all() == ["tenant-10"]


def test_another_function_of_the_type_is_refused():
    task, tenant = Queue().task(type="send")(lambda: None), Queue("tenant-11")
    tenant.task(type="send")(lambda n: None)

    with pytest.raises(InvalidProcessor, match="the type 'send' already has a processor"):
        task.to(tenant)


@pytest.mark.parametrize("queue", ["tenant-12", None, Queue])
def test_it_must_be_a_queue(queue):
    with pytest.raises(InvalidProcessor, match="queue must be a Queue, got"):
        Queue().task(type="send")(lambda: None).to(queue)
