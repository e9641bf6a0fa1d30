"""An idle worker starts a new task soon after the commit, and never because of something in it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise

import probe
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, prepare
from apoq.client.notifier import SEND_INTERVAL_SECONDS
from apoq.schema.statements.notify import CANCELLED, CHANNEL
from apoq.worker.claiming import listener
from apoq.worker.liveness.lost_tasks import MIN_INTERVAL_SECONDS

SOON = 10.0

until = patience(SOON)
LONG = timedelta(hours=1)
"""A poll interval in which nothing is found by looking: what starts was notified at."""


@pytest.fixture
def started(make_worker):
    """A worker that is idle, and only notifications can wake; the semaphore counts its tasks."""
    ran = threading.Semaphore(0)
    worker = make_worker(poll_interval=LONG)
    worker.use("t", lambda task: ran.release())
    worker.start()
    return ran


def start(worker) -> None:
    """Start a worker, and wait until it listens and nothing keeps it busy."""
    listens = threading.Event()
    probe.after_notification(worker, listens.set)
    worker.start()
    assert listens.wait(SOON)
    until(lambda: probe.is_idle(worker))


@contextmanager
def hearing(engine):
    """Answer a function that answers the notifications that come within so many seconds."""
    with engine.connect() as listening:
        raw = listening.connection.driver_connection
        raw.autocommit = True
        raw.execute(f"LISTEN {CHANNEL}")
        yield lambda timeout: list(raw.notifies(timeout=timeout))
        raw.autocommit = False


def test_a_session(engine, queue, started):
    for _ in range(5):
        with Session(engine) as session, session.begin():
            queue.add(session, "t")
        assert started.acquire(timeout=SOON)


def test_add_many(engine, queue, started):
    with Session(engine) as session, session.begin():
        queue.add_many(session, "t", range(3))

    assert all(started.acquire(timeout=SOON) for _ in range(3))


def test_a_connection(engine, queue, started):
    with engine.connect() as connection:
        for _ in range(5):
            queue.add(connection, "t")
            connection.commit()
            assert started.acquire(timeout=SOON)


def test_an_async_session(url, queue, started):
    async def main() -> None:
        engine = create_async_engine(url)
        async with AsyncSession(engine) as session:
            await queue.add(session, "t")
            await session.commit()
        await engine.dispose()

    asyncio.run(main())
    assert started.acquire(timeout=SOON)


def test_an_async_connection(url, queue, started):
    async def main() -> None:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await queue.add(connection, "t")
        await engine.dispose()

    asyncio.run(main())
    assert started.acquire(timeout=SOON)


def test_the_release_of_a_savepoint_is_no_commit_and_loses_no_notification(engine, queue, started):
    with hearing(engine) as heard, Session(engine) as session, session.begin():
        with session.begin_nested():
            queue.add(session, "t")
        session.execute(sa.text("SELECT 1"))
        assert heard(0.3) == []

    assert started.acquire(timeout=SOON)


def test_a_session_that_is_used_again_notifications_again(engine, queue, started):
    with Session(engine) as session:
        queue.add(session, "t")
        session.rollback()
        for _ in range(3):
            queue.add(session, "t")
            session.commit()
            assert started.acquire(timeout=SOON)


def test_any_session_of_a_schema(engine, make_worker):
    prepare(engine, schema="jobs")
    queue = Queue("emails", schema="jobs")
    ran = threading.Event()
    worker = make_worker(queue, poll_interval=LONG)
    worker.use("t", lambda task: ran.set())
    worker.start()

    with Session(engine) as session, session.begin():
        queue.add(session, "t")

    assert ran.wait(SOON)


def test_the_claim_is_made_where_the_notification_was_heard(engine, queue, make_worker):
    """That session of the server's is awake, and another one would have to wake up first."""
    ran = threading.Semaphore(0)
    worker = make_worker(poll_interval=LONG)
    worker.use("t", lambda task: ran.release())
    start(worker)
    listening = probe.listening_session(worker)
    last = sa.text("SELECT query FROM pg_stat_activity WHERE pid = :pid")

    def is_claimed_there() -> bool:
        with Session(engine) as session, session.begin():
            queue.add(session, "t")
        assert ran.acquire(timeout=SOON)
        with engine.connect() as connection:
            return "json_to_recordset" in connection.scalar(last, {"pid": listening})

    # On a busy machine, the claimer may be about to look by itself.
    until(is_claimed_there)


def test_where_nothing_notifies_it_is_found_within_the_poll_interval(engine, url, queue, make_worker):
    ran = threading.Event()
    worker = make_worker(poll_interval=timedelta(seconds=1))
    worker.use("t", lambda task: ran.set())
    worker.start()
    # It has looked, and sleeps.
    until(lambda: probe.is_scanner_asleep(worker, 0.5))

    with psycopg.connect(
        url.set(drivername="postgresql").render_as_string(hide_password=False)
    ) as connection:
        queue.add(connection, "t")

    assert ran.wait(SOON)


