"""Ended tasks are deleted when their time is over, and only then."""

from __future__ import annotations

import re
import time
from datetime import timedelta

import pytest
import sqlalchemy as sa
from claims import database_of
from click.testing import CliRunner
from sqlalchemy.orm import Session

from apoq import Cancel, Keep, Queue, RunningTask, Task
from apoq.cli import main
from apoq.monitor.stats import figures
from apoq.postgres.connections import own_engine
from apoq.worker.maintenance import pruner
from apoq.worker.maintenance.pruner import Pruner

DAY = timedelta(days=1)


@pytest.fixture
def ended(engine, queue):
    """Add a task that ended in a state some time ago."""

    def add(state: str, ago: timedelta, queue: Queue = queue) -> int:
        column = {"completed": "completed_at", "failed": "failed_at", "cancelled": "cancelled_at"}[state]
        with Session(engine) as session, session.begin():
            task = queue.add(session, "t")
            session.execute(
                sa.text(f"UPDATE apoq_tasks SET state = :state, {column} = now() - :ago WHERE id = :id"),
                {"state": state, "ago": ago, "id": task.id},
            )
            return task.id

    return add


def left(engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(Task.id).order_by(Task.id)))


def prune(
    engine,
    *queues: Queue,
    completed: timedelta | Keep | None = DAY,
    failed: timedelta | Keep | None = 7 * DAY,
) -> bool:
    own = own_engine(engine)
    try:
        return Pruner(database_of(own, *queues), keep_completed=completed, keep_failed=failed).prune()
    finally:
        own.dispose()


@pytest.mark.parametrize(
    ("state", "kept", "deleted"),
    [
        ("completed", timedelta(hours=23), timedelta(hours=25)),
        ("failed", timedelta(days=6), timedelta(days=8)),
        ("cancelled", timedelta(days=6), timedelta(days=8)),
    ],
)
def test_each_state_has_its_time(engine, ended, state, kept, deleted):
    ended(state, deleted)
    young = ended(state, kept)

    prune(engine)

    assert left(engine) == [young]


class TestANumber:
    def test_the_newest_are_kept(self, engine, ended):
        hours = [ended("completed", timedelta(hours=hour)) for hour in range(6)]
        failed = [ended("failed", timedelta(hours=hour)) for hour in range(6)]

        prune(engine, completed=Keep(DAY, at_most=2), failed=Keep(at_most=3))

        assert left(engine) == hours[:2] + failed[:3]

    def test_the_time_is_a_limit_as_well(self, engine, ended):
        ended("completed", timedelta(hours=30))
        young = ended("completed", timedelta(hours=1))

        prune(engine, completed=Keep(DAY, at_most=100))

        assert left(engine) == [young]

    def test_each_queue_has_its_own(self, engine, ended):
        other = Queue("other")
        kept = [ended("completed", timedelta(hours=1)), ended("completed", timedelta(hours=1), other)]

        prune(engine, Queue(), other, completed=Keep(at_most=1))

        assert left(engine) == kept

    def test_it_deletes_all_excess_in_bounded_batches(self, engine, ended, monkeypatch):
        monkeypatch.setattr(pruner, "BATCH_SIZE", 2)
        ids = [ended("completed", timedelta(hours=10 - hour)) for hour in range(8)]
        own = own_engine(engine)
        its = Pruner(database_of(own), keep_completed=Keep(at_most=3), keep_failed=None)

        assert [its.prune() for _ in range(3)] == [True, True, False]

        assert left(engine) == ids[5:]
        assert its.prune() is False
        own.dispose()

    def test_two_workers_delete_no_more_than_one(self, engine, ended):
        ids = [ended("completed", timedelta(hours=hour)) for hour in range(6)]
        own = own_engine(engine)
        workers = [
            Pruner(database_of(own), keep_completed=Keep(at_most=2), keep_failed=None) for _ in range(2)
        ]

        for worker in workers * 2:
            worker.prune()

        assert left(engine) == ids[:2]
        own.dispose()

    def test_those_that_ended_at_once_stay_together(self, engine, ended):
        ids = [ended("completed", timedelta(hours=1)) for _ in range(4)]
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE apoq_tasks SET completed_at = '2026-01-01 00:00Z'")

        prune(engine, completed=Keep(at_most=2))

        assert left(engine) == ids

    @pytest.mark.parametrize("number", [0, -1, 1.5, True, "many", 10_000_001])
    def test_it_must_be_one(self, number):
        with pytest.raises(ValueError, match="at_most must be a number of tasks from 1 to 10,000,000"):
            Keep(at_most=number)

    def test_a_worker_takes_it(self, engine, ended, make_worker):
        ids = [ended("completed", timedelta(hours=hour)) for hour in range(4)]
        worker = make_worker(keep_completed=Keep(3600 * 24, at_most=1), keep_failed=Keep(60))
        assert worker.options.keep_completed == Keep(DAY, 1)
        assert worker.options.keeps_completed
        assert not make_worker(keep_completed=Keep(0)).options.keeps_completed

        worker.start()

        deadline = time.monotonic() + 20
        while left(engine) != ids[:1]:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_what_has_not_ended_is_never_deleted(engine, queue):
    with Session(engine) as session, session.begin():
        task = queue.add(session, "t")
        running = queue.add(session, "t")
        session.flush()
        running.state = "running"
        for each in (task, running):
            each.created_at = each.process_at = task.created_at - timedelta(days=365)
        ids = [task.id, running.id]

    prune(engine, completed=timedelta(), failed=timedelta())

    assert left(engine) == ids


