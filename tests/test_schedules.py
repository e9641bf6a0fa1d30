"""Schedules in the caller's transaction: adding, changing, reading and deleting them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from apoq import InvalidData, InvalidSchedule, InvalidTask, Queue, Schedule, UnsupportedSession, prepare
from apoq.schema.models import schedule_class

OPTIONS = {
    "cron": "0 9 * * MON-FRI",
    "timezone": "Europe/Berlin",
    "catch_up": "all",
    "catch_up_limit": 7,
    "not_before": timedelta(hours=3),
    "jitter": 90,
    "priority": 3,
    "retry_limit": 2,
    "retry_delay": 5,
    "timeout": timedelta(minutes=400),
    "meta": {"tenant": 7},
}

STORED = {
    **OPTIONS,
    "overlap": "allow",
    "jitter": timedelta(seconds=90),
    "retry_delay": timedelta(seconds=5),
    "every": None,
    "queue": "default",
    "name": "digest",
    "type": "send_digest",
    "data": {"user": 7},
    "origin": "added",
    "release": None,
    "last_tick_at": None,
    "last_task_id": None,
    "skipped_count": 0,
    "paused_at": None,
}


def values(schedule: Schedule) -> dict[str, object]:
    return {name: getattr(schedule, name) for name in STORED}


@contextmanager
def orm(engine):
    with Session(engine) as session, session.begin():
        yield session


@contextmanager
def scoped(engine):
    registry = scoped_session(sessionmaker(engine))
    with registry.begin():
        yield registry
    registry.remove()


@contextmanager
def core(engine):
    with engine.begin() as connection:
        yield connection


@contextmanager
def driver(engine):
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, options="-c DateStyle=German -c IntervalStyle=sql_standard") as connection:
        yield connection


@pytest.mark.parametrize("open_session", [orm, scoped, core, driver])
def test_a_schedule_is_added_changed_read_and_deleted(engine, queue, open_session):
    with open_session(engine) as session:
        added = queue.schedule(session, "digest", "send_digest", {"user": 7}, **OPTIONS)
        assert values(added) == STORED
        assert added.next_at > added.created_at

    with open_session(engine) as session:
        (found,) = queue.schedules(session)
        assert values(found) == STORED
        assert (found.next_at, found.created_at) == (added.next_at, added.created_at)
        changed = queue.schedule(session, "digest", "send_digest", {"user": 8}, every=60)
        assert (changed.every, changed.cron, changed.catch_up) == (timedelta(minutes=1), None, "latest")
        assert (changed.data, changed.meta) == ({"user": 8}, None)

    with open_session(engine) as session:
        assert queue.unschedule(session, "digest") is True
        assert queue.unschedule(session, "digest") is False
        assert queue.schedules(session) == []


@asynccontextmanager
async def async_orm(engine):
    async with AsyncSession(engine) as session, session.begin():
        yield session


@asynccontextmanager
async def async_scoped(engine):
    registry = async_scoped_session(lambda: AsyncSession(engine), scopefunc=asyncio.current_task)
    async with registry.begin():
        yield registry
    await registry.remove()


@asynccontextmanager
async def async_core(engine):
    async with engine.begin() as connection:
        yield connection


@asynccontextmanager
async def async_driver(engine):
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    async with await psycopg.AsyncConnection.connect(url) as connection:
        yield connection


@pytest.mark.parametrize("open_session", [async_orm, async_scoped, async_core, async_driver])
def test_the_same_with_asyncio(url, queue, open_session):
    async def use() -> None:
        engine = create_async_engine(url)
        async with open_session(engine) as session:
            added = await queue.schedule(session, "digest", "send_digest", {"user": 7}, **OPTIONS)
            assert values(added) == STORED
        async with open_session(engine) as session:
            (found,) = await queue.schedules(session)
            assert values(found) == STORED
            assert await queue.unschedule(session, "digest") is True
            assert await queue.schedules(session) == []
        await engine.dispose()

    asyncio.run(use())


def test_a_session_with_listeners_gets_orm_statements(engine, queue):
    """As of zope.sqlalchemy, which commits a session only after one of these."""
    seen = []
    with Session(engine) as session, session.begin():
        sa.event.listen(session, "do_orm_execute", lambda state: seen.append(state.is_orm_statement))
        for every in (60, 90):
            assert values(queue.schedule(session, "x", "t", every=every))["every"].total_seconds() == every
        assert True in seen
        assert queue.unschedule(session, "x") is True
        assert queue.schedules(session) == []


def test_a_rolled_back_schedule_does_not_exist(engine, queue):
    with Session(engine) as session:
        queue.schedule(session, "digest", "send_digest", every=60)
        session.rollback()

        assert queue.schedules(session) == []


def test_a_call_of_a_typed_task_is_scheduled(session, queue):
    @queue.task(type="digest")
    def send_digest(user_id: int, *, day: str = "today") -> None: ...

    added = queue.schedule(session, "digest-7", send_digest.call(user_id=7), cron="@daily")

    assert (added.type, added.data, added.timezone) == ("digest", {"user_id": 7}, "UTC")


def test_a_schedule_keeps_the_options_of_its_call_unless_they_are_given(session, queue):
    @queue.task
    def send_digest() -> None: ...

    call = send_digest.using(priority=5, retry_limit=7, timeout=9).call()
    schedule = queue.schedule(session, "digest", call, every=60, retry_limit=0)

    assert (schedule.priority, schedule.retry_limit, schedule.timeout) == (5, 0, timedelta(seconds=9))


def test_a_call_with_a_time_of_its_own_is_refused(session, queue):
    @queue.task
    def send_digest() -> None: ...

    with pytest.raises(InvalidTask, match="must not have delay, because the ticks decide"):
        queue.schedule(session, "digest", send_digest.using(delay=5).call(), every=60)


def test_schedules_belong_to_a_queue_and_a_schema(engine):
    prepare(engine, schema="other")
    mine, others, elsewhere = Queue(), Queue("others"), Queue(schema="other")
    with Session(engine) as session:
        for queue in (mine, others, elsewhere):
            queue.schedule(session, "same", f"of {queue!r}", every=60)
        mine.schedule(session, "another", "t", every=60)

        assert [(its.name, its.type) for its in mine.schedules(session)] == [
            ("another", "t"),
            ("same", f"of {mine!r}"),
        ]
        assert [its.type for its in others.schedules(session)] == [f"of {others!r}"]
        (found,) = elsewhere.schedules(session)
        assert (found.type, type(found)) == (f"of {elsewhere!r}", schedule_class("other"))
        assert others.unschedule(session, "same") is True
        assert len(mine.schedules(session)) == 2


def test_a_schedule_is_a_mapped_row(session, queue):
    queue.schedule(session, "digest", "send_digest", every=60)

    found = session.scalars(sa.select(Schedule).where(Schedule.every <= timedelta(hours=1))).one()

    assert repr(found).startswith("<Schedule queue='default' name='digest' every=datetime.timedelta(")


def test_only_new_times_move_the_next_tick(session, queue):
    def write(**options: object) -> datetime:
        return queue.schedule(session, "digest", "send_digest", **options).next_at

    first = write(cron="0 9 1 1 *")
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    session.execute(sa.update(Schedule).values(next_at=long_ago))

    assert write(cron="0 9 1 1 *", priority=5, data={"a": 1}, jitter=5) == long_ago
    assert write(cron="0  9 1   1 *") == long_ago
    assert write(cron="0 10 1 1 *") == first + timedelta(hours=1)
    assert write(cron="0 10 1 1 *", timezone="Asia/Tokyo") != first + timedelta(hours=1)
    assert write(every=timedelta(days=1)) > datetime.now(UTC)


def test_a_changed_schedule_stays_paused(session, queue):
    queue.schedule(session, "digest", "send_digest", every=60)
    session.execute(sa.update(Schedule).values(paused_at=sa.func.now()))

    assert queue.schedule(session, "digest", "send_digest", every=90).paused_at is not None


def test_a_name_with_another_type_is_refused(session, queue):
    queue.schedule(session, "digest", "send_digest", every=60)

    with pytest.raises(InvalidSchedule, match="'digest' must keep its type, 'send_digest', got 'other'"):
        queue.schedule(session, "digest", "other", every=60)

    (found,) = queue.schedules(session)
    assert found.type == "send_digest"


def test_a_schedule_that_code_declares_is_not_changed(session, queue):
    queue.schedule(session, "digest", "send_digest", every=60)
    session.execute(sa.update(Schedule).values(origin="code"))

    with pytest.raises(InvalidSchedule, match=r"must not be added, because @queue\.task declares it"):
        queue.schedule(session, "digest", "send_digest", every=90)


def test_two_transactions_add_the_same_schedule(engine, queue):
    with Session(engine) as first, Session(engine) as second:
        first.execute(sa.text("SET lock_timeout = '10s'"))
        queue.schedule(first, "digest", "send_digest", every=60)
        second.execute(sa.text("SET lock_timeout = '100ms'"))
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            queue.schedule(second, "digest", "send_digest", every=90)
        second.rollback()
        first.commit()

        assert queue.schedule(second, "digest", "send_digest", every=90).every == timedelta(seconds=90)
        second.commit()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "complaint"),
    [
        (("", "t"), {"every": 60}, InvalidSchedule, "a schedule's name must not be empty"),
        ((5, "t"), {"every": 60}, InvalidSchedule, "a schedule's name must be a string"),
        (("n" * 256, "t"), {"every": 60}, InvalidSchedule, "at most 255 characters"),
        (("n", ""), {"every": 60}, InvalidTask, "a task's type must not be empty"),
        (("n", "t"), {}, InvalidSchedule, "a schedule must have times"),
        (("n", "t"), {"cron": "0 25 * * *"}, InvalidSchedule, "the hour '25'"),
        (("n", "t"), {"every": 60, "priority": 10**6}, InvalidTask, "priority must be"),
        (("n", "t"), {"every": 60, "meta": []}, InvalidTask, "meta must be a dict"),
        (("n", "t", {"a": object()}), {"every": 60}, InvalidData, r"data\['a'\]"),
    ],
)
def test_invalid_schedules_are_refused(session, queue, arguments, options, error, complaint):
    with pytest.raises(error, match=complaint):
        queue.schedule(session, *arguments, **options)

    assert queue.schedules(session) == []


def test_a_task_instead_of_a_call_is_refused(session, queue):
    @queue.task(type="digest")
    def send_digest() -> None: ...

    with pytest.raises(InvalidSchedule, match=r"call must be a call, such as task\.call\(…\)"):
        queue.schedule(session, "digest", send_digest, every=60)
    with pytest.raises(InvalidSchedule, match="data must be given with a type only"):
        queue.schedule(session, "digest", send_digest.call(), {"a": 1}, every=60)


def test_a_forgotten_session_is_named(queue):
    with pytest.raises(
        UnsupportedSession, match=r"queue\.schedule\(session, 'digest', 'send_digest', every=60\)"
    ):
        queue.schedule("digest", "send_digest", every=60)
    with pytest.raises(UnsupportedSession, match=r"queue\.schedules\(session\)"):
        queue.schedules()


def test_a_decorated_function_has_a_schedule(queue):
    @queue.task(cron="0 9 * * MON-FRI", timezone="Europe/Berlin", type="report")
    def report(day: str = "today") -> None: ...

    @queue.task(every=timedelta(minutes=5))
    def poll() -> None: ...

    @queue.task
    def plain() -> None: ...

    assert report.schedule["timezone"] == "Europe/Berlin"
    assert report.scheduled_data() == {}
    assert poll.schedule["every"] == timedelta(minutes=5)
    assert plain.schedule is None
    assert report("tomorrow") is None


def test_a_decorated_function_must_be_callable_without_arguments(queue):
    with pytest.raises(
        InvalidSchedule, match=r"without arguments, got 'digest', whose parameters are \(user_id: int\)"
    ):

        @queue.task(cron="@daily", type="digest")
        def send_digest(user_id: int) -> None: ...

    assert queue.tasks == {}


def test_a_decorator_with_invalid_times_is_refused(queue):
    with pytest.raises(InvalidSchedule, match="the minute '60'"):

        @queue.task(cron="60 * * * *")
        def report() -> None: ...

    assert queue.tasks == {}
