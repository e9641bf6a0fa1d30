"""A worker ticks the schedules of its queues, and declares those of its code."""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime, timedelta

import probe
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from ticking import start_at
from waiting import patience

from apoq import Limit, Queue, RunningTask, Schedule, Task, Worker, prepare
from apoq.schema.tables import WorkerRow

until = patience(20.0)

NOW = datetime.now(UTC)


def add(engine: sa.Engine, queue: Queue, name: str, type_: str = "t", **options: object) -> None:
    with Session(engine) as session, session.begin():
        queue.schedule(session, name, type_, **({"every": timedelta(hours=1)} | options))


def be_due(engine: sa.Engine, **columns: object) -> None:
    """Let all schedules be due since the last full hour, at which each of them has a tick."""
    with engine.begin() as connection:
        start_at(connection, sa.func.date_trunc("hour", sa.func.now()), **columns)


def load(engine: sa.Engine, queue: Queue | None = None) -> dict[str, Schedule]:
    with Session(engine) as session:
        return {its.name: its for its in (queue or Queue()).schedules(session)}


def test_a_due_schedule_runs(engine, make_worker, queue):
    ran: list[datetime | None] = []
    worker = make_worker(queue, poll_interval=0.1)
    worker.use("t", lambda task: ran.append(task.tick_at))
    add(engine, queue, "x", every=timedelta(hours=1))
    worker.start()
    be_due(engine)

    until(lambda: ran)

    with Session(engine) as session:
        assert session.scalars(sa.select(Task.tick_at)).all() == ran
    assert ran[0] == load(engine)["x"].last_tick_at


def test_a_tick_is_a_task_at_the_second(engine, make_worker, queue):
    late: list[timedelta] = []

    @queue.task(every=1, overlap="allow")
    def tick(task: RunningTask) -> None:
        assert task.tick_at is not None
        late.append(datetime.now(UTC) - task.tick_at)

    make_worker(queue, poll_interval=60).start()

    until(lambda: len(late) > 2)
    # Not after the poll interval. The first may have been added while the machine was busy.
    assert min(late) < timedelta(seconds=1)


def test_workers_that_did_not_tick_themselves_are_notified(engine, make_worker, queue, caplog):
    ran = threading.Event()
    runs = make_worker(queue, poll_interval=3600)
    runs.use("t", lambda task: ran.set())
    runs.start()
    until(lambda: probe.awaited(runs) and probe.is_idle(runs))
    add(engine, queue, "x")
    be_due(engine)

    ticks = make_worker(queue)  # which has no processor
    ticks.start()

    assert ran.wait(10)
    assert "failed" not in caplog.text


def test_a_task_that_no_schedule_has_added_has_no_tick(engine, queue, make_worker):
    found = []
    worker = make_worker(queue)
    worker.use("t", lambda task: found.append(task.tick_at))
    with Session(engine) as session, session.begin():
        queue.add(session, "t")

    worker.work()

    assert found == [None]


def test_work_does_not_tick(engine, queue, make_worker):
    worker = make_worker(queue)
    worker.use("t", lambda task: None)
    add(engine, queue, "x")
    be_due(engine)

    assert worker.work() is None


def test_code_declares_its_schedules(engine, make_worker, queue):
    @queue.task(cron="0 9 * * MON-FRI", timezone="Europe/Berlin", type="report", aliases=["old"])
    def report(day: str = "today") -> None: ...

    worker = make_worker(queue, release=NOW)
    worker.start()
    until(lambda: load(engine))

    (found,) = load(engine).values()
    assert (found.name, found.type, found.origin, found.release) == ("report", "report", "code", NOW)
    assert (found.cron, found.timezone, found.data) == ("0 9 * * MON-FRI", "Europe/Berlin", {})
    with engine.connect() as connection:
        assert connection.scalar(sa.select(WorkerRow.release)) == NOW

    @queue.task(every=60, type="later")
    def later() -> None: ...

    until(lambda: "later" in load(engine))


def test_a_restart_does_not_move_a_tick(engine, make_worker, queue):
    @queue.task(cron="0 9 1 1 *", type="report")
    def report() -> None: ...

    worker = make_worker(queue)
    worker.start()
    until(lambda: load(engine))
    worker.stop()
    be_due(engine, paused_at=sa.func.now())
    before = load(engine)["report"]

    worker = make_worker(queue)
    worker.start()
    until(lambda: load(engine)["report"].release != before.release)

    after = load(engine)["report"]
    assert (after.next_at, after.paused_at) == (before.next_at, before.paused_at)


