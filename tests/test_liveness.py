"""A worker that lives is seen to live, whatever it is busy with, and keeps its tasks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from uuid import uuid4

import probe
import pytest
import sqlalchemy as sa
from claims import hold_lease, note
from sqlalchemy.orm import Session
from waiting import patience

from apoq import AsyncRunningTask, Queue, RunningTask, Task, Worker
from apoq.schema.tables import WorkerRow

SOON = 15.0

until = patience(SOON)
LEASE = timedelta(seconds=1)
STEADY = timedelta(seconds=5)
"""A lease that is renewed each second, and doesn't end because the machine is busy."""


def add(engine, type_: str = "t") -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, type_).id


def load(engine) -> Task:
    with Session(engine) as session:
        return session.scalar(sa.select(Task))


def heartbeat_goes_on(engine, worker_id, heartbeats: int = 2) -> None:
    """Wait until the database has had so many more heartbeats of a worker."""
    last_heartbeat_at = sa.text("SELECT last_heartbeat_at FROM apoq_workers WHERE id = :id")
    found: list[datetime] = []

    def is_enough() -> bool:
        with engine.connect() as connection:
            last = connection.scalar(last_heartbeat_at, {"id": worker_id})
        if last is not None and last not in found:
            found.append(last)
        return len(found) > heartbeats

    until(is_enough)


@pytest.fixture
def may_end():
    event = threading.Event()
    yield event
    event.set()


class TestTheHeartbeat:
    def test_goes_on_while_a_coroutine_blocks_its_loop(self, engine, make_worker, may_end):
        async def block(_task: AsyncRunningTask) -> None:
            may_end.wait(4 * SOON)

        worker = make_worker(lease=STEADY)
        worker.use("t", block)
        add(engine)
        worker.start()
        until(lambda: load(engine).state == "running")

        heartbeat_goes_on(engine, load(engine).worker_id)

    def test_goes_on_while_all_connections_of_the_pool_are_taken(self, url, engine, may_end):
        def hold(task: RunningTask) -> None:
            task.session.connection()
            may_end.wait(4 * SOON)

        small = sa.create_engine(url, pool_size=1, max_overflow=0)
        worker = Worker(small, lease=STEADY)
        worker.use("t", hold)
        add(engine)
        worker.start()
        until(lambda: small.pool.checkedout() == 1)

        heartbeat_goes_on(engine, load(engine).worker_id)
        may_end.set()
        worker.stop()
        small.dispose()

    def test_is_the_last_thing_to_stop(self, engine, make_worker, may_end):
        worker = make_worker(lease=STEADY)
        worker.use("t", lambda task: may_end.wait(4 * SOON))
        add(engine)
        worker.start()
        until(lambda: load(engine).state == "running")

        stopping = threading.Thread(target=worker.stop)
        stopping.start()
        until(lambda: probe.stop_signal(worker).is_given)
        heartbeat_goes_on(engine, load(engine).worker_id)
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
        probe.event_loop(worker).stop(SOON)
        probe.executor(worker).stop()
        probe.own_engine(worker).dispose()

    def test_claims_nothing(self, engine, worker, ran):
        add(engine)

        probe.claimer(worker).turn()

        assert load(engine).claim_token == 0

    @pytest.mark.parametrize("type_", ["t", "coroutine"])
    def test_begins_nothing_and_what_was_claimed_is_given_back(self, engine, worker, ran, type_):
        add(engine, type_=type_)

        hold_lease(worker)
        claimed = probe.claim(worker, 1, 1)
        probe.end_lease(worker)
        probe.executor(worker).put(claimed)
        until(lambda: probe.settler(worker).turn() or load(engine).state == "pending")

        assert (load(engine).claim_token, load(engine).attempt, ran) == (1, 0, [])


def test_a_worker_whose_lease_has_ended_completes_nothing(engine, worker):
    def process(task: RunningTask) -> None:
        task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
        probe.end_lease(worker)  # as if it had been frozen just here

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
                return cls.fromtimestamp(time.time(), tz)

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
        print(state, apoq.schema.models.datetime.now(datetime.UTC).timestamp() - real())
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


