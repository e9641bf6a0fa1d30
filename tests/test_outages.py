"""A worker whose database goes away, without a word or with one, and comes back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import probe
import pytest
import sqlalchemy as sa
from claims import WAITS, hold_up
from proxy import Proxy
from restarting import restartable
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, Task, Worker, prepare
from apoq.worker import lifecycle as lifecycle_module
from apoq.worker.failures import Failures, Outage
from apoq.worker.lease import Lease

SOON = 30.0

until = patience(SOON)
SHORT = timedelta(seconds=2.5)

CHANNELS = (b"apoq", b"apoq_paused", b"apoq_limited")
LISTENS = {*((channel, b"default") for channel in CHANNELS), (b"apoq_linked", b"")}
"""What is awaited on the connection of a worker of the default queue, when notifications arrive."""

WAITING = f"""
    SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND {WAITS})
"""


def add(engine, queue: Queue, type_: str = "t") -> int:
    with Session(engine) as session, session.begin():
        return queue.add(session, type_).id


def count(engine, *conditions) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(Task).where(*conditions))


def is_waiting(engine) -> bool:
    """Tell whether a claim waits for somebody else."""
    with engine.connect() as connection:
        return connection.scalar(sa.text(WAITING))


class TestLease:
    def test_it_is_held_for_its_length_from_when_it_was_asked_for(self):
        lease = Lease(0.3, 0.1)
        assert not lease.is_held

        lease.renew(time.monotonic())
        assert lease.is_held
        time.sleep(0.31)
        assert not lease.is_held

    def test_without_a_connection_it_ends_sooner(self):
        lease = Lease(60, 0.1)
        lease.renew(time.monotonic())
        lease.shorten()

        assert lease.is_held
        time.sleep(0.11)
        assert not lease.is_held


@pytest.fixture
def proxy(url) -> Iterator[Proxy]:
    proxy = Proxy(url)
    yield proxy
    proxy.close()


@pytest.fixture
def far(proxy) -> Iterator[sa.Engine]:
    """The test's database, behind a network that can be cut."""
    engine = sa.create_engine(proxy.url)
    yield engine
    engine.dispose()


@pytest.fixture
def far_worker(far) -> Iterator[Worker]:
    worker = Worker(far, lease=SHORT, poll_interval=timedelta(seconds=0.5))
    yield worker
    worker.stop(timeout=1)


def test_one_that_is_started_before_its_server_begins_when_that_is_there(url, engine, queue, caplog):
    proxy = Proxy(url)
    proxy.close()
    # Nobody listens there yet.
    far = sa.create_engine(proxy.url)
    ran = threading.Event()
    worker = Worker(far)
    worker.use("t", lambda task: ran.set())
    add(engine, queue)
    with caplog.at_level(logging.WARNING, "apoq"):
        worker.start()
        assert not worker.is_healthy()
        assert not ran.wait(0.5)

        there = Proxy(url, proxy.url.port)
        assert ran.wait(SOON)
        until(worker.is_healthy)
        until(lambda: any("is back, after" in message for message in caplog.messages))
        worker.stop()
        there.close()
        far.dispose()

    assert len([message for message in caplog.messages if "is away" in message]) == 1
    assert len([message for message in caplog.messages if "is back, after" in message]) == 1


def test_after_a_cut_without_a_word_it_works_on(proxy, far_worker, engine, queue, caplog):
    """Its connections are dead, and no error says so."""
    ran = threading.Semaphore(0)
    far_worker.use("t", lambda task: ran.release())
    with caplog.at_level(logging.WARNING, "apoq"):
        far_worker.start()
        add(engine, queue)
        assert ran.acquire(timeout=SOON)

        proxy.cut()
        until(lambda: not far_worker.is_healthy())
        time.sleep(1)
        proxy.heal()
        add(engine, queue)
        assert ran.acquire(timeout=SOON)
        until(far_worker.is_healthy)

    assert len([message for message in caplog.messages if "is away" in message]) == 1


def test_after_a_cut_without_a_word_it_hears_notifications_again(proxy, far, engine, queue):
    """It listens on a connection that is dead, and looks by itself once an hour."""
    ran = threading.Semaphore(0)
    worker = Worker(far, lease=SHORT, poll_interval=timedelta(hours=1))
    worker.use("t", lambda task: ran.release())
    worker.start()
    add(engine, queue)
    assert ran.acquire(timeout=SOON)

    proxy.cut()
    until(lambda: not worker.is_healthy())
    proxy.heal()
    until(worker.is_healthy)
    for _ in range(3):
        add(engine, queue)
        # A connection that it began to make while there was none is given up after 10 s.
        assert ran.acquire(timeout=SOON)
    worker.stop()


