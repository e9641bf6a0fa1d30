"""A running task reports how far it has come."""

from __future__ import annotations

import asyncio
import math
import threading
from datetime import timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import probe
import pytest
import sqlalchemy as sa
from claims import database_of
from sqlalchemy.orm import Session
from waiting import patience

from apoq import AsyncRunningTask, Progress, Queue, RunningTask, Task
from apoq.postgres.connections import own_engine
from apoq.testing import drain
from apoq.worker.maintenance import orphans
from apoq.worker.maintenance.orphans import Orphans
from apoq.worker.maintenance.pruner import Pruner

until = patience(30.0)
SOON = 30.0

COUNT_WRITES = """
    CREATE TABLE writes (at timestamptz DEFAULT clock_timestamp());
    GRANT INSERT ON writes TO PUBLIC;
    CREATE FUNCTION count_write() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO writes DEFAULT VALUES; RETURN NULL; END $$;
    CREATE TRIGGER count_write AFTER INSERT ON apoq_progress EXECUTE FUNCTION count_write()
"""


def add(engine, queue: Queue, count: int = 1) -> list[int]:
    with Session(engine) as session, session.begin():
        return [queue.add(session, "t", number).id for number in range(count)]


def progress(engine, queue: Queue, task_id: int) -> Progress | None:
    with Session(engine) as session:
        return queue.progress(session, task_id)


def execute(engine, statement: str) -> Any:
    with engine.begin() as connection:
        found = connection.exec_driver_sql(statement)
        return found.scalars().all() if found.returns_rows else None


def rows(engine) -> list[int]:
    return execute(engine, "SELECT task_id FROM apoq_progress ORDER BY 1")


async def coroutine(task: AsyncRunningTask) -> None:
    await asyncio.to_thread(task.set_progress, 3, 10, "half")
    await task.session.execute(sa.text("SELECT 1"))


def with_session(task: RunningTask) -> None:
    task.session.execute(sa.text("SELECT 1"))
    task.set_progress(3, 10, "half")