class TestLeasesOfDifferentLengths:
    """Each worker writes until when it counts as alive; no other one judges it by its own lease."""

    def test_one_with_a_long_lease_keeps_its_task_beside_one_with_a_short_lease(
        self, engine, make_worker, may_end
    ):
        attempts: list[int] = []
        long, short = make_worker(lease=timedelta(minutes=2)), make_worker(lease=LEASE)
        for worker in (long, short):
            worker.use("t", lambda task: attempts.append(task.attempt) or may_end.wait(4 * SOON))
        add(engine)
        long.start()
        until(lambda: attempts)

        short.start()
        heartbeat_goes_on(engine, probe.heartbeat(short).worker_id, 10)  # two of its leases
        may_end.set()
        until(lambda: load(engine).state == "completed")

        assert (attempts, load(engine).rescue_count) == ([1], 0)

    @pytest.mark.parametrize("rescuer", [LEASE, timedelta(minutes=2)], ids=["short", "long"])
    def test_one_with_a_short_lease_that_has_died_is_dead_to_any_other(self, engine, make_worker, rescuer):
        """Its row says so: it was seen a moment ago, and its lease is over."""
        dead = uuid4()
        add(engine)
        with engine.begin() as connection:
            connection.execute(sa.update(Task).values(state="running", attempt=1, worker_id=dead))
            note(connection)
            row = {"host": "h", "pid": 1, "version": "0", "queues": [], "concurrency": 1}
            row |= {
                "expires_at": sa.func.clock_timestamp() + timedelta(seconds=0.5),
                "grace": timedelta(seconds=0.2),
            }
            connection.execute(sa.insert(WorkerRow).values(id=dead, **row))
        worker = make_worker(lease=rescuer)
        worker.start()
        until(worker.is_healthy)

        until(lambda: probe.heartbeat(worker).beat() and load(engine).state == "pending")

    def test_the_row_of_one_with_a_lease_of_hours_is_not_forgotten(self, engine, make_worker):
        worker, other = make_worker(lease=timedelta(hours=10)), make_worker()
        worker.start()
        until(worker.is_healthy)
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "UPDATE apoq_workers SET last_heartbeat_at = last_heartbeat_at - interval '90 minutes'"
            )

        other.start()
        until(other.is_healthy)
        probe.heartbeat(other).forget()

        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM apoq_workers")) == 2


@pytest.mark.parametrize("step", ["1 hour", "-1 hour"])
def test_a_step_of_the_servers_clock_takes_no_task_from_a_live_worker(engine, make_worker, may_end, step):
    """As the rows see it: the last heartbeats are an hour old, or to come."""
    attempts: list[int] = []

    def run(task: RunningTask) -> None:
        attempts.append(task.attempt)
        may_end.wait(4 * SOON)

    workers = [make_worker(lease=LEASE) for _ in range(2)]
    for worker in workers:
        worker.use("t", run, retry_limit=0)
    add(engine)
    for worker in workers:
        worker.start()
        until(worker.is_healthy)
    until(lambda: attempts)

    for _ in range(3):
        with engine.begin() as connection:
            connection.exec_driver_sql(
                f"UPDATE apoq_workers SET last_heartbeat_at = last_heartbeat_at - interval '{step}', "
                f"expires_at = expires_at - interval '{step}'"
            )
        last_heartbeat_at = workers[0].last_heartbeat_at
        until(
            lambda last_heartbeat_at=last_heartbeat_at: all(
                worker.last_heartbeat_at > last_heartbeat_at + LEASE for worker in workers
            )
        )
    may_end.set()
    until(lambda: load(engine).state == "completed")

    assert (attempts, load(engine).attempt) == ([1], 1)


class TestAttemptsThatHaveBegun:
    """They count if their worker dies, also if they were claimed together with others."""

    def test_one_that_was_claimed_ahead_is_marked_with_the_next_heartbeat(self, engine, make_worker, may_end):
        worker = make_worker(concurrency=1, lease=LEASE)
        worker.use("short", lambda task: None)
        worker.use("t", lambda task: may_end.wait(4 * SOON))
        probe.executor(worker).run_time = 0.0001  # so it claims ahead
        with Session(engine) as session, session.begin():
            task_id = Queue().add(session, "t").id
            Queue().add_many(session, "short", range(50))
        worker.start()

        until(lambda: begun(engine, task_id))
        with engine.connect() as connection:
            ahead = sa.select(sa.func.count()).where(Task.state == "running", Task.prefetched)
            assert connection.scalar(ahead) == 50

    def test_one_that_finds_a_free_slot_at_once_was_not_claimed_ahead(self, engine, worker, may_end):
        worker.use("t", lambda task: may_end.wait(4 * SOON))
        probe.executor(worker).run_time = 0.0001
        worker.start()
        until(worker.is_healthy)

        add(engine)

        until(lambda: load(engine).state == "running")
        assert not load(engine).prefetched


def begun(engine: sa.Engine, task_id: int) -> bool:
    with Session(engine) as session:
        task = session.get_one(Task, task_id)
        return task.state == "running" and not task.prefetched