def test_an_idle_worker_looks_for_nothing_before_its_poll_interval_is_over(make_worker, monkeypatch):
    """Nor for each of its slots: all that the database hears from it is that it lives."""
    worker = make_worker(poll_interval=LONG, lease=timedelta(seconds=0.5))
    worker.use("t", lambda task: None)
    scanner, claimer = probe.scanner(worker), probe.claimer(worker)
    looks: list[str] = []

    def noted(look):
        return lambda *given: looks.append(look.__name__) or look(*given)

    monkeypatch.setattr(scanner, "survey", noted(scanner.survey))
    monkeypatch.setattr(claimer, "claim", noted(claimer.claim))

    def beats(count: int) -> None:
        for _ in range(count):
            last = worker.last_heartbeat_at
            until(lambda last=last: worker.last_heartbeat_at != last)

    worker.start()
    until(lambda: {"survey", "claim"} <= set(looks))
    beats(5)  # and it has looked again once it listens
    looks.clear()
    beats(10)

    assert looks == []


def test_a_sleep_ends_when_the_next_task_is_due(engine, queue, make_worker):
    ran = threading.Event()
    worker = make_worker(poll_interval=LONG)
    worker.use("t", lambda task: ran.set())
    start(worker)
    with Session(engine) as session, session.begin():
        queue.add(session, "t", delay=timedelta(seconds=1))
    added = time.monotonic()

    assert ran.wait(SOON)
    assert time.monotonic() - added > 0.9


def test_a_retry_is_started_when_it_is_due(engine, queue, make_worker):
    ran = threading.Event()
    worker = make_worker(poll_interval=LONG)
    scanner = probe.scanner(worker)

    def has_surveyed() -> bool:
        return probe.scanner_rests_until(scanner, known=True) != before

    def process(task) -> None:
        if task.fail_count == 0:
            until(lambda: has_surveyed() and probe.is_idle(worker))  # nothing is looked for any more
            raise ValueError
        ran.set()

    worker.use("t", process, retry_delay=lambda fail_count: 0.2)
    start(worker)
    before = probe.scanner_rests_until(scanner, known=True)
    with Session(engine) as session, session.begin():
        queue.add(session, "t")

    assert ran.wait(SOON)


def test_what_was_added_before_the_worker_listened_is_found(engine, queue, make_worker):
    for _ in range(5):
        ran = threading.Event()
        worker = make_worker(poll_interval=LONG)
        worker.use("t", lambda task, ran=ran: ran.set())
        starting = threading.Thread(target=worker.start)
        starting.start()
        with Session(engine) as session, session.begin():
            queue.add(session, "t")
        assert ran.wait(SOON)
        starting.join()
        worker.stop()


def test_a_task_that_is_cancelled_just_before_the_worker_listens_is_told(engine, queue, make_worker):
    begun, told = threading.Event(), threading.Event()
    with Session(engine) as session, session.begin():
        task_id = queue.add(session, "t").id
    worker = make_worker(lease=LONG)
    worker.use("t", lambda task: begun.set() or (until(lambda: task.should_stop) and told.set()))

    def cancel() -> None:
        assert begun.wait(SOON)
        with Session(engine) as session, session.begin():
            assert queue.cancel(session, task_id)

    probe.before_listening(worker, cancel)
    worker.start()

    assert told.wait(SOON)


def test_what_was_added_just_before_the_worker_listened_is_found(engine, url, queue, make_worker):
    """It has looked, found nothing, and hears of nothing that came between."""
    ran = threading.Event()
    worker = make_worker(poll_interval=LONG)
    worker.use("t", lambda task: ran.set())

    def add_by_psycopg() -> None:
        until(lambda: probe.is_idle(worker))
        with psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False)) as other:
            queue.add(other, "t")

    probe.before_listening(worker, add_by_psycopg)
    worker.start()

    assert ran.wait(SOON)


@pytest.mark.parametrize("connect", [Session, sa.Engine.connect])
def test_the_callers_transaction_notifies_nobody(engine, queue, connect):
    """No NOTIFY in it, nor any other statement but the insert (test_add.py counts them)."""
    with hearing(engine) as heard, connect(engine) as session:
        queue.add(session, "t")
        session.execute(sa.text("COMMIT"))

        assert heard(0.1) == []