def test_what_is_claimed_after_the_worker_has_gone_on_without_it_is_given_back(
    proxy, far_worker, engine, queue
):
    """The server was slow, not gone: nobody reads the answer, and the row says running."""
    ran = threading.Event()
    far_worker.use("t", lambda task: ran.set())
    far_worker.start()
    until(lambda: probe.rests_until(far_worker))
    with engine.connect() as connection:
        hold_up(connection, far_worker)
        add(engine, queue)
        until(lambda: is_waiting(engine))
        proxy.drop()
        dropped_at = time.monotonic()
        until(lambda: probe.rests_until(far_worker) > dropped_at)
        assert is_waiting(engine)
        connection.rollback()

    assert ran.wait(SOON)
    until(lambda: count(engine, Task.state == "completed", Task.attempt == 1) == 1)


def test_a_processor_whose_session_is_cut_off_gives_its_slot_free_and_uses_up_no_attempt(
    proxy, far, engine, queue
):
    """It waits for an answer that never comes, and would for ever."""
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE effects (task_id bigint)"))
    begun, seen = threading.Event(), []
    worker = Worker(far, concurrency=1, lease=SHORT)

    def process(task) -> None:
        seen.append(task.attempt)
        task.session.execute(sa.text("INSERT INTO effects VALUES (:id)"), {"id": task.id})
        if not begun.is_set():
            begun.set()
            until(lambda: proxy.is_cut)
            task.session.execute(sa.text("INSERT INTO effects VALUES (:id)"), {"id": task.id})

    worker.use("t", process)
    worker.start()
    add(engine, queue)
    assert begun.wait(SOON)
    proxy.cut()
    until(lambda: not worker.is_healthy())
    time.sleep(1)
    proxy.heal()
    # Its transaction is still open at the server, which doesn't know that nobody will ever end it.
    until(lambda: count(engine, Task.state == "completed") == 1)
    worker.stop()

    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM effects")) == 1
    assert seen == [1, 1]


def test_a_lapsed_worker_claims_nothing_and_starts_nothing(engine, queue, make_worker):
    ran = []
    worker = make_worker(concurrency=1)
    may_end = threading.Event()
    worker.use("t", lambda task: ran.append(task.id) or may_end.wait(SOON))
    worker.start()
    first = add(engine, queue)
    until(lambda: ran == [first])
    # As if the whole process had been frozen.
    probe.end_lease(worker)
    probe.stop_heartbeat(worker)
    may_end.set()
    second = add(engine, queue)
    time.sleep(0.5)

    assert ran == [first]
    assert not worker.is_healthy()

    probe.heartbeat(worker).turn()
    until(lambda: ran == [first, second])


def test_a_server_that_turns_read_only_for_a_while_is_an_outage_like_any_other(
    engine, url, queue, make_worker
):
    """As after a failover that left the worker with the old primary."""
    ran = threading.Semaphore(0)
    worker = make_worker(poll_interval=timedelta(seconds=0.2))
    worker.use("t", lambda task: task.session.execute(sa.text("SELECT 1")) and ran.release())
    worker.start()
    add(engine, queue)
    assert ran.acquire(timeout=SOON)
    until(lambda: count(engine, Task.state == "completed") == 1)

    quiet = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with quiet.connect() as connection:
        task = add(engine, queue, "other")
        connection.exec_driver_sql(f"ALTER DATABASE {url.database} SET default_transaction_read_only = on")
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        connection.exec_driver_sql(f"UPDATE apoq_tasks SET type = 't' WHERE id = {task}")
        assert not ran.acquire(timeout=2)
        connection.exec_driver_sql(f"ALTER DATABASE {url.database} SET default_transaction_read_only = off")
        # No session is ended here: those which were made meanwhile stay read-only.
        assert ran.acquire(timeout=SOON)


def test_what_ends_while_the_server_is_read_only_is_written_when_it_is_so_no_more(
    engine, url, queue, make_worker
):
    begun, may_end = threading.Event(), threading.Event()
    worker = make_worker(lease=timedelta(seconds=30))
    worker.use("t", lambda task: begun.set() or may_end.wait(SOON))
    worker.start()
    add(engine, queue)
    assert begun.wait(SOON)

    quiet = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with quiet.connect() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {url.database} SET default_transaction_read_only = on")
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        may_end.set()
        # The first time, its connection has ended; and then the server is read-only.
        until(lambda: probe.settler_failures(worker) > 2)
        connection.exec_driver_sql(f"ALTER DATABASE {url.database} SET default_transaction_read_only = off")
        until(lambda: count(quiet, Task.state == "completed", Task.attempt == 1) == 1)


