"""`Queue.retry_many` and `Queue.cancel_many`: many tasks, in the caller's transaction."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq import InvalidTask, Queue, RetriedMany, Task, UnsupportedSession, prepare
from apoq.cli import main
from apoq.testing import freeze

until = patience(10.0)
NOON = datetime(2031, 5, 4, 12, tzinfo=UTC)
PAST = datetime(2020, 1, 1, tzinfo=UTC)
MANY = ["retry_many", "cancel_many"]

RETRIES_KEYS = pytest.mark.as_owner("only an operator retries tasks with unique keys")


def put(session: Session, state: str, count: int = 1, **values) -> list[int]:
    """Add tasks in a state, and return their ids."""
    ended = {"failed": "failed_at", "cancelled": "cancelled_at", "completed": "completed_at"}.get(state)
    times = {ended: NOON} if ended else {}
    tasks = [Task(**{"type": "t", "state": state, **times, **values}) for _ in range(count)]
    session.add_all(tasks)
    session.flush()
    return [task.id for task in tasks]


def in_state(session: Session, state: str) -> list[int]:
    return list(session.scalars(sa.select(Task.id).where(Task.state == state).order_by(Task.id)))


# Which tasks


def test_failed_tasks_are_retried_with_all_their_attempts(session, queue):
    ids = put(session, "failed", 3, attempt=6, fail_count=6, rescue_count=2, error={"class": "E"})
    put(session, "cancelled")
    put(session, "completed")
    put(session, "failed", queue="other")

    assert queue.retry_many(session, everything=True) == RetriedMany(retried=3, skipped=0)

    assert in_state(session, "pending") == ids
    task = session.get(Task, ids[0])
    assert (task.attempt, task.fail_count, task.rescue_count, task.failed_at) == (0, 0, 0, None)
    assert task.error == {"class": "E"}


@pytest.mark.parametrize("state", ["completed", "cancelled"])
def test_other_ended_tasks_are_retried_if_their_state_is_given(session, queue, state):
    put(session, "failed")
    ids = put(session, state)

    assert queue.retry_many(session, state=state, type="t").retried == 1
    assert in_state(session, "pending") == ids


@pytest.mark.parametrize("method", MANY)
@pytest.mark.parametrize(
    ("filters", "values", "others"),
    [
        ({"type": "a"}, {"type": "a"}, {"type": "b"}),
        ({"error_class": "KeyError"}, {"error": {"class": "KeyError"}}, {"error": {"class": "ValueError"}}),
        pytest.param({"unique_key": "k"}, {"unique_key": "k"}, {"unique_key": "other"}, marks=RETRIES_KEYS),
        ({"key": 7}, {"key": "7"}, {"key": "8"}),
        (
            {"since": NOON},
            {"failed_at": NOON, "created_at": NOON},
            {"failed_at": NOON - timedelta(seconds=1), "created_at": NOON - timedelta(seconds=1)},
        ),
    ],
)
def test_a_filter_selects_tasks(session, queue, method, filters, values, others):
    state = "failed" if method == "retry_many" else "pending"
    ids = put(session, state, **values)
    put(session, state, 2, **others)
    put(session, state, 2)
    if "since" in filters:
        session.execute(sa.text("DELETE FROM apoq_tasks WHERE id > :last"), {"last": ids[0] + 2})

    getattr(queue, method)(session, **filters)

    assert in_state(session, "pending" if method == "retry_many" else "cancelled") == ids


def test_pending_waiting_and_running_tasks_are_cancelled(session, queue):
    ids = [
        put(session, state, unique_key=state, held_unique_key=state)[0] for state in ("pending", "waiting")
    ]
    [running] = put(session, "running")
    put(session, "completed")

    assert queue.cancel_many(session, type="t", reason="no longer needed") == 3

    assert in_state(session, "cancelled") == [*ids, running]
    task = session.get(Task, ids[0])
    assert (task.error["message"], task.held_unique_key) == ("no longer needed", None)
    assert task.cancelled_at is not None


def test_only_one_state_is_cancelled_if_it_is_given(session, queue):
    ids = put(session, "pending")
    put(session, "running")

    assert queue.cancel_many(session, state="pending", everything=True) == 1
    assert in_state(session, "cancelled") == ids


@pytest.mark.parametrize(("method", "state"), [("retry_many", "failed"), ("cancel_many", "pending")])
def test_the_oldest_come_first_up_to_the_limit(session, queue, method, state):
    ids = put(session, state, 5)

    getattr(queue, method)(session, everything=True, limit=2)

    assert in_state(session, state) == ids[2:]


def test_the_tasks_are_due_one_after_the_other(session, queue):
    put(session, "failed", 3)
    with freeze(session, NOON):
        queue.retry_many(session, everything=True, delay=60, every=timedelta(seconds=10))

    due = session.scalars(sa.select(Task.process_at).order_by(Task.id)).all()
    assert due == [NOON + timedelta(seconds=seconds) for seconds in (60, 70, 80)]


# Bad input


@pytest.mark.parametrize("method", MANY)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "at least one of type, error_class, since, key and unique_key must be given, got none"),
        ({"type": None, "limit": 5}, "pass everything=True"),
        ({"everything": 1}, "everything must be True or False, got 1"),
        ({"type": ""}, "type"),
        ({"error_class": ValueError}, "must be the name of a class.*: pass 'ValueError'"),
        ({"error_class": ""}, "error_class must be the name of a class"),
        ({"since": timedelta(hours=1)}, "since must be a datetime"),
        ({"since": datetime(2031, 5, 4)}, "since must have a time zone"),  # noqa: DTZ001
        ({"unique_key": ""}, "a unique key"),
        ({"type": "t", "limit": 0}, "limit must be a whole number from 1 to 100000, got 0"),
        ({"type": "t", "limit": 100_001}, "limit must be a whole number"),
        ({"type": "t", "state": "running?"}, "state must be .* got 'running"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_changed(session, queue, method, options, message):
    put(session, "failed")
    put(session, "pending")

    with pytest.raises(InvalidTask, match=message):
        getattr(queue, method)(session, **options)

    assert len(in_state(session, "failed")) == len(in_state(session, "pending")) == 1


def test_delays_of_more_than_a_century_are_refused(session, queue):
    with pytest.raises(InvalidTask, match="within a century, got every=1 day"):
        queue.retry_many(session, everything=True, every=timedelta(days=1), limit=100_000)
    with pytest.raises(InvalidTask, match="every must be"):
        queue.retry_many(session, everything=True, every=-1)


def test_a_forgotten_session_is_named(queue):
    with pytest.raises(UnsupportedSession, match=r"queue\.retry_many"):
        queue.retry_many(type="t")


# Unique keys, and expired tasks


@RETRIES_KEYS
def test_tasks_whose_keys_are_taken_stay_in_place_and_hold_up_no_others(session, queue):
    kept = put(session, "failed", 3, unique_key="taken") + put(session, "failed", expires_at=PAST)
    put(session, "pending", unique_key="taken", held_unique_key="taken")
    free = put(session, "failed", 2, unique_key="free") + put(session, "failed")

    assert queue.retry_many(session, everything=True, limit=2) == RetriedMany(retried=2, skipped=5)

    assert in_state(session, "failed") == [*kept, free[1]]
    assert session.get(Task, free[0]).held_unique_key == "free"
    assert queue.retry_many(session, everything=True) == RetriedMany(retried=0, skipped=5)


@RETRIES_KEYS
def test_a_key_that_an_ended_task_still_holds_is_free(session, queue):
    """Such as after the Node.js original, which doesn't know of keys."""
    put(session, "completed", unique_key="k", held_unique_key="k")
    put(session, "failed", unique_key="k")
    put(session, "failed", unique_key="own", held_unique_key="own")

    assert queue.retry_many(session, everything=True) == RetriedMany(2, 0)


