"""A worker that lives is seen to live, whatever it is busy with, and keeps its tasks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa
from claims import hold_lease, note
from sqlalchemy.orm import Session
from waiting import patience

from apoq import AsyncRunningTask, Queue, RunningTask, Task, Worker

SOON = 15.0

until = patience(SOON)
LEASE = timedelta(seconds=1)


def add(engine, type_: str = "t") -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, type_).id


def load(engine) -> Task:
    with Session(engine) as session:
        return session.scalar(sa.select(Task))


def seen_past_its_lease(engine, worker_id) -> None:
    """Wait until the database has seen a worker for longer than its lease would be without a heartbeat."""
    seen_at = sa.text("SELECT seen_at FROM apoq_workers WHERE id = :id")

    def look():
        with engine.connect() as connection:
            return connection.scalar(seen_at, {"id": worker_id})

    first = look()
    until(lambda: look() > first + LEASE * 1.5)


@pytest.fixture
def may_end():
    event = threading.Event()
    yield event
    event.set()


class TestTheHeartbeat:
    def test_goes_on_while_a_coroutine_blocks_its_loop(self, engine, make_worker, may_end):
        async def block(_task: AsyncRunningTask) -> None:
            may_end.wait(4 * SOON)

        worker = make_worker(lease=LEASE)
        worker.use("t", block)
        add(engine)
        worker.start()
        until(lambda: load(engine).state == "running")

        seen_past_its_lease(engine, load(engine).worker_id)

    def test_goes_on_while_all_connections_of_the_pool_are_taken(self, url, engine, may_end):
        def hold(task: RunningTask) -> None:
            task.session.connection()
            may_end.wait(4 * SOON)

        small = sa.create_engine(url, pool_size=1, max_overflow=0)
        worker = Worker(small, lease=LEASE)
        worker.use("t", hold)
        add(engine)
        worker.start()
        until(lambda: small.pool.checkedout() == 1)

        seen_past_its_lease(engine, load(engine).worker_id)
        may_end.set()
        worker.stop()
        small.dispose()

    def test_is_the_last_thing_to_stop(self, engine, make_worker, may_end):
        worker = make_worker(lease=LEASE)
        worker.use("t", lambda task: may_end.wait(4 * SOON))
        add(engine)
        worker.start()
        until(lambda: load(engine).state == "running")

        stopping = threading.Thread(target=worker.stop)
        stopping.start()
        until(lambda: worker._life.parts._notices[None].is_given)
        seen_past_its_lease(engine, load(engine).worker_id)
        may_end.set()
        stopping.join(SOON)

        assert load(engine).state == "completed"


class TestAnEndedLease:
    """Others may have the tasks; here it has not begun, which is the same."""

    @pytest.fixture
    def ran(self, worker) -> Iterator[list[int]]:
        ran: list[int] = []

        async def coroutine(task: AsyncRunningTask) -> None:
            ran.append(task.id)

        worker.use("t", lambda task: ran.append(task.id))
        worker.use("coroutine", coroutine)
        yield ran
        worker._life.parts.coroutines.stop()
        worker._life.parts.slots.stop()
        worker._life.parts.engine.dispose()

    def test_claims_nothing(self, engine, worker, ran):
        add(engine)

        worker._life.parts.claimer.turn()

        assert load(engine).token == 0

    @pytest.mark.parametrize("type_", ["t", "coroutine"])
    def test_begins_nothing_and_what_was_claimed_is_given_back(self, engine, worker, ran, type_):
        add(engine, type_=type_)

        hold_lease(worker)
        claimed = worker._life.parts.claimer.claim(1, 1)
        worker._life.parts.heartbeat.leases[None].ends_at = time.monotonic()
        worker._life.parts.slots.put(claimed)
        until(lambda: worker._life.parts.settler.turn() or load(engine).state == "pending")

        assert (load(engine).token, load(engine).attempt, ran) == (1, 0, [])


def test_a_worker_whose_lease_has_ended_completes_nothing(engine, worker):
    def process(task: RunningTask) -> None:
        task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
        worker._life.parts.heartbeat.leases[
            None
        ].ends_at = time.monotonic()  # as if it had been frozen just here

    worker.use("t", process)
    add(engine)

    task = worker.work()

    assert (task.state, task.attempt, task.fail_count) == ("pending", 0, 0)
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM ledger")) == 0


def test_what_an_earlier_life_of_a_worker_left_is_not_its_own(engine, worker):
    worker.use("t", lambda task: None, retry_delay=lambda fail_count: 0)
    worker.start()
    with engine.begin() as connection:
        earlier = connection.scalar(sa.text("SELECT id FROM apoq_workers"))
    worker.stop()
    add(engine)
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE apoq_tasks SET state = 'running', attempt = 1, worker_id = :earlier"),
            {"earlier": earlier},
        )
        note(connection)

    worker.start()
    until(lambda: load(engine).state == "completed")

    assert load(engine).rescue_count == 1


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_wrong_makes_no_difference(engine, url, hours):
    """All times are the database's: what is due, when it is tried again, and who lives."""
    code = f"""
        import datetime, sys, time
        real = time.time
        time.time = lambda: real() + {hours} * 3600

        class Wrong(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime.fromtimestamp(time.time(), tz)

        right, datetime.datetime = datetime.datetime, Wrong
        import apoq
        datetime.datetime = right

        import sqlalchemy as sa
        from sqlalchemy.orm import Session
        engine = sa.create_engine(sys.argv[1])
        queue = apoq.Queue()
        worker = apoq.Worker(engine, lease=datetime.timedelta(seconds=1))

        def once(task):
            if not task.fail_count:
                raise ValueError

        worker.use("t", once, retry_delay=lambda fail_count: 0.1)
        with Session(engine) as session, session.begin():
            queue.add(session, "t", delay=datetime.timedelta(seconds=0.1))
        worker.start()
        state, deadline = None, time.monotonic() + 10
        while state != "completed" and time.monotonic() < deadline:
            with engine.connect() as connection:
                state = connection.scalar(sa.select(apoq.Task.state))
        worker.stop()
        print(state, apoq.model.datetime.now(datetime.UTC).timestamp() - real())
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), url.render_as_string(hide_password=False)],
        capture_output=True,
        text=True,
        check=True,
    )
    state, wrong_by = ran.stdout.split()

    task = load(engine)
    with engine.connect() as connection:
        now = connection.scalar(sa.select(sa.func.clock_timestamp()))
    assert (state, task.fail_count, task.rescue_count) == ("completed", 1, 0)
    assert round(float(wrong_by) / 3600) == hours
    times = [task.created_at, task.process_at, task.claimed_at, task.failed_at, task.completed_at]
    assert max(abs(now - moment) for moment in times) < timedelta(minutes=1)