def test_a_migration_that_locks_the_tasks_does_not_cost_the_worker_its_lease(engine, queue, make_worker):
    worker = make_worker(lease=timedelta(seconds=3))
    worker.use("t", lambda task: None)
    worker.start()
    until(worker.is_healthy)
    with engine.begin() as connection:
        connection.execute(sa.text("LOCK apoq_tasks"))
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            assert probe.lease(worker).is_held
            time.sleep(0.05)


def test_it_is_healthy_from_start_to_stop(make_worker):
    worker = make_worker()
    assert not worker.is_healthy()
    assert worker.last_heartbeat_at is None

    worker.start()
    until(worker.is_healthy)
    assert worker.last_heartbeat_at is not None

    worker.stop()
    assert not worker.is_healthy()


def test_it_is_not_healthy_while_every_claim_fails(engine, queue, make_worker, monkeypatch, caplog):
    """Its heartbeats go on, and so it holds its lease."""
    monkeypatch.setattr(lifecycle_module, "TOLERATED_FAILURE_SECONDS", 0.3)
    worker = make_worker()
    worker.use("t", lambda task: None)
    worker.start()
    until(worker.is_healthy)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE apoq_claims ADD CONSTRAINT nothing CHECK (number < 0) NOT VALID"
        )
    add(engine, queue)

    until(lambda: not worker.is_healthy())
    assert probe.lease(worker).is_held
    assert "apoq-claimer failed, and is tried again until it succeeds" in caplog.text

    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE apoq_claims DROP CONSTRAINT nothing")
    until(worker.is_healthy)
    until(lambda: count(engine, Task.state == "completed", Task.attempt == 1) == 1)


def test_it_is_not_healthy_while_every_settlement_fails(worker, monkeypatch):
    monkeypatch.setattr(lifecycle_module, "TOLERATED_FAILURE_SECONDS", 0.3)
    worker.start()
    until(worker.is_healthy)
    with probe.failing_settler(worker, LookupError("nothing can be written")):
        until(lambda: not worker.is_healthy())

    until(worker.is_healthy)


def test_a_connection_that_the_worker_itself_has_cut_is_no_outage(make_worker, caplog):
    """As after the whole process was frozen: what it listens on may be dead without a word."""
    caplog.set_level(logging.WARNING, "apoq")
    worker = make_worker(poll_interval=timedelta(hours=1))
    worker.start()

    def listens() -> bool:
        return probe.awaited(worker) == LISTENS

    own_pool = probe.own_engine(worker).pool
    until(lambda: listens() and probe.has_looked(worker) and own_pool.checkedout() == 0)
    before = probe.listening_connection(worker)

    probe.end_lease(worker)
    probe.lose_leases(worker, [None])

    until(lambda: probe.listening_connection(worker) is not before and listens())
    (message,) = caplog.messages
    assert message.startswith("the lease could not be renewed in time")


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_what_was_claimed_and_has_not_begun_loses_no_attempt_when_the_server_stops(queue, kind, caplog):
    caplog.set_level(logging.CRITICAL, "apoq.worker")
    sleep = sa.text("SELECT pg_sleep(0.001)")
    slots = 4

    async def process_on_the_loop(task) -> None:
        await task.session.execute(sleep)

    def process(task) -> None:
        task.session.execute(sleep)

    with restartable() as server:
        quiet, near = sa.create_engine(server.url, poolclass=sa.NullPool), sa.create_engine(server.url)
        prepare(near)
        worker = Worker(near, queue, concurrency=slots)
        worker.use("t", process if kind == "plain" else process_on_the_loop, retry_limit=0)
        with Session(quiet) as session, session.begin():
            queue.add_many(session, "t", range(2_000))
        worker.start()
        until(lambda: worker.stats().completed > 100 and probe.executor(worker).load > 5 * slots)

        server.stop()
        until(lambda: probe.executor(worker).load == 0)
        server.start()

        until(lambda: count(quiet, Task.state.in_(["pending", "running"])) == 0, timeout=90)
        worker.stop()
        failed = count(quiet, Task.state == "failed")
        # Those that ran; and in each slot, one more that may have begun before anything was known.
        assert failed <= slots
        assert (
            count(quiet, Task.state == "completed", Task.attempt == 1, Task.fail_count == 0) == 2_000 - failed
        )
        near.dispose()


def test_whatever_of_a_worker_finds_the_database_away_what_has_not_begun_is_given_back():
    given_back: list[str] = []
    outage = Outage(on_away=lambda: given_back.append("the line"))
    listener, claimer = Failures("the listener", outage), Failures("the claimer", outage)

    listener.failed(LookupError("refused, and so the database is there"))
    assert len(given_back) == 0
    for _ in range(3):
        listener.failed(ConnectionError("no route"))
    assert len(given_back) == 1
    claimer.failed(ConnectionError("no route"))
    assert len(given_back) == 2

    listener.recovered()
    listener.failed(ConnectionError("no route"))
    assert len(given_back) == 3