@RETRIES_KEYS
def test_callers_that_want_the_same_keys_do_not_deadlock(engine):
    queue, count = Queue(), 40
    with Session(engine) as session, session.begin():
        for number in range(count):
            put(session, "failed", type="a", unique_key=f"k{number}")
        for number in reversed(range(count)):
            put(session, "failed", type="b", unique_key=f"k{number}")
    begin = threading.Barrier(2)

    def retry(type_: str) -> RetriedMany:
        with Session(engine) as session, session.begin():
            begin.wait()
            return queue.retry_many(session, type=type_)

    with ThreadPoolExecutor() as threads:
        first, second = threads.map(retry, ["a", "b"])

    assert first.retried + second.retried == count
    assert first.skipped + second.skipped == count


def test_a_key_that_is_taken_meanwhile_is_skipped(engine):
    queue = Queue()
    with Session(engine) as session, session.begin():
        put(session, "failed", unique_key="k")
    with Session(engine) as session, session.begin(), ThreadPoolExecutor() as threads:
        queue.add(session, "t", unique_key="k")

        def retry() -> RetriedMany:
            with Session(engine) as other, other.begin():
                return queue.retry_many(other, everything=True)

        retried = threads.submit(retry)
        waits = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watching:
            until(lambda: watching.scalar(waits))
        session.commit()
    assert retried.result() == RetriedMany(0, 1)


def test_at_repeatable_read_the_caller_gets_a_serialization_failure_at_most(engine):
    queue = Queue()
    with Session(engine) as session, session.begin():
        put(session, "failed", 2, unique_key="k")
    with Session(engine.execution_options(isolation_level="REPEATABLE READ")) as session:
        session.execute(sa.text("SELECT 1"))
        with Session(engine) as other, other.begin():
            queue.add(other, "t", unique_key="k")
        with pytest.raises(DBAPIError) as raised:
            queue.retry_many(session, everything=True)
        session.rollback()
        assert raised.value.orig.sqlstate == "40001"
        assert len(in_state(session, "failed")) == 2


# Transactions