class TestTheProgress:
    @pytest.mark.parametrize(
        "processor",
        [lambda task: task.set_progress(3, 10, "half"), with_session, coroutine],
        ids=["plain", "with task.session", "coroutine"],
    )
    @pytest.mark.parametrize("is_started", [True, False])
    def test_that_was_reported_last_is_written_when_the_task_ends(
        self, engine, queue, worker, processor, is_started
    ):
        worker.use("t", processor)
        (task_id,) = add(engine, queue)

        worker.start() if is_started else worker.work()

        until(lambda: progress(engine, queue, task_id))
        found = progress(engine, queue, task_id)
        assert (found.done, found.total, found.note, found.fraction) == (3, 10, "half", 0.3)

    def test_of_all_tasks_is_written_by_one_statement_a_second(self, engine, queue, make_worker):
        execute(engine, COUNT_WRITES)
        worker = make_worker(concurrency=8)
        stop = threading.Event()

        def run(task: RunningTask) -> None:
            while not stop.wait(0.001):
                task.set_progress(task.data)

        worker.use("t", run)
        ids = add(engine, queue, 8)
        worker.start()
        until(lambda: rows(engine) == ids)
        until(lambda: len(execute(engine, "SELECT at FROM writes")) >= 3)
        stop.set()
        worker.stop()

        times = execute(engine, "SELECT at FROM writes ORDER BY at")
        # The last one came at the stop.
        gaps = [later - earlier for earlier, later in pairwise(times[:-1])]
        assert min(gaps) > timedelta(seconds=0.9)
        assert [progress(engine, queue, task_id).done for task_id in ids] == list(range(8))

    def test_is_written_when_the_worker_stops(self, engine, queue, worker):
        worker.use("t", lambda task: [task.set_progress(number) for number in range(1, 101)])
        ids = add(engine, queue, 3)
        worker.start()
        until(lambda: worker.stats().completed == 3)

        worker.stop()

        assert {progress(engine, queue, task_id).done for task_id in ids} == {100}

    def test_survives_a_retry_until_the_next_attempt_reports_its_own(self, engine, queue, worker):
        def run(task: RunningTask) -> None:
            if task.attempt != 2:
                task.set_progress(task.attempt)
            if task.attempt < 3:
                raise ValueError

        worker.use("t", run, retry_delay=0)
        (task_id,) = add(engine, queue)
        seen = []
        for _ in range(3):
            worker.work()
            seen.append(progress(engine, queue, task_id).done)

        assert seen == [1, 1, 3]

    def test_is_not_written_by_a_worker_that_has_lost_the_task(self, engine, queue, worker):
        def lose(task: RunningTask) -> None:
            execute(engine, "UPDATE apoq_tasks SET claim_token = claim_token + 1, has_parts = true")
            execute(
                engine,
                "INSERT INTO apoq_progress SELECT id, claim_token, 7, 8, 'newer', now() FROM apoq_tasks",
            )
            task.set_progress(1)

        worker.use("t", lose)
        (task_id,) = add(engine, queue)

        worker.work()

        assert progress(engine, queue, task_id).note == "newer"

    def test_is_not_written_any_more_when_the_attempt_was_recalled(self, engine, queue, worker):
        def run(task: RunningTask) -> None:
            task.set_progress(1)
            probe.attempt_of(task).recall()
            task.set_progress(2)

        worker.use("t", run)
        (task_id,) = add(engine, queue)

        worker.work()

        assert progress(engine, queue, task_id).done == 1

    def test_is_not_written_any_more_after_the_timeout(self, engine, queue, worker):
        def run(task: RunningTask) -> None:
            task.set_progress(1)
            until(has_failed)
            task.set_progress(2)

        def has_failed() -> bool:
            with engine.connect() as connection:
                return connection.scalar(sa.select(Task.state)) == "failed"

        worker.use("t", run, timeout=0.05, retry_limit=0)
        (task_id,) = add(engine, queue)

        assert worker.work().state == "failed"
        assert progress(engine, queue, task_id).done == 1

    def test_of_a_locked_task_is_written_when_it_is_free(self, engine, queue, worker):
        execute(engine, COUNT_WRITES)
        report, go = threading.Event(), threading.Event()

        def run(task: RunningTask) -> None:
            report.wait(SOON)
            task.set_progress(1)
            go.wait(SOON)

        def tries() -> int:
            return len(execute(engine, "SELECT at FROM writes"))

        worker.use("t", run)
        with Session(engine) as session:
            task = queue.add(session, "t")
            session.commit()
            task_id = task.id
            worker.start()
            until(lambda: session.scalar(sa.select(Task.state)) == "running" or session.rollback())
            session.execute(sa.select(Task.id).with_for_update())
            report.set()
            until(lambda: tries() >= 2)
            assert progress(engine, queue, task_id) is None
            session.rollback()
        until(lambda: progress(engine, queue, task_id))
        go.set()

    def test_of_a_failed_write_is_kept(self, engine, queue, worker):
        go = threading.Event()

        def run(task: RunningTask) -> None:
            task.set_progress(1)
            go.wait(SOON)

        worker.use("t", run)
        execute(engine, "ALTER TABLE apoq_progress RENAME TO elsewhere")
        (task_id,) = add(engine, queue)
        worker.start()
        until(lambda: execute(engine, "SELECT true FROM apoq_tasks WHERE has_parts"))
        execute(engine, "ALTER TABLE elsewhere RENAME TO apoq_progress")

        until(lambda: progress(engine, queue, task_id))
        go.set()

    def test_is_none_if_there_is_none(self, session, queue):
        task = queue.add(session, "t")

        assert queue.progress(session, task) is None
        assert queue.progress(session, task.id + 1_000) is None

    def test_is_only_that_of_the_queues_own_tasks(self, session, queue):
        queue.task(type="t")(lambda_with_progress)
        task = queue.add(session, "t", {})
        drain(session, queue)

        assert queue.progress(session, task).fraction is None
        assert Queue("other").progress(session, task) is None


