"""Ticks become tasks: exactly once, whoever ticks, and whatever happens to them."""

from __future__ import annotations

import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from test_cron import expected
from ticking import start_at, tick_at
from waiting import patience

from apoq import Queue, Schedule, Task
from apoq.core.schedules import offset
from apoq.postgres.connections import compiled, own_engine
from apoq.schema.statements.ticks import lock_due, next_ticks
from apoq.worker.maintenance import ticks as worker_ticks

until = patience(20.0)

START = datetime(2026, 5, 4, 10, tzinfo=UTC)
QUARTER = timedelta(minutes=15)
ZONES = ["Europe/Berlin", "America/Santiago", "Australia/Lord_Howe", "Pacific/Chatham", "UTC"]


def add(engine: sa.Engine, name: str = "report", *, at: datetime = START, **options: object) -> None:
    given = {"cron": "*/15 * * * *"} | options
    if "every" in options:
        del given["cron"]
    with Session(engine) as session, session.begin():
        Queue().schedule(session, name, "t", {"of": name}, **given)
        session.execute(sa.update(Schedule).where(Schedule.name == name).values(next_at=at))


def tick(engine: sa.Engine, now: datetime) -> None:
    with engine.begin() as connection:
        tick_at(connection, now)


def ticks(engine: sa.Engine, name: str = "report") -> list[datetime]:
    with engine.connect() as connection:
        return list(
            connection.scalars(sa.select(Task.tick_at).where(Task.schedule == name).order_by(Task.id))
        )


def load(engine: sa.Engine) -> Schedule:
    with Session(engine) as session:
        return session.scalars(sa.select(Schedule)).one()


def settle(engine: sa.Engine, **values: object) -> None:
    with engine.begin() as connection:
        connection.execute(sa.update(Task).values(values))


def test_a_tick_becomes_a_task(engine):
    add(engine, priority=4, retry_limit=2, retry_delay=3, timeout=60, meta={"a": 1})

    tick(engine, START + timedelta(seconds=2))

    with Session(engine) as session:
        task = session.scalars(sa.select(Task)).one()
        assert (task.queue, task.type, task.data, task.state) == ("default", "t", {"of": "report"}, "pending")
        assert (task.schedule, task.tick_at) == ("report", START)
        assert task.process_at == START + timedelta(seconds=2)
        assert (task.priority, task.retry_limit, task.meta) == (4, 2, {"a": 1})
        assert (task.retry_delay, task.timeout) == (timedelta(seconds=3), timedelta(minutes=1))
        schedule = session.scalars(sa.select(Schedule)).one()
        assert (schedule.last_tick_at, schedule.next_at) == (START, START + QUARTER)
        assert (schedule.last_task_id, schedule.skipped_count) == (task.id, 0)


def test_nothing_happens_before_the_tick_or_twice_at_it(engine):
    add(engine)

    tick(engine, START - timedelta(microseconds=1))
    assert ticks(engine) == []
    tick(engine, START)
    tick(engine, START)
    tick(engine, START - timedelta(hours=1))  # the clock steps back
    tick(engine, START + timedelta(minutes=14))

    assert ticks(engine) == [START]


def test_the_data_is_that_of_the_moment_of_the_tick(engine, queue):
    add(engine)
    with Session(engine) as session, session.begin():
        queue.schedule(session, "report", "t", {"new": True}, cron="*/15 * * * *")

    tick(engine, START)

    with Session(engine) as session:
        assert session.scalars(sa.select(Task.data)).all() == [{"new": True}]


def test_intervals_tick_at_their_multiples(engine):
    add(engine, every=timedelta(minutes=10), at=START)

    for minutes in range(35):
        tick(engine, START + timedelta(minutes=minutes, seconds=30))
        settle(engine, state="completed")

    assert [at.minute for at in ticks(engine)] == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, [45]),
        ({"catch_up": "all"}, [0, 15, 30, 45]),
        ({"catch_up": "all", "catch_up_limit": 3}, [15, 30, 45]),
        ({"catch_up": "all", "not_before": timedelta(minutes=30)}, [30, 45]),
        ({"catch_up": "skip"}, []),
        ({"catch_up": "skip", "not_before": timedelta(minutes=30)}, [45]),
        ({"not_before": timedelta(minutes=1)}, []),
    ],
)
def test_missed_ticks_are_caught_up(engine, options, found):
    add(engine, **options)

    tick(engine, START + timedelta(minutes=50))
    tick(engine, START + timedelta(minutes=51))

    assert [at.minute for at in ticks(engine)] == found
    schedule = load(engine)
    assert (schedule.last_tick_at, schedule.next_at) == (START + 3 * QUARTER, START + 4 * QUARTER)
    assert schedule.skipped_count == 0