def test_a_burst_of_commits_is_a_few_notifications(engine, queue):
    with hearing(engine) as heard:
        began = time.monotonic()
        for _ in range(200):
            with Session(engine) as session, session.begin():
                queue.add(session, "t")
        took = time.monotonic() - began
        count = len(heard(0.5))

    # One for every two milliseconds at most, and the one under way.
    assert 1 <= count <= min(200, took / 0.002 + 1)


@pytest.fixture
def line(engine, queue):
    """The connection on which notifications are sent at once, open."""
    add(engine, queue)
    line = probe.line(engine)
    until(lambda: probe.line_connection(line) is not None)
    return line


def add(engine, queue) -> None:
    with Session(engine) as session, session.begin():
        queue.add(session, "t")


def add_leaves_a_notification(engine, queue) -> bool:
    """Add a task; return whether its notification waits for the other thread."""
    add(engine, queue)
    return probe.pending(engine)


def test_while_the_server_is_slow_a_burst_of_commits_is_a_few_notifications(engine, queue, line):
    pid = probe.line_connection(line).driver_connection.info.backend_pid
    with hearing(engine) as heard:
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(50):
                add(engine, queue)
        finally:
            os.kill(pid, signal.SIGCONT)
        count = len(heard(0.5))

    # The one that has no response yet, and one for all others.
    assert count == 2


class TestANotificationThatIsSentAtOnce:
    """From the thread that commits."""

    def test_is_heard_and_leaves_nothing_to_the_other_thread(self, engine, queue, line):
        with hearing(engine) as heard:
            for _ in range(3):
                assert not add_leaves_a_notification(engine, queue)
                time.sleep(2 * SEND_INTERVAL_SECONDS)

            assert len(heard(0.5)) == 3

    def test_flushes_nothing_to_the_disk(self, engine, queue):
        with engine.begin() as connection:
            name = connection.scalar(sa.func.current_database())
            # The tests' own servers don't flush.
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET synchronous_commit = on")
        engine.dispose()
        add(engine, queue)
        line = probe.line(engine)
        until(lambda: probe.line_connection(line) is not None)
        line.close()

        with engine.connect() as connection, probe.line_engine(line).connect() as its:
            shown = [one.exec_driver_sql("SHOW synchronous_commit").scalar() for one in (connection, its)]

        assert shown == ["on", "off"]

    def test_is_the_other_threads_where_the_last_one_was_just_now(self, engine, queue, line):
        with hearing(engine) as heard:
            assert not add_leaves_a_notification(engine, queue)
            while not add_leaves_a_notification(engine, queue):
                """Too late: it was sent at once again."""

            until(lambda: not probe.pending(engine))
            assert len(heard(0.5)) >= 2

    def test_is_the_other_threads_where_the_last_one_is_not_answered_yet(self, engine, queue, line):
        pid = probe.line_connection(line).driver_connection.info.backend_pid
        with hearing(engine) as heard:
            os.kill(pid, signal.SIGSTOP)
            try:
                assert not add_leaves_a_notification(engine, queue)
                assert add_leaves_a_notification(engine, queue)
            finally:
                os.kill(pid, signal.SIGCONT)

            until(lambda: not probe.pending(engine))
            assert len(heard(0.5)) == 2

    def test_is_sent_again_by_the_other_where_its_connection_is_lost(self, engine, queue, line):
        pid = probe.line_connection(line).driver_connection.info.backend_pid
        with hearing(engine) as heard:
            with engine.begin() as connection:
                connection.execute(sa.select(sa.func.pg_terminate_backend(pid, 5_000)))

            add(engine, queue)

            assert len(heard(0.5)) == 1
        until(lambda: probe.line_connection(line) is not None)
        assert probe.line_connection(line).driver_connection.info.backend_pid != pid

    def test_that_was_refused_is_noticed_by_the_next(self, engine, queue, line):
        before = probe.line_connection(line)
        before.driver_connection.execute("DEALLOCATE ALL")
        add(engine, queue)
        time.sleep(2 * SEND_INTERVAL_SECONDS)

        with hearing(engine) as heard:
            add(engine, queue)

            assert len(heard(0.5)) == 1
        until(lambda: probe.line_connection(line) not in {None, before})

    def test_does_not_wait_for_a_server_that_is_silent(self, engine, queue, line):
        pid = probe.line_connection(line).driver_connection.info.backend_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            for _ in range(3):
                add(engine, queue)
                time.sleep(2 * SEND_INTERVAL_SECONDS)
            took = time.monotonic() - began
            assert probe.pending(engine)
        finally:
            os.kill(pid, signal.SIGCONT)

        assert took < 1
        until(lambda: not probe.pending(engine))


