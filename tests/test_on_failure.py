"""`on_failure`: a task that is added in the transaction that marks another one as failed."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Fail, InvalidProcessor, Queue, RunningTask, Task, TaskFailure, prepare
from apoq.testing import assert_enqueued, drain, enqueued

until = patience(10.0)


def notify(failure: TaskFailure, *, note: str = "") -> None: ...


def fails(task: RunningTask) -> None:
    raise ConnectionError("the bank is away")


@pytest.fixture
def charge(queue):
    return queue.task(retry_limit=0, on_failure=queue.task(type="notify")(notify), type="charge")(fails)


def failures(engine: sa.Engine) -> list[dict]:
    with engine.connect() as connection:
        found = sa.select(Task.data).where(Task.type == "notify").order_by(Task.id)
        return [data.get("failure", data) for data in connection.scalars(found)]


def test_a_task_is_added_when_another_one_fails(session, queue, charge):
    charge.add(session)

    drain(session, queue, errors="record")

    assert session.execute(sa.select(Task.type, Task.state).order_by(Task.id)).all() == [
        ("charge", "failed"),
        ("notify", "completed"),
    ]


def test_the_function_gets_the_failure(session, queue):
    told: list[TaskFailure] = []

    @queue.task
    def tell(failure: TaskFailure) -> None:
        told.append(failure)

    failing = queue.task(type="charge", retry_limit=1, retry_delay=0, on_failure=tell)(fails)
    task = failing.add(session)
    drain(session, queue, errors="record")

    expected = TaskFailure(task.id, "charge", "default", 2, "ConnectionError", "the bank is away")
    assert told == [expected]


def test_nothing_is_added_for_a_retry_or_a_task_that_completes_or_is_cancelled(session, queue):
    failing = queue.task(type="charge", retry_limit=1, retry_delay=60, on_failure="notify")(fails)
    failing.add(session)
    drain(session, queue, errors="record")

    assert enqueued(session, "notify") == []


def test_options_of_the_task_apply(session, queue, worker):
    tell = queue.task(type="notify")(notify).using(priority=5, expires_in=60, retry_limit=9)
    worker.use("charge", fails, retry_limit=0, on_failure=tell)
    queue.add(session, "charge")
    drain(session, worker, errors="record")

    task = session.scalars(sa.select(Task).where(Task.type == "notify")).one()
    assert (task.priority, task.retry_limit, task.expires_at is None) == (5, 9, False)


def test_a_task_may_be_given_by_its_type(session, queue, worker):
    worker.use("charge", fails, retry_limit=0, on_failure="notify")
    task = queue.add(session, "charge")
    drain(session, worker, errors="record")

    added = assert_enqueued(session, "notify")
    assert added.data == {
        "task_id": task.id,
        "type": "charge",
        "queue": "default",
        "attempt": 1,
        "error_class": "ConnectionError",
        "message": "the bank is away",
    }


def test_it_is_added_to_the_queue_of_the_typed_task(session, queue, worker):
    tell = Queue("alerts").task(type="notify")(notify)
    worker.use("charge", fails, retry_limit=0, on_failure=tell)
    queue.add(session, "charge")
    drain(session, worker, errors="record")

    assert assert_enqueued(session, "notify", queue="alerts").queue == "alerts"


@pytest.mark.parametrize(
    ("on_failure", "message"),
    [
        (notify, "on_failure must be a typed task, or the type of a task, got <function notify"),
        (7, "got 7"),
        ("", "on_failure: a task's type must not be empty"),
        ("charge", "another task than the one that fails, got 'charge'"),
        (Queue("wrong").task(type="a")(lambda: None), "one argument, annotated with TaskFailure"),
        (Queue("wrong").task(type="b")(lambda failure: None), "one argument, annotated with TaskFailure"),
        (Queue("wrong").task(type="c", unique=True)(notify), "must be a task without a unique key"),
        (Queue(schema="jobs").task(type="d")(notify), "in the same schema as 'charge'"),
    ],
)
def test_what_can_not_be_added_is_refused(queue, on_failure, message):
    with pytest.raises(InvalidProcessor, match=message):
        queue.task(type="charge", on_failure=on_failure)(fails)


def test_annotations_that_are_not_defined_yet_are_read_later(session, queue):
    def later(failure: Later) -> None: ...  # noqa: F821

    tell = queue.task(type="notify")(later)
    failing = queue.task(type="charge", retry_limit=0, on_failure=tell)(fails)
    globals()["Later"] = TaskFailure
    try:
        failing.add(session)
        drain(session, queue, errors="record")
        assert session.scalar(sa.select(Task.state).where(Task.type == "notify")) == "completed"
    finally:
        del globals()["Later"]


# Workers


def add(engine: sa.Engine, type_: str = "charge", count: int = 1, **options) -> None:
    with Session(engine) as session, session.begin():
        Queue().add_many(session, type_, [{}] * count, **options)


def states(engine: sa.Engine, type_: str = "charge") -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(Task.state).where(Task.type == type_).order_by(Task.id)))


def test_a_worker_adds_one_for_each_failed_task_and_runs_them(engine, make_worker):
    worker = make_worker(poll_interval=timedelta(minutes=5))
    told: list[int] = []
    worker.use("charge", fails, retry_limit=0, on_failure="notify")
    worker.use("other", lambda _task: None)
    worker.use("plain", fails, retry_limit=0)
    worker.use("notify", lambda task: told.append(task.data["task_id"]))
    for type_ in ("charge", "plain", "other", "charge"):
        add(engine, type_, 10)

    worker.start()

    until(lambda: states(engine, "notify") == ["completed"] * 20)
    until(lambda: states(engine, "plain") == ["failed"] * 10)
    assert sorted(told) == [*range(1, 11), *range(31, 41)]


@pytest.mark.parametrize("outcome", ["fail", "timeout", "worker died"])
def test_every_way_to_fail_adds_one(engine, worker, outcome):
    def run(task) -> None:
        if outcome == "fail":
            raise Fail("no such account")
        until(lambda: states(engine) == ["failed"])

    worker.use("charge", run, retry_limit=0, timeout=0.05, on_failure="notify")
    add(engine)
    if outcome == "worker died":
        # As a rescue leaves it: claimed to be ended.
        with engine.begin() as connection:
            connection.execute(sa.update(Task).values(fail_count=1, attempt=1, rescue_count=1))

    worker.work()

    until(lambda: states(engine) == ["failed"])
    [failure] = failures(engine)
    expected = {"fail": "Fail", "timeout": "TimeoutError", "worker died": "WorkerDied"}
    assert (failure["error_class"], failure["attempt"]) == (expected[outcome], 1)


def test_nothing_is_added_for_a_task_that_the_worker_has_lost(engine, worker):
    def lose(task) -> None:
        with Session(engine) as session, session.begin():
            Queue().cancel(session, task.id)
        raise ConnectionError

    worker.use("charge", lose, retry_limit=0, on_failure="notify")
    add(engine)
    worker.work()

    assert (states(engine), failures(engine)) == (["cancelled"], [])


def test_both_are_written_or_neither(engine, worker):
    """The second statement fails for a moment, and the failure isn't written either."""
    worker.use("charge", fails, retry_limit=0, on_failure="notify")
    add(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            """
            CREATE SEQUENCE tries;
            GRANT USAGE ON SEQUENCE tries TO PUBLIC;
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.type = 'notify' AND nextval('tries') < 3 THEN
                    RAISE EXCEPTION 'not now' USING ERRCODE = 'serialization_failure';
                END IF;
                RETURN NEW;
            END $$;
            CREATE TRIGGER refuse BEFORE INSERT ON apoq_tasks FOR EACH ROW EXECUTE FUNCTION refuse()
            """
        )
    worker.start()

    until(lambda: states(engine) == ["failed"])
    assert len(failures(engine)) == 1