@pytest.mark.parametrize(("method", "state"), [("retry_many", "failed"), ("cancel_many", "pending")])
def test_tasks_that_another_transaction_has_locked_are_left_out(engine, method, state):
    queue = Queue()
    with Session(engine) as session, session.begin():
        ids = put(session, state, 4)
    with Session(engine) as first, first.begin(), Session(engine) as second, second.begin():
        getattr(queue, method)(first, everything=True, limit=2)
        getattr(queue, method)(second, everything=True, limit=1)
        assert in_state(second, state) == [ids[0], ids[1], ids[3]]
        first.rollback()
    with Session(engine) as session:
        assert in_state(session, state) == [ids[0], ids[1], ids[3]]


@pytest.mark.parametrize(("method", "state"), [("retry_many", "failed"), ("cancel_many", "pending")])
def test_the_objects_of_the_session_are_as_in_the_database(engine, method, state):
    queue = Queue()
    with Session(engine, expire_on_commit=False) as session:
        put(session, state)
        session.commit()
        [task] = session.scalars(sa.select(Task))
        getattr(queue, method)(session, everything=True)
        assert task.state == ("pending" if state == "failed" else "cancelled")
        session.rollback()
        assert task.state == state


def test_every_kind_of_session_retries_and_cancels(engine):
    queue = Queue()
    url = engine.url.set(drivername="postgresql")
    with Session(engine) as session, session.begin():
        put(session, "failed", 4)

    def change(session) -> None:
        assert queue.retry_many(session, type="t", limit=1) == (1, 0)
        assert queue.cancel_many(session, type="t", state="pending") == 1
        assert queue.retry_many(session, type="t", state="cancelled", limit=4).retried == 1

    async def change_async(session) -> None:
        assert await queue.retry_many(session, type="t", limit=1) == (1, 0)
        assert await queue.cancel_many(session, type="t", state="pending") == 2

    async def run() -> None:
        asyncio_engine = create_async_engine(engine.url)
        async with AsyncSession(asyncio_engine) as session:
            await change_async(session)
        async with asyncio_engine.connect() as connection:
            await change_async(connection)
        await asyncio_engine.dispose()
        connection = await psycopg.AsyncConnection.connect(url.render_as_string(hide_password=False))
        await change_async(connection)
        await connection.close()

    with engine.begin() as connection:
        change(connection)
        connection.rollback()
    with psycopg.connect(url.render_as_string(hide_password=False)) as connection:
        change(connection)
        connection.rollback()
    with Session(engine) as session:
        change(session)
        session.commit()
    asyncio.run(run())


def test_a_queue_in_another_schema(engine):
    prepare(engine, schema="jobs")
    queue = Queue("mail", schema="jobs")
    with Session(engine) as session, session.begin():
        task = queue.add(session, "t")
        assert queue.cancel_many(session, type="t") == 1
        assert queue.retry_many(session, type="t", state="cancelled").retried == 1
        assert task.state == "pending"


def test_running_coroutines_are_cancelled(engine, worker):
    begun, ended = threading.Event(), threading.Event()

    async def run(_task) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    worker.use("t", run)
    with Session(engine) as session, session.begin():
        Queue().add(session, "t")
    worker.start()
    assert begun.wait(10)

    with Session(engine) as session, session.begin():
        assert Queue().cancel_many(session, type="t") == 1

    assert ended.wait(10)


def test_retried_tasks_are_run_at_once(engine, make_worker):
    ran = threading.Event()
    worker = make_worker(poll_interval=timedelta(minutes=5))
    worker.use("t", lambda _task: ran.set())
    with Session(engine) as session, session.begin():
        put(session, "failed")
    worker.start()

    with Session(engine) as session, session.begin():
        Queue().retry_many(session, type="t")

    assert ran.wait(10)


# The command line


def test_the_command_line_says_why_a_task_was_not_changed(engine):
    cli = CliRunner(env={"APOQ_DATABASE_URL": engine.url.render_as_string(hide_password=False)})
    with Session(engine) as session, session.begin():
        put(session, "failed", expires_at=PAST)
        put(session, "failed", unique_key="k")
        put(session, "pending", unique_key="k", held_unique_key="k")
    with Session(engine) as session, session.begin():
        session.get(Task, 3, with_for_update=True)
        retried = cli.invoke(main, ["retry", "1", "2", "3", "--yes"])
        cancelled = cli.invoke(main, ["cancel", "3"])

    assert retried.output.splitlines() == [
        "Error: task 1 has expired: add it again, with another time",
        "task 2 has the unique key 'k', which another task holds",
        "task 3 is pending: only completed, failed and cancelled tasks can be retried",
    ]
    assert "task 3 is locked by another session" in cancelled.output


def test_tasks_that_wait_for_cancelled_ones_are_cancelled_too_and_wait_again_after_a_retry(session, queue):
    parent = queue.add(session, "parent")
    child = queue.add(session, "child", after=[parent])

    assert queue.cancel_many(session, type="parent") == 1
    session.refresh(child)
    assert child.state == "cancelled"

    assert queue.retry_many(session, type="parent", state="cancelled").retried == 1
    assert queue.retry(session, child)
    session.refresh(child)
    assert (child.state, child.waiting_for) == ("waiting", "parents")