def test_none_is_for_ever(engine, ended):
    ids = [ended("completed", timedelta(days=9999)), ended("failed", timedelta(days=9999))]

    prune(engine, completed=None, failed=None)

    assert left(engine) == ids


def test_a_failed_task_of_the_original_counts_from_when_it_was_due(engine, queue):
    with Session(engine) as session, session.begin():
        task = queue.add(session, "t")
        session.flush()
        task.state, task.process_at = "failed", task.process_at - timedelta(days=8)

    prune(engine)

    assert left(engine) == []


def test_a_worker_prunes_its_own_queues_only(engine, ended):
    other = ended("completed", timedelta(days=2), Queue("other"))
    ended("completed", timedelta(days=2))

    prune(engine)

    assert left(engine) == [other]


def test_it_deletes_in_bounded_batches(engine, ended, monkeypatch):
    monkeypatch.setattr(pruner, "BATCH_SIZE", 2)
    for _ in range(5):
        ended("completed", timedelta(days=2))

    rounds = [(prune(engine), len(left(engine))) for _ in range(3)]

    assert rounds == [(True, 3), (True, 1), (False, 0)]


def test_what_somebody_holds_is_passed_over(engine, ended):
    held, _free = ended("completed", timedelta(days=2)), ended("completed", timedelta(days=2))

    with engine.begin() as connection:
        connection.execute(sa.select(Task.id).where(Task.id == held).with_for_update())
        prune(engine)
        assert left(engine) == [held]


def test_what_a_row_of_the_applications_points_at_stays_and_nothing_else_with_it(engine, ended, caplog):
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE mails (task_id bigint REFERENCES apoq_tasks)")
    ids = [ended("completed", timedelta(days=2)) for _ in range(20)]
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO mails VALUES (:a), (:b)"), {"a": ids[0], "b": ids[7]})
    own = own_engine(engine)
    pruner = Pruner(database_of(own), keep_completed=DAY, keep_failed=DAY)

    for _ in range(2):  # and again, a minute later
        turns = 0
        while pruner.prune():
            turns += 1
            assert turns < 100
        assert left(engine) == [ids[0], ids[7]]

    own.dispose()
    (warning,) = caplog.messages
    assert "can't be deleted, and is kept" in warning