def test_a_session_in_somebody_elses_transaction_gives_no_notification(engine, queue):
    """As in a test that rolls back all that it does: nothing of it is to leave the transaction."""
    before = set(threading.enumerate())
    with engine.connect() as connection:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            queue.add(session, "t")
            session.commit()
        assert not set(threading.enumerate()) - before
        connection.rollback()


def test_a_listener_whose_connection_is_killed_listens_again(engine, queue, make_worker):
    ran = threading.Semaphore(0)
    worker = make_worker(poll_interval=LONG)
    worker.use("t", lambda task: ran.release())
    start(worker)
    listening = probe.listening_session(worker)
    with engine.begin() as connection:
        assert connection.scalar(sa.select(sa.func.pg_terminate_backend(listening)))

    with Session(engine) as session, session.begin():
        queue.add(session, "t")

    assert ran.acquire(timeout=SOON)


@contextmanager
def flooding(engine, channel: str, payload: str = "i::text"):
    """Notify, commit by commit and as fast as the server can, from one session of its own."""
    loop = f"""
        DO $$ BEGIN FOR i IN 1 .. 1000000000 LOOP
            PERFORM pg_notify('{channel}', {payload});
            IF i % 100 = 0 THEN COMMIT; END IF;
        END LOOP; END $$
    """
    flooder = engine.raw_connection()
    flooder.driver_connection.autocommit = True
    pid = flooder.driver_connection.info.backend_pid

    def flood() -> None:
        with suppress(psycopg.errors.QueryCanceled):
            flooder.driver_connection.execute(loop)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        yield
    finally:
        while thread.is_alive():
            with engine.begin() as connection:
                connection.execute(sa.select(sa.func.pg_cancel_backend(pid)))
            thread.join(0.1)
        flooder.driver_connection.autocommit = False
        flooder.close()


class TestNotificationsOfOthers:
    """Any role that may connect can send them."""

    @pytest.mark.parametrize(
        ("channel", "payload"),
        [
            (CANCELLED, "repeat('9', 5000)"),
            (CANCELLED, "repeat('9', 19)"),
            (CANCELLED, "'٣'"),
            (CANCELLED, "'-1'"),
            (CANCELLED, "''"),
            (CHANNEL, "'nobody''s'"),
            (CHANNEL, "'💥'"),
        ],
    )
    def test_that_make_no_sense_end_no_connection(self, engine, queue, make_worker, caplog, channel, payload):
        ran = threading.Semaphore(0)
        worker = make_worker(poll_interval=LONG)
        worker.use("t", lambda task: ran.release())
        start(worker)
        before = probe.listening_session(worker)

        for _ in range(3):
            with engine.begin() as connection:
                connection.exec_driver_sql(f"SELECT pg_notify('{channel}', {payload})")
            add(engine, queue)
            assert ran.acquire(timeout=SOON)

        assert probe.listening_session(worker) == before
        assert caplog.messages == []

    def test_that_forge_a_cancellation_lead_to_few_looks(self, engine, queue, make_worker):
        begun = threading.Event()
        worker = make_worker(lease=timedelta(seconds=60))
        worker.use("t", lambda task: begun.set() or until(lambda: task.should_stop, timeout=3 * SOON))
        worker.start()
        add(engine, queue)
        assert begun.wait(SOON)
        [task] = probe.executor(worker).running()
        looked_at: list[float] = []
        probe.after_look_for_lost_tasks(worker, lambda: looked_at.append(time.monotonic()))

        with flooding(engine, CANCELLED, f"'{task.id}'"):
            until(lambda: len(looked_at) > 10)
            assert not task.should_stop
            with Session(engine) as session, session.begin():
                queue.cancel(session, task.id)
            until(lambda: task.should_stop)

        assert min(later - sooner for sooner, later in pairwise(looked_at)) >= MIN_INTERVAL_SECONDS

    def test_that_are_a_flood_are_not_listened_to(self, engine, queue, make_worker, monkeypatch, caplog):
        monkeypatch.setattr(listener, "MAX_NOTIFICATIONS", 10)
        monkeypatch.setattr(listener, "FLOOD_SECONDS", 0.2)
        monkeypatch.setattr(listener, "CHECK_INTERVAL_SECONDS", 0.5)
        monkeypatch.setattr(listener, "PROBE_RETRY_SECONDS", 0.2)
        ran = threading.Semaphore(0)
        worker = make_worker(poll_interval=timedelta(seconds=0.2))
        worker.use("t", lambda task: ran.release())
        worker.start()
        until(lambda: probe.listening_connection(worker))

        with flooding(engine, CHANNEL):
            until(lambda: "notifications arrive faster than this worker can read them" in caplog.text)
            add(engine, queue)
            assert ran.acquire(timeout=SOON)

        until(lambda: "the worker reads notifications again" in caplog.text)
        assert len(caplog.messages) == 2