def test_a_task_fails_even_if_the_other_one_can_not_be_added(engine, worker, caplog):
    worker.use("charge", fails, retry_limit=0, on_failure="notify")
    add(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE apoq_tasks ADD CHECK (type != 'notify')")

    with caplog.at_level(logging.ERROR):
        worker.work()

    assert (states(engine), failures(engine)) == (["failed"], [])
    assert "the tasks of on_failure could not be added for these failed tasks: 1" in caplog.text


def test_a_task_that_can_not_be_added_takes_no_others_with_it(engine, worker, caplog):
    worker.use("charge", fails, retry_limit=0, on_failure="notify")
    add(engine, count=5)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE apoq_tasks ADD CHECK (data->>'task_id' != '3')")
    worker.start()

    until(lambda: states(engine) == ["failed"] * 5)
    assert sorted(failure["task_id"] for failure in failures(engine)) == [1, 2, 4, 5]
    assert "could not be added for these failed tasks: 3" in caplog.text


def test_a_worker_of_another_schema_adds_it_there(engine, make_worker):
    prepare(engine, schema="jobs")
    queue = Queue("mail", schema="jobs")
    failing = queue.task(type="charge", retry_limit=0, on_failure=queue.task(type="notify")(notify))(fails)
    worker = make_worker(queue)
    with Session(engine) as session, session.begin():
        failing.add(session)
    worker.work()

    with engine.connect() as connection:
        found = sa.text("SELECT type, queue, state FROM jobs.apoq_tasks ORDER BY id")
        rows = connection.execute(found).all()
    assert rows == [("charge", "mail", "failed"), ("notify", "mail", "pending")]