@pytest.mark.parametrize("state", ["pending", "waiting", "running"])
def test_a_tick_is_skipped_while_the_last_task_has_not_ended(engine, state):
    add(engine)
    tick(engine, START)
    settle(engine, state=state)

    tick(engine, START + QUARTER)
    tick(engine, START + 2 * QUARTER)

    assert ticks(engine) == [START]
    schedule = load(engine)
    assert (schedule.skipped_count, schedule.last_tick_at) == (2, START + 2 * QUARTER)

    settle(engine, state="failed")
    tick(engine, START + 3 * QUARTER)
    assert ticks(engine) == [START, START + 3 * QUARTER]


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled"])
def test_an_ended_task_does_not_block_the_next_tick(engine, state):
    add(engine)
    tick(engine, START)
    settle(engine, state=state)

    tick(engine, START + QUARTER)

    assert ticks(engine) == [START, START + QUARTER]


def test_a_pruned_task_does_not_block_the_next_tick_nor_reopen_the_last_one(engine):
    add(engine)
    tick(engine, START)
    with engine.begin() as connection:
        connection.execute(sa.delete(Task))

    tick(engine, START + timedelta(minutes=1))
    assert ticks(engine) == []
    tick(engine, START + QUARTER)
    assert ticks(engine) == [START + QUARTER]


def test_overlapping_tasks_can_be_allowed(engine):
    add(engine, overlap="allow")

    for number in range(3):
        tick(engine, START + number * QUARTER)

    assert ticks(engine) == [START, START + QUARTER, START + 2 * QUARTER]


def test_a_task_added_by_hand_does_not_block_a_tick(engine, queue):
    add(engine)
    with Session(engine) as session, session.begin():
        queue.add(session, "t")

    tick(engine, START)

    assert ticks(engine) == [START]


def test_jitter_delays_the_task_and_not_the_tick(engine):
    add(engine, jitter=timedelta(minutes=10))

    tick(engine, START + timedelta(seconds=1))

    delay = offset("default", "report", timedelta(minutes=10))
    with Session(engine) as session:
        task = session.scalars(sa.select(Task)).one()
        assert (task.tick_at, task.process_at) == (START, START + delay)


def test_a_paused_schedule_does_not_tick_and_catches_up_afterwards(engine):
    add(engine)
    with engine.begin() as connection:
        start_at(connection, START, paused_at=sa.func.now())
    tick(engine, START + timedelta(hours=1))
    assert ticks(engine) == []

    with engine.begin() as connection:
        connection.execute(sa.update(Schedule).values(paused_at=None))
    tick(engine, START + timedelta(hours=1, minutes=1))

    assert ticks(engine) == [START + timedelta(hours=1)]


def test_only_schedules_of_the_given_queues_tick(engine):
    for name in ("a", "b", "c"):
        with Session(engine) as session, session.begin():
            Queue(name).schedule(session, "same", "t", every=60)
    with engine.begin() as connection:
        start_at(connection, START)
        ticked = tick_at(connection, START, queues=["a", "c"])

    assert ticked.queues == {"a", "c"}
    with engine.connect() as connection:
        assert sorted(connection.scalars(sa.select(Task.queue))) == ["a", "c"]


def test_a_schedule_that_another_session_has_locked_is_left_to_it(engine):
    add(engine, "locked")
    add(engine, "free")
    with engine.begin() as connection:
        connection.execute(sa.select(Schedule).where(Schedule.name == "locked").with_for_update())
        tick(engine, START)
        assert (ticks(engine, "locked"), ticks(engine, "free")) == ([], [START])

    tick(engine, START + timedelta(minutes=1))
    assert ticks(engine, "locked") == [START]


def test_one_transaction_ticks_a_bounded_number(engine):
    for number in range(7):
        add(engine, f"n{number}", at=START + timedelta(seconds=number))
    with engine.begin() as connection:
        sizes = [len(tick_at(connection, START + QUARTER, at_most=3).locked) for _ in range(4)]

    assert sizes == [3, 3, 1, 0]


def test_one_transaction_adds_a_bounded_number_of_tasks(engine):
    for number in range(5):
        add(engine, f"n{number}", cron="* * * * *", catch_up="all", catch_up_limit=400)
    with engine.begin() as connection:
        sizes = [len(tick_at(connection, START + timedelta(days=1)).locked) for _ in range(3)]

    assert sizes == [3, 2, 0]
    assert sum(len(ticks(engine, f"n{number}")) for number in range(5)) == 2_000


def test_one_transaction_takes_a_bounded_time(engine, monkeypatch):
    monkeypatch.setattr(worker_ticks, "MAX_SECONDS", 0.0)
    for number in range(3):
        add(engine, f"n{number}")
    with engine.begin() as connection:
        sizes = [len(tick_at(connection, START).locked) for _ in range(4)]

    assert sizes == [1, 1, 1, 0]


