"""Tasks that expire: from their `expires_at` on, they don't start any more."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import probe
import psycopg
import pytest
import sqlalchemy as sa
from claims import hold_lease
from click.testing import CliRunner
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq import InvalidTask, Queue, Task
from apoq.cli import main
from apoq.core.outcomes import EXPIRED, TaskExpired
from apoq.events import TaskCancelled
from apoq.schema.statements.claim import CLAIM, EXPIRES_IN
from apoq.testing import drain, enqueued, freeze, travel
from apoq.worker.execution.attempt import Attempt

until = patience(10.0)
NOON = datetime(2031, 5, 4, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
OVER = "UPDATE apoq_tasks SET expires_at = clock_timestamp() - interval '1 s'"


def states(connection: sa.Connection | Session) -> list[str]:
    return list(connection.scalars(sa.select(Task.state).order_by(Task.id)))


def make_expired(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text(OVER))


def add(engine: sa.Engine, queue: Queue, count: int = 1, **options) -> None:
    with Session(engine) as session, session.begin():
        queue.add_many(session, "t", [{}] * count, **{"expires_in": HOUR, **options})


# Adding


def test_a_task_is_added_with_a_time_to_expire(session, queue):
    with freeze(session, NOON):
        assert queue.add(session, "t", expires_in=60).expires_at == NOON + timedelta(minutes=1)
        assert queue.add(session, "t", expires_in=HOUR).expires_at == NOON + HOUR
        assert queue.add(session, "t", expires_at=NOON, unique_key="k").expires_at == NOON
        assert queue.add(session, "t").expires_at is None
        replaced = queue.add(session, "t", unique_key="k", on_conflict="replace", expires_in=1)
        assert replaced.expires_at == NOON + timedelta(seconds=1)
        assert queue.add(session, "t", unique_key="k", on_conflict="replace").expires_at is None

    session.expire_all()
    found = session.scalars(sa.select(Task.expires_at).order_by(Task.id)).all()
    assert found == [NOON + timedelta(minutes=1), NOON + HOUR, None, None]


@pytest.mark.parametrize("count", [3, 1_005])  # the rest of a long list is sent by COPY
@pytest.mark.parametrize("options", [{}, {"unique_key": lambda data: str(data["n"])}])
def test_many_tasks_are_added_with_a_time_to_expire(session, queue, count, options):
    queue.add_many(session, "t", [{"n": n} for n in range(count)], expires_at=NOON, **options)
    queue.add_many(session, "u", [{"n": -n} for n in range(1, count)], expires_in=HOUR, **options)

    found = session.execute(
        sa.select(Task.type, sa.func.min(Task.expires_at - Task.created_at), sa.func.max(Task.expires_at))
        .group_by(Task.type)
        .order_by(Task.type)
    ).all()
    assert [each[2] for each in found][:1] == [NOON]
    assert timedelta() <= found[1][1] - HOUR < timedelta(minutes=1)


def test_every_kind_of_session_adds_such_tasks(engine, url):
    queue = Queue()
    typed = queue.task(type="t")(lambda n=1: None)

    async def add_all(url: str) -> None:
        engine = create_async_engine(url)
        async with AsyncSession(engine) as session, session.begin():
            assert (await queue.add(session, "t", expires_at=NOON)).expires_at == NOON
            assert (await typed.using(expires_at=NOON).add(session)).expires_at == NOON
        async with engine.begin() as connection:
            assert isinstance(connection, AsyncConnection)
            assert (await queue.add(connection, "t", expires_at=NOON)).expires_at == NOON
        await engine.dispose()

    with Session(engine) as session, session.begin():
        assert typed.using(expires_at=NOON).add(session).expires_at == NOON
    with engine.begin() as connection:
        assert queue.add(connection, "t", expires_at=NOON).expires_at == NOON
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn) as connection:
        connection.execute("SET DateStyle = 'German, DMY'")
        assert queue.add(connection, "t", expires_at=NOON).expires_at == NOON
    asyncio.run(
        add_all(engine.url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False))
    )
    with engine.connect() as connection:
        assert connection.scalars(sa.select(Task.expires_at)).all() == [NOON] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expires_in": 0}, "expires_in must be positive, got 0"),
        ({"expires_in": -1}, "expires_in must be"),
        ({"expires_in": "1 h"}, "expires_in must be"),
        ({"expires_at": 7}, "expires_at must be a datetime, got 7"),
        ({"expires_at": datetime(2031, 5, 4)}, "expires_at must have a time zone"),  # noqa: DTZ001
        ({"expires_at": NOON, "expires_in": 1}, "can't both be given"),
        ({"expires_in": 60, "delay": 60}, "expires_in must be later than delay"),
        ({"expires_in": 5, "debounce": 5, "unique_key": "k"}, "expires_in must be later than delay"),
        ({"expires_at": NOON, "process_at": NOON}, "expires_at must be later than process_at"),
    ],
)
def test_times_that_make_no_sense_are_refused(session, queue, options, message):
    for call in (queue.add, queue.add_many):
        with pytest.raises(InvalidTask, match=message):
            call(session, "t", [], **options)


def test_the_options_of_a_typed_task_replace_each_other(session, queue):
    typed = queue.task(type="t")(lambda: None)
    hour = typed.using(expires_in=HOUR)

    assert hour.using(expires_at=NOON).add(session).expires_at == NOON
    assert hour.using(expires_in=None).add(session).expires_at is None


# Starting


def test_an_expired_task_does_not_start(engine, queue, worker):
    worker.use("t", lambda _task: pytest.fail("it has started"))
    told: list[TaskCancelled] = []
    worker.events.on(TaskCancelled, told.append)
    add(engine, queue, unique_key="k", unique_until="ended")
    make_expired(engine)

    task = worker.work()

    assert (task.state, task.attempt, task.fail_count, task.held_unique_key) == ("cancelled", 0, 0, None)
    assert task.cancelled_at >= task.expires_at
    assert task.error == EXPIRED
    assert task.error["class"] == "TaskExpired"
    assert [(event.id, type(event.error)) for event in told] == [(task.id, TaskExpired)]


def test_a_started_worker_ends_expired_tasks_and_runs_the_others(engine, make_worker):
    queue, ran = Queue(), []
    add(engine, queue, 5)
    make_expired(engine)
    add(engine, queue, 5)
    worker = make_worker(concurrency=2)
    worker.use("t", lambda task: ran.append(task.id))

    worker.start()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        until(lambda: states(connection) == ["cancelled"] * 5 + ["completed"] * 5)
    assert sorted(ran) == [6, 7, 8, 9, 10]


def test_a_coroutine_does_not_start_either(engine, queue, worker):

    async def run(_task) -> None:
        pytest.fail("it has started")

    worker.use("t", run)
    add(engine, queue)
    make_expired(engine)

    assert worker.work().state == "cancelled"


def test_a_retry_does_not_start_after_the_expiry(session, queue, worker):
    worker.use("t", lambda _task: 1 / 0, retry_delay=60)
    with freeze(session, NOON):
        task = queue.add(session, "t", expires_in=HOUR)
        drain(session, worker, errors="record")
        assert (task.state, task.attempt) == ("pending", 1)
        with travel(session, HOUR):
            drain(session, worker)

    assert (task.state, task.attempt, task.fail_count) == ("cancelled", 1, 1)
    assert task.error["class"] == "TaskExpired"


@pytest.mark.parametrize(("after", "state"), [(HOUR / 2, "completed"), (HOUR, "cancelled")])
def test_drain_knows_when_a_task_expires(session, queue, worker, after, state):
    worker.use("t", lambda _task: None)
    with freeze(session, NOON):
        task = queue.add(session, "t", expires_in=HOUR)
        with travel(session, after):
            drain(session, worker)

    assert task.state == state


def test_a_prefetched_task_is_checked_again_when_it_starts(engine, worker):
    worker.use("t", lambda _task: pytest.fail("it has started"))
    add(engine, Queue(), expires_in=0.2)
    hold_lease(worker)
    [row] = probe.claim(worker, 1, 1)
    assert row[EXPIRES_IN] > 0
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        until(lambda: connection.scalar(sa.select(sa.func.clock_timestamp() > sa.func.max(Task.expires_at))))

    end = probe.executor(worker).run(probe.executor(worker).attempt_of(row))

    assert isinstance(end.outcome, TaskExpired)
    assert (end.settlement.state, end.settlement.attempt) == ("cancelled", 0)
    probe.own_engine(worker).dispose()


def test_it_is_checked_by_the_time_since_the_claim():
    now = 1_000.0
    row = [None] * (CLAIM + 1)
    row[CLAIM] = SimpleNamespace(sent_at=now, signal=None)
    row[2] = "{}"

    def starts(expires_in: float | None, at: float, monkeypatch) -> bool:
        row[EXPIRES_IN] = expires_in
        monkeypatch.setattr("apoq.worker.execution.attempt.time.monotonic", lambda: at)
        try:
            Attempt(tuple(row), None, None).read()
        except TaskExpired:
            return False
        return True

    with pytest.MonkeyPatch.context() as patch:
        assert starts(None, now, patch)
        assert starts(2.0, now + 1.9, patch)
        assert starts(float("inf"), now + 1e9, patch)
        assert not starts(2.0, now + 2.0, patch)
        assert not starts(0.0, now, patch)
        assert not starts(float("-inf"), now, patch)


def test_large_data_of_an_expired_task_is_not_read(engine, queue, worker):
    worker.use("t", lambda _task: None)
    with Session(engine) as session, session.begin():
        queue.add(session, "t", {"text": "x" * 20_000}, expires_in=HOUR)
    make_expired(engine)

    assert worker.work().state == "cancelled"


# Tasks that nobody claims


def test_tasks_that_are_not_claimed_are_ended_by_the_maintenance(engine, make_worker):
    queue, other = Queue(), Queue("other")
    add(engine, queue, 3, unique_key=lambda _data: None)
    add(engine, other)
    with Session(engine) as session, session.begin():
        session.execute(sa.update(Task).where(Task.id == 3).values(state="waiting", waiting_for="key"))
        queue.pause(session)
        queue.add(session, "t", unique_key="k", expires_in=HOUR)
    make_expired(engine)
    with Session(engine) as session, session.begin():
        queue.add(session, "t", expires_in=HOUR)
        queue.add(session, "t")
    worker = make_worker(queue)
    hold_lease(worker)

    probe.prune(worker)
    probe.own_engine(worker).dispose()

    with Session(engine) as session:
        assert states(session) == [*["cancelled"] * 3, "pending", "cancelled", "pending", "pending"]
        assert session.get(Task, 1).error == EXPIRED
        assert session.get(Task, 5).held_unique_key is None


# Afterwards


@pytest.mark.as_owner("only an operator retries tasks with unique keys")
def test_an_expired_task_is_not_retried(session, queue, worker):
    worker.use("t", lambda _task: None)
    with freeze(session, NOON):
        task = queue.add(session, "t", expires_in=HOUR)
        unique = queue.add(session, "t", expires_in=HOUR, unique_key="k")
        drain(session, worker)
        assert queue.retry(session, task)
        assert queue.retry(session, unique)
        with travel(session, HOUR):
            drain(session, worker)
            assert [task.state, unique.state] == ["cancelled", "cancelled"]
            assert not queue.retry(session, task)
            assert not queue.retry(session, unique)


def test_a_schedule_makes_tasks_that_expire(session, queue, worker):
    worker.use("t", lambda _task: None)
    with freeze(session, NOON):
        made = queue.schedule(session, "s", "t", cron="@daily", expires_in=HOUR)
        assert made.expires_in == HOUR
        with travel(session, timedelta(hours=12)):
            assert [task.state for task in drain(session, worker)] == ["completed"]
    [task] = session.scalars(sa.select(Task))
    assert task.expires_at == task.process_at + HOUR


def test_the_command_line_adds_and_shows_such_tasks(engine):
    cli = CliRunner(env={"APOQ_DATABASE_URL": engine.url.render_as_string(hide_password=False)})
    added = cli.invoke(main, ["add", "t", "--expires-in", "1h", "--unique-key", "k"])
    again = cli.invoke(main, ["add", "t", "--unique-key", "k"])
    shown = cli.invoke(main, ["show", "1"])

    assert (added.output, again.output) == (
        "Added task 1.\n",
        "Nothing was added: task 1 has the unique key 'k'.\n",
    )
    assert "expires" in shown.output


def test_enqueued_finds_them(session, queue):
    task = queue.add(session, "t", {"n": 1}, expires_in=HOUR)

    assert enqueued(session, "t", n=1) == [task]