def test_a_started_worker_prunes(engine, ended, make_worker):
    ended("completed", timedelta(days=2))
    ended("failed", timedelta(days=8))
    ended("cancelled", timedelta(days=8))
    deadline = time.monotonic() + 30

    make_worker().start()

    while left(engine):
        assert time.monotonic() < deadline, "it didn't come about in time"
        time.sleep(0.01)


class TestZero:
    """With nothing to keep, a completed task is deleted instead of being marked."""

    def write(self, task: RunningTask) -> None:
        task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

    @pytest.mark.parametrize("processor", ["plain", "with a session"])
    def test_a_completed_task_is_gone_and_told_of(self, engine, queue, make_worker, processor):
        worker = make_worker(keep_completed=timedelta())
        worker.use("t", self.write if processor == "with a session" else lambda task: None)
        heard = []
        worker.events.on("task.completed", heard.append)
        with engine.begin() as connection:
            task_id = queue.add(connection, "t", {"n": 1}).id

        answered = worker.work()

        assert left(engine) == []
        assert [(task.id, task.data, task.state) for task in heard] == [(task_id, {"n": 1}, "completed")]
        assert heard[0].completed_at is not None
        assert (answered.id, answered.state) == (task_id, "completed")

    def test_what_fails_or_is_cancelled_stays(self, engine, queue, make_worker):
        def cancel(_task: RunningTask) -> None:
            raise Cancel

        worker = make_worker(keep_completed=timedelta())
        worker.use("cancelled", cancel)
        worker.use("failing", lambda task: 1 / 0)
        with engine.begin() as connection:
            ids = [queue.add(connection, type_).id for type_ in ("cancelled", "failing")]

        worker.work(), worker.work()

        assert left(engine) == ids

    def test_a_task_that_was_taken_away_is_not_deleted(self, engine, queue, make_worker):
        def process(task: RunningTask) -> None:
            with engine.begin() as connection:
                connection.execute(sa.update(Task).values(claim_token=Task.claim_token + 1))

        worker = make_worker(keep_completed=timedelta())
        worker.use("t", process)
        with engine.begin() as connection:
            task_id = queue.add(connection, "t").id

        worker.work()

        assert left(engine) == [task_id]


@pytest.mark.parametrize("keep", [-5, timedelta(days=-1), "a day"])
@pytest.mark.parametrize("name", ["keep_completed", "keep_failed"])
def test_nonsense_is_refused(make_worker, name, keep):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        make_worker(**{name: keep})


class TestOnDisk:
    @pytest.fixture
    def stats(self, engine, ended):
        """Complete tasks in two queues within the last hour, and read the statistics."""
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "INSERT INTO apoq_tasks (type, queue, state, completed_at, data) "
                "SELECT 't', CASE WHEN mod(n, 4) = 0 THEN 'small' ELSE 'large' END, 'completed', "
                "now() - interval '10 min', to_jsonb(repeat('x', 500)) FROM generate_series(1, 2000) AS n"
            )
            connection.exec_driver_sql("ANALYZE apoq_tasks")
        with engine.connect() as connection:
            return figures(connection, None)

    def test_each_queue_has_its_share_and_its_growth(self, stats):
        large, small = stats.queues

        assert large.bytes + small.bytes == pytest.approx(stats.bytes, rel=0.01)
        assert large.bytes == pytest.approx(3 * small.bytes, rel=0.01)
        assert large.bytes_per_day == pytest.approx(24 * large.bytes, rel=0.01)

    def test_the_command_line_shows_them(self, stats, url):
        where = ["--database-url", url.render_as_string(hide_password=False)]

        shown = CliRunner().invoke(main, ["stats", "--disk", *where]).output
        assert re.search(r"large +[\d,]+ kB +[\d,]+ [kM]B", shown)
        said = CliRunner().invoke(main, ["doctor", *where]).output
        assert "completed tasks take" in said
        assert "The free space is not visible in SQL" in said

    def test_without_statistics_they_are_unknown(self, engine, ended):
        ended("completed", timedelta())

        with engine.connect() as connection:
            (queue,) = figures(connection, None).queues

        assert queue.bytes is None
