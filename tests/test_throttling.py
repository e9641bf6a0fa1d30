"""`throttle=`: at most one task is added with a unique key in each window, even if it has ended."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import probe
import psycopg
import pytest
import sqlalchemy as sa
from claims import hold_lease
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq import InvalidTask, Queue, Task, prepare
from apoq.testing import drain, freeze, travel

until = patience(10.0)
NOON = datetime(2031, 5, 4, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
LOCKS = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")


def windows(session: Session | sa.Connection) -> list[str]:
    return list(session.scalars(sa.text("SELECT key FROM apoq_throttles ORDER BY key")))


def outcome(session, queue, **options) -> str:
    return queue.add(session, "t", **{"unique_key": "k", "throttle": MINUTE, **options}).add_outcome


def test_a_second_task_is_not_added_in_the_window(session, queue, worker):
    worker.use("t", lambda _task: None)
    with freeze(session, NOON):
        assert outcome(session, queue) == "added"
        drain(session, worker)
        second = queue.add(session, "t", {"n": 2}, unique_key="k", throttle=60)
        assert (second.add_outcome, second.is_new, second.id) == ("throttled", False, None)
        assert (second.type, second.data, second.unique_key) == ("t", {"n": 2}, "k")
        assert second not in session
        session.query(Task).delete()
        with travel(session, MINUTE - timedelta(microseconds=1)):
            assert outcome(session, queue) == "throttled"
        with travel(session, MINUTE):
            assert outcome(session, queue) == "added"
            assert outcome(session, queue) == "throttled"
    assert session.scalar(sa.select(sa.func.count()).select_from(Task)) == 1


def test_the_window_slides_and_is_counted_from_the_last_task_that_was_added(session, queue, worker):
    worker.use("t", lambda _task: None)
    added = []
    with freeze(session, NOON):
        for second in range(0, 200, 25):
            with travel(session, timedelta(seconds=second)):
                if outcome(session, queue) == "added":
                    added.append(second)
                drain(session, worker)
    assert added == [0, 75, 150]


def test_a_task_that_holds_the_key_is_kept_and_begins_no_window(session, queue, worker):
    worker.use("t", lambda _task: None)
    with freeze(session, NOON):
        first = queue.add(session, "t", unique_key="k")
        kept = queue.add(session, "t", unique_key="k", throttle=MINUTE)
        assert (kept.add_outcome, kept.id) == ("kept", first.id)
        assert windows(session) == []
        drain(session, worker)
        assert outcome(session, queue) == "added"


def test_windows_are_by_key_and_queue_and_do_not_stop_other_calls(session, queue):
    assert outcome(session, queue) == "added"
    assert outcome(session, queue, unique_key="other") == "added"
    assert outcome(session, Queue("other")) == "added"
    assert queue.add(session, "t", unique_key="k").add_outcome == "kept"
    assert queue.add(session, "t", unique_key=lambda _data: None, throttle=60).add_outcome == "added"


def test_many_tasks_are_throttled_each_by_its_key(session, queue, worker):
    worker.use("t", lambda _task: None)

    def add(*numbers: int | None) -> int:
        key = {"unique_key": lambda n: None if n is None else f"k{n}", "throttle": MINUTE}
        return queue.add_many(session, "t", list(numbers), **key)

    with freeze(session, NOON):
        queue.add(session, "t", unique_key="k9")
        assert add(3, 1, 2, 1, None) == 4
        drain(session, worker)
        assert add(1, None, 4, None, 3) == 3
        assert windows(session) == ["k1", "k2", "k3", "k4"]
        assert add(1, 2) == 0
        with travel(session, MINUTE):
            assert add(1, 4, 2) == 2  # 4 waits still, and holds its key
    assert windows(session) == ["k1", "k2", "k3"]


def test_typed_tasks_are_throttled(session, queue):
    typed = queue.task(type="t", unique=True, on_conflict="replace")(lambda n=1: None)
    throttled = typed.using(throttle=MINUTE)

    assert throttled.add(session, 1).is_new
    assert throttled.add(session, 1).add_outcome == "throttled"
    assert throttled.add(session, 2).is_new
    assert throttled.add_many(session, [typed.call(3), typed.call(1)]) == 1
    assert throttled.using(debounce=5).add(session, 1).add_outcome == "replaced"
    assert throttled.using(unique_key=None).add(session, 1).is_new


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unique_key": None}, "throttle must be given with a unique_key"),
        ({"debounce": 5}, "debounce must not be given with throttle"),
        ({"on_conflict": "skip"}, "on_conflict must not be given with throttle"),
        ({"throttle": 0}, "throttle must be positive, got 0"),
        ({"throttle": -1}, "throttle must be"),
        ({"throttle": "1 m"}, "throttle must be"),
        ({"max_wait": 5}, "max_wait must be given with debounce"),
    ],
)
def test_bad_input_is_refused(session, queue, options, message):
    for call in (queue.add, queue.add_many):
        with pytest.raises(InvalidTask, match=message):
            call(session, "t", [], **{"unique_key": "k", "throttle": 60, **options})


def test_every_kind_of_session_throttles(engine):
    queue = Queue()

    async def add_all() -> None:
        asyncio_engine = create_async_engine(engine.url)
        async with AsyncSession(asyncio_engine) as session, session.begin():
            assert await asyncio.create_task(outcome_async(session)) == "throttled"
        async with asyncio_engine.begin() as connection:
            assert await outcome_async(connection) == "throttled"
        await asyncio_engine.dispose()

    async def outcome_async(session) -> str:
        return (await queue.add(session, "t", unique_key="k", throttle=60)).add_outcome

    with engine.begin() as connection:
        assert outcome(connection, queue) == "added"
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn) as connection:
        connection.execute("SET DateStyle = 'German, DMY'")
        assert outcome(connection, queue) == "throttled"
    asyncio.run(add_all())


def test_a_queue_in_another_schema(engine):
    prepare(engine, schema="jobs")
    queue = Queue(schema="jobs")
    with Session(engine) as session:
        assert outcome(session, queue) == "added"
        throttled = queue.add(session, "t", unique_key="k", throttle=60)
        assert throttled.add_outcome == "throttled"
        assert isinstance(throttled, queue.task_class)


# Transactions


def test_a_caller_waits_for_one_that_has_just_begun_a_window(engine):
    queue = Queue()
    for commits, expected in ((False, "added"), (True, "throttled")):
        with Session(engine) as first, ThreadPoolExecutor() as threads:
            key = str(commits)
            assert outcome(first, queue, unique_key=key) == "added"

            def second(key: str = key) -> str:
                with Session(engine) as session, session.begin():
                    return outcome(session, queue, unique_key=key)

            adding = threads.submit(second)
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watching:
                until(lambda: watching.scalar(LOCKS))
            (first.commit if commits else first.rollback)()
        assert adding.result() == expected


def test_a_throttled_caller_locks_nothing(engine):
    queue = Queue()
    with Session(engine) as session, session.begin():
        outcome(session, queue)
    with Session(engine) as first, Session(engine) as second:
        second.execute(sa.text("SET LOCAL lock_timeout = '5s'"))
        assert outcome(first, queue) == outcome(second, queue) == "throttled"
        second.execute(sa.text("DELETE FROM apoq_throttles"))


@pytest.mark.parametrize("many", [False, True])
def test_of_many_callers_one_adds_a_task(engine, many):
    queue, count = Queue(), 16
    begin = threading.Barrier(count)

    def call(number: int) -> int:
        keys = [f"k{key}" for key in range(5)]
        begin.wait()
        with Session(engine) as session, session.begin():
            if many:
                items = keys if number % 2 else keys[::-1]
                added = queue.add_many(session, "t", items, unique_key=str, throttle=60)
            else:
                added = int(outcome(session, queue) == "added")
            if number % 4 == 0:
                session.rollback()
                return 0
            return added

    with ThreadPoolExecutor(count) as threads:
        assert sum(threads.map(call, range(count))) == (5 if many else 1)


def test_at_repeatable_read_the_caller_gets_a_serialization_failure_at_most(engine):
    queue = Queue()
    with Session(engine.execution_options(isolation_level="REPEATABLE READ")) as session:
        session.execute(sa.text("SELECT 1"))
        with Session(engine) as other, other.begin():
            outcome(other, queue)
        with pytest.raises(DBAPIError) as raised:
            outcome(session, queue)
        assert raised.value.orig.sqlstate == "40001"


# Pruning


def test_windows_that_are_over_are_deleted(engine, worker):
    queue = Queue()
    with Session(engine) as session, session.begin():
        outcome(session, queue)
        outcome(session, queue, unique_key="over", throttle=0.001)
    hold_lease(worker)

    probe.prune(worker)
    probe.own_engine(worker).dispose()

    with engine.connect() as connection:
        assert windows(connection) == ["k"]