@pytest.mark.parametrize(
    "columns",
    [
        {"cron": "nonsense"},
        {"cron": None},
        {"timezone": "Mars/Base"},
        {"cron": None, "every": timedelta(0)},
        {"cron": None, "every": timedelta(days=-3)},
        {"cron": None, "every": sa.text("'178000000 years'::interval")},
        {"jitter": sa.text("'178000000 years'::interval")},
        {"not_before": sa.text("'178000000 years'::interval")},
    ],
)
def test_a_schedule_with_unreadable_times_is_left_alone_and_others_tick(engine, columns):
    add(engine, "bad")
    add(engine, "good")
    with engine.begin() as connection:
        connection.execute(sa.update(Schedule).where(Schedule.name == "bad").values(columns))

    with engine.begin() as connection:
        ticked = tick_at(connection, START)

    assert [key.name for key in ticked.unreadable] == ["bad"]
    assert (ticks(engine, "bad"), ticks(engine, "good")) == ([], [START])


@pytest.mark.parametrize("at", ["-infinity", "0044-03-15 BC", "0001-01-01"])
def test_a_schedule_whose_next_tick_is_beyond_the_calendar_ticks(engine, at):
    add(engine)
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE apoq_schedules SET next_at = CAST(:at AS timestamptz)"), {"at": at}
        )

    tick(engine, START)

    assert ticks(engine) == [START]


def test_a_number_of_skipped_ticks_can_not_overflow(engine):
    add(engine)
    tick(engine, START)
    with engine.begin() as connection:
        connection.execute(sa.update(Schedule).values(skipped_count=2**31 - 1))

    tick(engine, START + QUARTER)

    assert load(engine).skipped_count == 2**31 - 1


def test_many_schedules_cost_nothing_while_none_is_due(engine):
    """Neither do paused ones, and due ones of other queues, of which no worker may be alive."""
    with engine.begin() as connection:
        connection.exec_driver_sql("""
            INSERT INTO apoq_schedules (queue, name, type, every, next_at, paused_at)
            SELECT CASE n %% 3 WHEN 0 THEN 'others' ELSE 'default' END, 'n' || n, 't', '1 h',
                CASE n %% 3 WHEN 1 THEN now() + interval '1 h' ELSE now() - interval '1 h' END,
                CASE n %% 3 WHEN 2 THEN now() END
            FROM generate_series(1, 10000) AS n
        """)
        connection.exec_driver_sql("ANALYZE apoq_schedules")
    own = own_engine(engine)
    parameters = {
        "queues": ["default", "empty"],
        "passed_queues": ["default"],
        "passed_names": ["n1"],
        "at": None,
        "at_most": 100,
    }

    with own.connect() as connection, connection.begin():
        for statement in (next_ticks(None), lock_due(None)):
            text, constants = compiled(statement)
            plan = connection.exec_driver_sql(
                f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {text}", {**constants, **parameters}
            ).scalar_one()[0]["Plan"]
            read = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
            assert read < 30, plan
    own.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("zone", ZONES)
def test_a_year_of_ticks_by_three_sessions(engine, zone):
    year, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
    expressions = ["30 2 * * *", "0 0 * * *", "0 */3 * * *", "*/30 1-3 * * SUN"]
    for expression in expressions:
        add(engine, expression, cron=expression, timezone=zone, catch_up="all", at=year)
    days = [year + timedelta(days=number) for number in range(1, 366)]
    together = threading.Barrier(3)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with engine.connect() as connection:
                for day in days:
                    together.wait(60)
                    with connection.begin():
                        tick_at(connection, day)
        except BaseException as error:  # the test fails with it
            errors.append(error)
            together.abort()

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    for expression in expressions:
        # A schedule that another session has locked at that moment is ticked on the next day.
        tick(engine, end)
        assert ticks(engine, expression) == expected(expression, zone, year - QUARTER, end)


KILLED = """
import os, signal, sys
from datetime import datetime
import sqlalchemy as sa
sys.path.insert(0, {tests!r})
from ticking import tick_at

boundary = {boundary}
now = datetime.fromisoformat({now!r})

def pass_boundary():
    global boundary
    if boundary == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    boundary -= 1

with sa.create_engine({url!r}).connect() as connection:
    transaction = connection.begin()
    tick_at(connection, now, before_each=pass_boundary)
    pass_boundary()
    transaction.commit()
    pass_boundary()
"""


@pytest.mark.slow
@pytest.mark.parametrize("minutes", [1, 50], ids=["on time", "after an outage"])
@pytest.mark.parametrize("boundary", range(5), ids=["lock", "add", "move on", "commit", "after the commit"])
def test_a_process_that_is_killed_neither_loses_nor_repeats_a_tick(engine, boundary, minutes):
    add(engine)
    now = START + timedelta(minutes=minutes)
    code = KILLED.format(
        tests=str(Path(__file__).parent),
        url=engine.url.render_as_string(hide_password=False),
        boundary=boundary,
        now=now.isoformat(),
    )

    run = subprocess.run([sys.executable, "-c", code], check=False)

    assert run.returncode == -9
    assert ticks(engine) == [now.replace(minute=now.minute // 15 * 15)][: boundary // 4]

    def is_ticked() -> bool:
        tick(engine, now)  # the killed one's locks last until the server sees that it is gone
        return bool(ticks(engine))

    until(is_ticked)
    tick(engine, now)
    assert ticks(engine) == [now.replace(minute=now.minute // 15 * 15)]
    assert load(engine).next_at > now
