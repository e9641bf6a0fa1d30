"""A paused queue: from the commit on, no claim takes its tasks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta

import probe
import pytest
import sqlalchemy as sa
from claims import WAITS
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, Task
from apoq.errors import InvalidTask
from apoq.testing import drain

until = patience(10.0)
queue = Queue()


def add(engine, count: int = 1, type_: str = "t", queue: Queue = queue) -> None:
    with Session(engine) as session, session.begin():
        queue.add_many(session, type_, [{}] * count)


def pause(engine, queue: Queue = queue, **options) -> None:
    with Session(engine) as session, session.begin():
        queue.pause(session, **options)


def resume(engine, queue: Queue = queue, **options) -> bool:
    with Session(engine) as session, session.begin():
        return queue.resume(session, **options)


def states(engine) -> Counter[str]:
    with engine.connect() as connection:
        return Counter(connection.scalars(sa.select(Task.state)))


def rows(engine) -> list[dict]:
    with engine.connect() as connection:
        found = connection.execute(sa.text("SELECT * FROM apoq_pauses ORDER BY type"))
        return list(map(dict, found.mappings()))


@pytest.fixture
def ran(worker) -> list[str]:
    """The types of the tasks that have run."""
    ran: list[str] = []
    for type_ in ("t", "u"):
        worker.use(type_, lambda task: ran.append(task.type))
    return ran


class TestAPause:
    def test_no_task_of_a_paused_queue_runs_until_it_is_resumed(self, engine, worker, ran):
        pause(engine)
        add(engine, 3)

        assert worker.work() is None
        assert resume(engine)
        assert worker.work() is not None
        assert not resume(engine)

    def test_it_takes_effect_with_the_callers_commit(self, engine, worker, ran):
        add(engine)
        with Session(engine) as session, session.begin():
            queue.pause(session)
            assert worker.work() is not None  # not yet
            session.rollback()
        add(engine)
        assert worker.work() is not None  # never

    def test_one_type_is_paused_and_the_others_are_not(self, engine, worker, ran):
        pause(engine, type="t")
        add(engine, 2, "t")
        add(engine, 2, "u")

        assert [worker.work().type for _ in range(2)] == ["u", "u"]
        assert worker.work() is None
        assert not resume(engine)
        assert resume(engine, type="t")
        assert worker.work().type == "t"

    def test_other_queues_go_on(self, engine, make_worker):
        other = Queue("other")
        worker = make_worker(queue, other)
        worker.use("t", lambda task: None)
        pause(engine)
        add(engine)
        add(engine, queue=other)

        assert worker.work().queue == "other"
        assert worker.work() is None

    def test_who_paused_it_since_when_and_why_is_stored(self, engine):
        pause(engine, reason="the mail server is down")
        (first,) = rows(engine)
        pause(engine, reason="still", until=timedelta(hours=1))
        (second,) = rows(engine)

        with engine.connect() as connection:
            assert first["paused_by"] == connection.scalar(sa.text("SELECT session_user"))
        assert first["reason"] == "the mail server is down"
        assert first["resume_at"] is None
        assert (second["paused_at"], second["reason"]) == (first["paused_at"], "still")
        assert timedelta(minutes=59) < second["resume_at"] - datetime.now(UTC) < timedelta(minutes=61)

    def test_one_that_has_ended_by_itself_is_no_pause_any_more(self, engine):
        pause(engine, until=0.01)
        (ended,) = rows(engine)
        until(lambda: datetime.now(UTC) > ended["resume_at"])

        pause(engine)
        (again,) = rows(engine)
        pause(engine, until=0.01)
        until(lambda: datetime.now(UTC) > rows(engine)[0]["resume_at"])

        assert again["paused_at"] > ended["resume_at"]
        assert resume(engine) is False

    def test_it_ends_by_itself_and_nobody_has_to_wake_up_the_worker(self, engine, make_worker):
        worker = make_worker(poll_interval=timedelta(hours=1))
        ran = threading.Event()
        worker.use("t", lambda task: ran.set())
        pause(engine, until=1.0)
        add(engine)
        began = time.monotonic()
        worker.start()

        assert ran.wait(10)
        assert 0.7 < time.monotonic() - began < 3.0

    def test_a_notification_resumes_it_at_once(self, engine, make_worker):
        worker = make_worker(poll_interval=timedelta(hours=1))
        ran = threading.Event()
        worker.use("t", lambda task: ran.set())
        pause(engine)
        add(engine)
        worker.start()
        until(lambda: probe.awaited(worker) and probe.is_idle(worker))

        resume(engine)

        assert ran.wait(2)

    def test_retries_that_become_due_wait(self, engine, worker, ran):
        add(engine)
        with engine.begin() as connection:
            connection.execute(sa.update(Task).values(fail_count=1, attempt=1))
        pause(engine)

        assert worker.work() is None
        assert states(engine) == {"pending": 1}

    @pytest.mark.parametrize("kind", ["session", "Core", "psycopg", "asyncio"])
    def test_every_kind_of_session(self, engine, worker, ran, kind):
        add(engine)
        if kind == "session":
            pause(engine)
        elif kind == "Core":
            with engine.begin() as connection:
                queue.pause(connection)
        elif kind == "psycopg":
            with engine.begin() as connection:
                queue.pause(connection.connection.driver_connection)
        else:
            asyncio.run(self.pause_async(engine))

        assert worker.work() is None
        assert len(rows(engine)) == 1

    async def pause_async(self, engine) -> None:
        own = create_async_engine(engine.url)
        async with own.begin() as connection:
            await queue.pause(connection)
            assert await queue.resume(connection)
            await queue.pause(connection)
        await own.dispose()

    def test_a_schema_has_pauses_of_its_own(self, engine, make_worker):
        from apoq import prepare

        prepare(engine, schema="tenant")
        theirs = Queue(schema="tenant")
        worker = make_worker(queue, theirs)
        worker.use("t", lambda task: None)
        pause(engine, theirs)
        add(engine)
        add(engine, queue=theirs)

        assert worker.work() is not None
        assert worker.work() is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"until": datetime(2020, 1, 1, tzinfo=UTC)}, "until must be in the future"),
        ({"until": datetime(2040, 1, 1)}, "until must have a time zone"),  # noqa: DTZ001
        ({"until": -5}, "until"),
        ({"until": 0}, "until must be a positive duration"),
        ({"until": "tomorrow"}, "until"),
        ({"reason": None}, "reason must be text"),
        ({"reason": "a\0b"}, "reason can't hold U\\+0000"),
        ({"reason": "a\ud800b"}, "reason can't hold a lone surrogate"),
        ({"reason": "a" * 1_001}, "reason must have at most 1,000 characters, got 1,001"),
        ({"type": ""}, "must not be empty"),
        ({"type": 7}, "must be a string"),
    ],
    ids=str,
)
def test_nonsense_is_refused_before_anything_is_sent(engine, options, said):
    with Session(engine) as session, pytest.raises(InvalidTask, match=said):
        queue.pause(session, **options)
    assert rows(engine) == []


class TestTasksThatWereClaimedAhead:
    def test_are_released_at_once_and_lose_no_attempt(self, engine, make_worker):
        worker = make_worker(concurrency=1, poll_interval=timedelta(hours=1))
        may_end, ran = threading.Event(), []
        worker.use("t", lambda task: ran.append(task.id) or time.sleep(0.001))
        worker.use("hold", lambda task: may_end.wait(10))
        add(engine, 200)
        add(engine, 1, "hold")
        add(engine, 2_000)
        worker.start()
        until(lambda: len(ran) == 200 and states(engine)["running"] > 1)

        pause(engine)
        until(lambda: states(engine)["running"] == 1)
        began = len(ran)
        may_end.set()
        until(lambda: states(engine)["running"] == 0)

        assert len(ran) == began
        with engine.connect() as connection:
            assert set(connection.scalars(sa.select(Task.attempt).where(Task.state == "pending"))) == {0}


@pytest.mark.slow
def test_no_task_is_claimed_after_the_commit_of_a_pause(engine, make_worker):
    """A hundred times, by four workers under full load."""
    workers = [make_worker(concurrency=4) for _ in range(4)]
    for worker in workers:
        worker.use("t", lambda task: None)
        worker.start()
    latest = sa.text("SELECT max(claimed_at) FROM apoq_tasks")
    for _ in range(100):
        add(engine, 400)
        pause(engine)
        with engine.connect() as connection:
            paused_at = connection.scalar(sa.text("SELECT clock_timestamp()"))
        time.sleep(0.02)
        with engine.connect() as connection:
            claimed_at = connection.scalar(latest)
        assert claimed_at is None or claimed_at <= paused_at
        resume(engine)


def test_a_worker_of_a_paused_queue_sends_what_an_idle_one_sends(engine, make_worker):
    """Although a thousand tasks are due."""
    worker = make_worker(poll_interval=timedelta(hours=1))
    worker.use("t", lambda task: None)
    pause(engine)
    add(engine, 1_000)
    worker.start()
    until(lambda: probe.awaited(worker) and probe.is_idle(worker))

    time.sleep(0.5)

    assert probe.is_idle(worker)
    assert states(engine) == {"pending": 1_000}


def test_drain_obeys_a_pause(engine):
    with Session(engine) as session, session.begin():
        ran = []
        own = Queue("own")
        task = own.task(type="t")(lambda: ran.append(1))
        task.add(session)
        own.pause(session)
        drain(session, own)
        assert ran == []

        own.resume(session)
        drain(session, own)
        assert ran == [1]


def test_tasks_that_a_claim_is_just_taking_are_released(engine, make_worker):
    ran: list[int] = []

    def process(task) -> None:
        ran.append(task.id)
        time.sleep(0.02)

    worker = make_worker(concurrency=1, poll_interval=0.05)
    worker.use("t", process)
    worker.start()
    add(engine)
    until(lambda: states(engine) == {"completed": 1})  # so that it claims more than it has slots
    waits = sa.text(f"SELECT count(*) FROM pg_stat_activity WHERE {WAITS}")
    # The claim waits with its tasks, because another transaction has the primary key of its record.
    records = sa.text(
        "INSERT INTO apoq_claims (worker_id, number, task_ids) "
        "SELECT worker_id, number + n, '{}' FROM apoq_claims, generate_series(1, 10000) n"
    )
    with engine.connect() as looking, engine.connect() as holding:
        looking.execution_options(isolation_level="AUTOCOMMIT")
        holding.execute(records)
        with engine.begin() as connection:  # without a notification, so that the listener's thread is free
            connection.exec_driver_sql("INSERT INTO apoq_tasks (type) SELECT 't' FROM generate_series(1, 9)")
        until(lambda: looking.scalar(waits))

        pause(engine)
        until(lambda: probe.knows_of_pause(worker))

    until(lambda: states(engine)["completed"] + states(engine)["pending"] == 10)
    until(lambda: not probe.is_claiming(worker))
    assert 1 <= len(ran) <= 2  # one more may have found the free slot
    assert states(engine) == {"completed": len(ran), "pending": 10 - len(ran)}