def lambda_with_progress(task: RunningTask) -> None:
    task.set_progress(1)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (("1",), TypeError, "done must be a number, got '1'"),
            ((True,), TypeError, "done must be a number, got True"),
            ((Decimal(1),), TypeError, "done must be a number"),
            ((-1,), ValueError, "done must be a finite number, zero or more, got -1"),
            ((math.nan,), ValueError, "got nan"),
            ((10**400,), ValueError, "done must be a finite number"),
            ((1, math.inf), ValueError, "total must be a finite number, zero or more, got inf"),
            ((1, "2"), TypeError, "total must be a number"),
            ((1, 2, None), TypeError, "note must be a string, got None"),
            ((1, 2, "x" * 501), ValueError, "note must have at most 500 characters, got 501"),
            ((1, 2, "\0"), ValueError, r"note can't hold U\+0000"),
            ((1, 2, "\ud800"), ValueError, "note can't hold a lone surrogate"),
        ],
    )
    def test_gets_a_clear_error(self, session, queue, arguments, error, message):
        def run(task: RunningTask) -> None:
            task.set_progress(*arguments)

        task = queue.task(run).add(session)

        with pytest.raises(error, match=message):
            drain(session, queue)
        assert queue.progress(session, task) is None

    def test_is_not_zero(self, session, queue):
        def run(task: RunningTask) -> None:
            task.set_progress(0, 0.0, "")

        task = queue.task(run).add(session)
        drain(session, queue)

        found = queue.progress(session, task)
        assert (found.done, found.total, found.note, found.fraction) == (0, 0, "", 1.0)


class TestItsRow:
    def test_is_deleted_with_its_task_and_only_that(self, engine, queue, worker):
        worker.use("t", lambda task: task.data < 2 and task.set_progress(1))
        ids = add(engine, queue, 3)
        for _ in ids:
            worker.work()
        execute(engine, f"UPDATE apoq_tasks SET completed_at = '2020-01-01' WHERE id <> {ids[1]}")
        assert rows(engine) == ids[:2]
        own = own_engine(engine)

        Pruner(database_of(own, queue), keep_completed=timedelta(days=1), keep_failed=None).prune()
        own.dispose()

        assert execute(engine, "SELECT id FROM apoq_tasks") == [ids[1]]
        assert rows(engine) == [ids[1]]

    @pytest.mark.parametrize("is_started", [True, False])
    def test_is_deleted_when_a_task_that_is_not_kept_completes(self, engine, queue, make_worker, is_started):
        worker = make_worker(keep_completed=0)
        go, begun = threading.Event(), threading.Event()

        def run(task: RunningTask) -> None:
            task.set_progress(1)
            begun.set()
            go.wait(SOON)

        worker.use("t", run)
        (task_id,) = add(engine, queue)
        if is_started:
            worker.start()
            until(lambda: rows(engine) == [task_id])
            go.set()
        else:
            go.set()
            worker.work()

        until(lambda: rows(engine) == [] and execute(engine, "SELECT id FROM apoq_tasks") == [])

    def test_is_deleted_later_if_the_task_was_deleted_by_hand(self, engine, queue, worker, monkeypatch):
        monkeypatch.setattr(orphans, "BATCH_SIZE", 2)
        worker.use("t", lambda task: task.set_progress(1))
        ids = add(engine, queue, 5)
        for _ in ids:
            worker.work()
        execute(engine, f"DELETE FROM apoq_tasks WHERE id IN ({ids[1]}, {ids[4]})")
        own = own_engine(engine)
        its = Orphans(own)

        left = []
        for _ in range(3):
            its.delete(None)
            left.append(rows(engine))
        own.dispose()

        assert left == [[ids[0], *ids[2:]], [ids[0], *ids[2:]], [ids[0], *ids[2:4]]]