def declare(engine: sa.Engine, release: datetime | None, cron: str) -> Worker:
    """Start a worker whose code declares this, and wait until it has looked."""
    probe.forget_shared_tasks()
    queue = Queue()

    @queue.task(cron=cron, type="report")
    def report() -> None: ...

    worker = Worker(engine, queue, release=release)
    worker.start()
    until(lambda: probe.has_declared(worker))
    worker.stop()
    return worker


def test_a_limit_whose_function_raises_stops_no_other_schedule(engine, make_worker, queue, caplog):
    @queue.task(type="broken", every=60, limit=Limit(1, key=lambda day, **_: day.lower()))
    def broken(day: str | None = None) -> None: ...

    with Session(engine) as session, session.begin():
        queue.schedule(session, "sound", "t", every=1)
    worker = make_worker(queue)
    ran = threading.Event()
    worker.use("t", lambda task: ran.set())
    worker.start()

    assert ran.wait(10)
    assert "broken" in caplog.text


def test_an_older_release_does_not_undo_a_newer_declaration(engine, caplog):
    old, new = NOW - timedelta(days=2), NOW - timedelta(days=1)
    declare(engine, old, "0 1 * * *")
    declare(engine, new, "0 2 * * *")
    declare(engine, old, "0 1 * * *")

    assert load(engine)["report"].cron == "0 2 * * *"
    (line,) = (line for line in caplog.messages if "later release" in line)
    assert "was declared by a later release than this worker's" in line

    declare(engine, old, "0 2 * * *")  # as a second process that was started a moment earlier
    assert len([line for line in caplog.messages if "later release" in line]) == 1

    declare(engine, new, "0 3 * * *")
    assert load(engine)["report"].cron == "0 3 * * *"
    declare(engine, None, "0 4 * * *")
    assert load(engine)["report"].cron == "0 4 * * *"


def test_a_declaration_never_changes_what_the_application_has_added(engine, queue, caplog):
    add(engine, queue, "report", "report")

    declare(engine, None, "0 1 * * *")

    assert load(engine)["report"].cron is None
    assert "must not be declared by @queue.task, because queue.schedule has added it" in caplog.text


def test_a_name_with_another_type_is_logged(engine, queue, caplog):
    add(engine, queue, "report", "other")

    declare(engine, None, "0 1 * * *")

    assert "the schedule 'report' must keep its type, 'other', got 'report'" in caplog.text


def test_many_workers_declare_and_tick_at_once(engine, queue):
    @queue.task(every=1, type="tick", overlap="allow")
    def tick() -> None: ...

    workers = [Worker(engine, queue, concurrency=1) for _ in range(4)]
    starting = [threading.Thread(target=worker.start) for worker in workers]
    for thread in starting:
        thread.start()
    for thread in starting:
        thread.join()
    with engine.connect() as connection:
        count = sa.select(sa.func.count()).select_from(Task)
        until(lambda: (connection.scalar(count) or 0) > 2)
    for worker in workers:
        worker.stop()

    with engine.connect() as connection:
        found = connection.scalars(sa.select(Task.tick_at)).all()
    assert len(found) == len(set(found))


def test_a_removed_schedule_comes_back_with_the_next_start_only(engine, make_worker, queue):
    @queue.task(every=3600, type="report")
    def report() -> None: ...

    worker = make_worker(queue, poll_interval=0.05)
    worker.start()
    until(lambda: load(engine))
    with Session(engine) as session, session.begin():
        queue.unschedule(session, "report")
    looks = probe.looks_for_ticks(worker)
    until(lambda: probe.looks_for_ticks(worker) > looks + 2)
    assert load(engine) == {}

    worker.stop()
    worker.start()
    until(lambda: load(engine))


def test_each_schema_has_its_own(engine, make_worker):
    prepare(engine, schema="other")
    queue, elsewhere = Queue(), Queue(schema="other")
    for each in (queue, elsewhere):
        each.task(every=3600, type="report")(lambda: None)
    worker = make_worker(queue, elsewhere)
    worker.start()

    until(lambda: load(engine) and load(engine, elsewhere))


def test_an_idle_ticker_sends_one_statement_per_poll_interval(engine, make_worker, queue):
    for number in range(20):
        add(engine, queue, f"n{number}")
    worker = make_worker(queue, poll_interval=0.2)
    worker.start()
    until(lambda: probe.looks_for_ticks(worker))

    before, began = probe.looks_for_ticks(worker), time.monotonic()
    until(lambda: probe.looks_for_ticks(worker) >= before + 10)

    assert time.monotonic() - began > 9 * 0.2 * 0.9 * 0.9
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(Task)) == 0


