"""Schedules in a test's transaction: `travel` and `freeze` make ticks due, and `drain` runs them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from apoq import InvalidSchedule, Queue, RunningTask, Schedule, Worker
from apoq.testing import assert_enqueued, drain, freeze, travel

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)  # a Monday


@pytest.fixture
def found(queue) -> list[datetime | None]:
    found: list[datetime | None] = []

    @queue.task(cron="0 9 * * MON-FRI", timezone="Europe/Berlin", type="report")
    def report(task: RunningTask) -> None:
        found.append(task.tick_at)

    return found


def test_a_schedule_of_the_code_runs_when_its_time_has_come(session, queue, found):
    with freeze(session, NOON):
        assert drain(session, queue) == []

        with travel(session, timedelta(hours=18)):
            assert drain(session, queue) == []
        with travel(session, timedelta(hours=20)):
            (task,) = drain(session, queue)
            assert drain(session, queue) == []

    assert found == [datetime(2026, 5, 5, 7, tzinfo=UTC)]
    assert (task.schedule, task.tick_at, task.state) == ("report", found[0], "completed")


def test_the_last_tick_runs_after_a_long_time(session, queue, found):
    with freeze(session, NOON), travel(session, timedelta(days=14)):
        drain(session, queue)

    assert found == [datetime(2026, 5, 18, 7, tzinfo=UTC)]


def test_travelling_from_the_present_is_enough(session, queue, found):
    with travel(session, timedelta(days=7)):
        drain(session, queue)

    assert len(found) == 1


def test_nothing_ticks_unless_the_test_sets_a_clock(session, queue, found):
    with freeze(session, NOON):
        drain(session, queue)
    session.execute(sa.update(Schedule).values(next_at=NOON))

    assert drain(session, queue) == []
    assert found == []


def test_a_schedule_that_the_test_has_added_runs(session, queue):
    ran = []

    @queue.task(type="digest")
    def send_digest(user_id: int) -> None:
        ran.append(user_id)

    with freeze(session, NOON):
        queue.schedule(session, "digest-7", send_digest.call(user_id=7), every=timedelta(hours=1))
        with travel(session, timedelta(hours=3)):
            drain(session, queue)

    assert ran == [7]


def test_a_worker_with_a_plain_processor_works_as_well(session, shared_engine):
    ran = []
    other = Queue("other")
    worker = Worker(shared_engine, Queue(), other)
    worker.use("t", lambda task: ran.append((task.queue, task.data, task.tick_at)))

    with freeze(session, NOON):
        other.schedule(session, "x", "t", {"a": 1}, cron="30 12 * * *")
        with travel(session, timedelta(hours=1)):
            drain(session, worker)

    assert ran == [("other", {"a": 1}, NOON + timedelta(minutes=30))]


def test_what_a_schedule_has_added_can_be_asserted(session, queue, found):
    with freeze(session, NOON):
        queue.schedule(session, "x", "other", {"a": 1}, every=60)
        with travel(session, timedelta(days=1)):
            drain(session, queue, errors="record")

    assert_enqueued(session, "other", {"a": 1})


def test_a_schedule_with_unreadable_times_is_an_error(session, queue, found):
    queue.schedule(session, "x", "report", cron="@daily")
    session.execute(sa.update(Schedule).values(cron="nonsense"))

    with travel(session, timedelta(days=2)), pytest.raises(InvalidSchedule, match="five fields"):
        drain(session, queue)


def test_it_works_with_an_asyncio_session(url, queue, found):
    async def use() -> None:
        engine = create_async_engine(url)
        async with (
            AsyncSession(engine) as session,
            freeze(session, NOON),
            travel(session, timedelta(days=1)),
        ):
            await drain(session, queue)
        await engine.dispose()

    asyncio.run(use())

    assert found == [datetime(2026, 5, 5, 7, tzinfo=UTC)]


def test_the_page_about_periodic_tasks(engine, session, run_page):
    """Run the code of periodic-tasks.md, its test, and what it schedules."""
    page = run_page("periodic-tasks.md", engine=engine)

    page["test_the_report_is_sent_on_weekdays"](session)

    with Session(engine) as committed:
        (digest,) = page["reports"].schedules(committed)
        assert (digest.name, digest.timezone, digest.data) == ("digest-7", "Asia/Tokyo", {"user_id": 7})
    assert {task.type.rpartition(".")[2] for task in page["reports"].scheduled_tasks()} == {
        "send_report",
        "poll_the_bank",
        "count_orders",
    }


def test_nothing_of_it_is_committed(engine, queue, found):
    with Session(engine) as session:
        with freeze(session, NOON), travel(session, timedelta(days=1)):
            drain(session, queue)
        session.rollback()

        assert queue.schedules(session) == []