def test_a_schedule_that_is_locked_does_not_make_a_worker_spin(engine, make_worker, queue):
    add(engine, queue, "x")
    be_due(engine)
    with engine.begin() as connection:
        connection.execute(sa.select(Schedule).with_for_update())
        worker = make_worker(queue, poll_interval=0.2)
        worker.start()
        until(lambda: probe.looks_for_ticks(worker))
        before, began = probe.looks_for_ticks(worker), time.monotonic()
        until(lambda: probe.looks_for_ticks(worker) >= before + 5)
        assert time.monotonic() - began > 4 * 0.2 * 0.9 * 0.9

    until(lambda: load(engine)["x"].last_tick_at)


def test_a_bad_schedule_is_logged_once_and_does_not_hold_up_others(engine, make_worker, queue, caplog):
    add(engine, queue, "bad")
    add(engine, queue, "good")
    with engine.begin() as connection:
        connection.execute(
            sa.update(Schedule).where(Schedule.name == "bad").values(timezone="Mars", cron="@daily")
        )
        connection.execute(sa.update(Schedule).where(Schedule.name == "bad").values(every=None))
    be_due(engine)
    worker = make_worker(queue, poll_interval=0.05)
    worker.start()

    until(lambda: load(engine)["good"].last_tick_at)

    looks = probe.looks_for_ticks(worker)
    until(lambda: probe.looks_for_ticks(worker) > looks + 5)
    (line,) = (line for line in caplog.messages if "'bad'" in line)
    assert line == (
        "the schedule 'bad' of the queue 'default' can't be ticked: timezone must be a name of the IANA "
        "database, such as 'Europe/Berlin' or 'UTC', got 'Mars'. Other schedules are ticked, and this one is "
        "tried again every 60 s: correct it by queue.schedule, or remove it"
    )


def test_a_task_that_the_server_refuses_does_not_hold_up_others(engine, make_worker, queue, caplog):
    for number in range(5):
        add(engine, queue, f"n{number}", "bad" if number == 2 else "t")
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE apoq_tasks ADD CHECK (type <> 'bad')")
    be_due(engine)
    make_worker(queue, poll_interval=0.05).start()

    until(lambda: sum(its.last_tick_at is not None for its in load(engine).values()) == 4)

    until(lambda: "the schedule 'n2' of the queue 'default' can't be ticked" in caplog.text)
    assert load(engine)["n2"].last_tick_at is None


@pytest.mark.parametrize(("count", "words"), [(1, "1 schedule,"), (350, "350 schedules,")])
def test_missed_ticks_are_logged_once_after_an_outage(engine, make_worker, queue, caplog, count, words):
    caplog.set_level(logging.WARNING)
    with Session(engine) as session, session.begin():
        for number in range(count):
            queue.schedule(session, f"n{number:03}", "t", every=60)
    with engine.begin() as connection:
        start_at(connection, sa.func.now() - timedelta(hours=1))
    make_worker(queue, poll_interval=0.05).start()

    until(lambda: "ticks were missed" in caplog.text)

    (line,) = (line for line in caplog.messages if "ticks were missed" in line)
    assert f"{words} such as 'n000'" in line


def test_a_schedule_whose_type_no_worker_knows_adds_a_task_that_waits(engine, make_worker, queue):
    add(engine, queue, "x", "nobody knows it")
    be_due(engine)
    make_worker(queue, poll_interval=0.05).start()

    until(lambda: load(engine)["x"].last_task_id)

    with Session(engine) as session:
        assert session.scalars(sa.select(Task.state)).all() == ["pending"]


def test_an_invalid_release_is_refused(engine):
    with pytest.raises(TypeError, match="release must be the time of the deployment, a datetime"):
        Worker(engine, release="v1")
    with pytest.raises(TypeError, match="with a time zone"):
        Worker(engine, release=datetime(2026, 1, 1))  # noqa: DTZ001


@pytest.mark.slow
def test_ten_thousand_schedules_in_one_minute(engine, make_worker, queue):
    with Session(engine) as session, session.begin():
        queue.schedule(session, "n0", "t", cron="* * * * *", timezone="Europe/Berlin")
        session.execute(
            sa.text(
                "INSERT INTO apoq_schedules (queue, name, type, cron, timezone, next_at) "
                "SELECT queue, 'n' || n, type, cron, timezone, next_at "
                "FROM apoq_schedules, generate_series(1, 9999) AS n"
            )
        )
        session.execute(sa.update(Schedule).values(next_at=sa.func.date_trunc("minute", sa.func.now())))
    make_worker(queue).start()

    def is_done() -> bool:
        with engine.connect() as connection:
            left = sa.select(sa.func.count()).where(Schedule.last_tick_at.is_(None))
            return connection.scalar(left) == 0

    # On an idle machine, it takes 6 s (`python -m benchmarks.features ticks`); this one runs other tests.
    patience(60.0)(is_done)

    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count(Task.schedule.distinct()))) == 10_000
