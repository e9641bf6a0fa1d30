"""Connections on which the server has fallen silent are cut, and what it executes for them is cancelled."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator

import probe
import psycopg
import pytest
import sqlalchemy as sa
from proxy import Proxy
from psycopg import capabilities
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Worker
from apoq.postgres import watchdog as watching
from apoq.postgres.connections import execute, own_engine
from apoq.postgres.watchdog import Watchdog, watch

SOON = 30.0

until = patience(SOON)

cancels = pytest.mark.skipif(
    not capabilities.has_cancel_safe() and psycopg.pq.__impl__ != "python",
    reason="this libpq can't cancel without blocking all threads",
)
ACTIVE = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'active'
"""


def active(connection: sa.Connection) -> int:
    return connection.scalar(sa.text(ACTIVE))


class SlowProxy(Proxy):
    """Lets through so many bytes a second."""

    rate = 1_000_000

    def _accept(self) -> None:
        try:
            while True:
                client, _ = self._listening.accept()
                server = self._connect()
                for source, target, is_slow in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pump, args=(source, target, is_slow), daemon=True).start()
        except OSError:
            pass

    def _pump(self, source: socket.socket, target: socket.socket, is_slow: bool) -> None:
        try:
            while data := source.recv(self.rate // 20):
                if is_slow:
                    time.sleep(len(data) / self.rate)
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            end.close()


@pytest.fixture
def slow(url) -> Iterator[sa.Engine]:
    proxy = SlowProxy(url)
    engine = sa.create_engine(proxy.url, poolclass=sa.NullPool)
    own = own_engine(engine)
    yield own
    own.dispose()
    proxy.close()


@pytest.fixture
def quiet(url) -> sa.Engine:
    return sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)


@pytest.fixture
def own(engine) -> Iterator[sa.Engine]:
    own = own_engine(engine)
    yield own
    own.dispose()


def test_a_long_answer_is_not_overdue_while_it_arrives(slow):
    size = 3 * SlowProxy.rate
    began = time.monotonic()

    ((text,),) = execute(slow, sa.select(sa.func.repeat("x", sa.literal(size, sa.Integer))), {}, timeout=1.0)

    assert len(text) == size
    assert time.monotonic() > began + 1.0 + watching.CHECK_INTERVAL_SECONDS


def test_a_server_that_falls_silent_is_cut_after_that_long(own):
    began = time.monotonic()

    with pytest.raises(
        psycopg.OperationalError,
        match=r"^the server has not responded for 0\.2 s: apoq has closed the connection$",
    ):
        execute(own, sa.select(sa.func.pg_sleep(30)), {}, timeout=0.2)

    assert time.monotonic() < began + 10


def test_after_its_limit_an_engine_waits_for_no_answer_and_sends_nothing(own):
    watch.limit(own, time.monotonic() + 0.2)
    with pytest.raises(psycopg.OperationalError, match=r"^the worker is stopping: apoq no longer waits"):
        execute(own, sa.select(sa.func.pg_sleep(30)), {})
    with pytest.raises(psycopg.OperationalError, match=r"^the worker is stopping: apoq no longer waits"):
        execute(own, sa.text("SELECT 1"), {})

    watch.limit(own, None)

    assert execute(own, sa.text("SELECT 1"), {}).fetchall() == [(1,)]


def test_what_the_server_has_ended_is_its_own_error(own, engine):
    with engine.connect() as other:
        pid = execute(own, sa.select(sa.func.pg_backend_pid()), {}).fetchall()[0][0]
        other.execute(sa.select(sa.func.pg_terminate_backend(pid)))

    with pytest.raises(psycopg.OperationalError, match="terminating connection"):
        execute(own, sa.text("SELECT 1"), {})


@cancels
@pytest.mark.parametrize("by", ["deadline", "cut_all"])
def test_what_is_cut_is_cancelled_at_the_server(engine, quiet, own, by):
    failed = threading.Event()

    def wait() -> None:
        with pytest.raises(psycopg.OperationalError):
            execute(own, sa.text("SELECT FROM apoq_tasks"), {}, timeout=0.5 if by == "deadline" else SOON)
        failed.set()

    with engine.connect() as holding, quiet.connect() as looking:
        holding.execute(sa.text("LOCK apoq_tasks"))
        threading.Thread(target=wait).start()
        if by == "cut_all":
            until(lambda: looking.scalar(sa.text(ACTIVE + " AND wait_event_type = 'Lock'")) == 1)
            watch.cut_all(own)
        assert failed.wait(SOON)
        until(lambda: active(looking) == 0)


@cancels
def test_a_session_of_a_task_that_is_cut_off_is_cancelled_too(engine, quiet, queue, make_worker):
    worker = make_worker()
    worker.use("t", lambda task: task.session.execute(sa.select(sa.func.pg_sleep(SOON))))
    with Session(engine) as session, session.begin():
        queue.add(session, "t")
    worker.start()
    with quiet.connect() as looking:
        asleep = sa.text(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
        )
        until(lambda: looking.scalars(asleep).all())
        [session] = looking.scalars(asleep)
        probe.lose_leases(worker, [None])
        # The task is given back, and may sleep again by then, in another session.
        until(lambda: session not in looking.scalars(asleep).all())


def test_a_closed_connection_is_cut_without_an_error(url):
    connection = psycopg.connect(url.set(drivername="postgresql").render_as_string(False))
    watching.cut(connection)
    connection.close()
    watching.cut(connection)


def test_who_cancels_holds_up_nobody(url, monkeypatch):
    """The address of the server doesn't answer any more."""
    asked = threading.Event()
    monkeypatch.setattr(watching, "_cancellation", lambda pgconn: lambda: asked.wait(SOON))
    connection = psycopg.connect(url.set(drivername="postgresql").render_as_string(False))
    began = time.monotonic()
    watching.cut(connection)

    assert time.monotonic() < began + 5
    asked.set()
    connection.close()


@pytest.mark.slow
@cancels
def test_a_table_that_stays_locked_collects_no_sessions(engine, quiet, url, queue, monkeypatch):
    """Each statement that is given up is ended at the server, before the next one waits beside it."""
    monkeypatch.setitem(execute.__kwdefaults__, "timeout", 0.5)
    workers = [Worker(sa.create_engine(url), queue) for _ in range(2)]
    ran = threading.Semaphore(0)
    for worker in workers:
        worker.use("t", lambda task: ran.release())
        worker.start()
    most = 0
    with engine.connect() as holding, quiet.connect() as looking:
        holding.execute(sa.text("LOCK apoq_tasks"))
        ends_at = time.monotonic() + 12
        while time.monotonic() < ends_at:
            most = max(most, active(looking))
            time.sleep(0.1)
        holding.rollback()
    with Session(engine) as session, session.begin():
        queue.add(session, "t")

    assert ran.acquire(timeout=SOON)
    for worker in workers:
        worker.stop(timeout=5)
        probe.engine(worker).dispose()
    assert most <= 10  # of each worker: claimer, scanner, heartbeat, lost tasks and pruner


class TestWithoutAThread:
    @pytest.fixture
    def threads(self, monkeypatch) -> dict[str, bool]:
        """Whether threads can be started."""
        threads = {"can be started": False}
        start = threading.Thread.start

        def start_or_not(thread: threading.Thread) -> None:
            if not threads["can be started"] and thread.name.startswith("apoq-watch"):
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_or_not)
        return threads

    def test_a_statement_is_executed_unwatched_and_a_later_one_is_watched(
        self, own, threads, monkeypatch, caplog
    ):
        monkeypatch.setattr("apoq.postgres.connections.watch", fresh := Watchdog())
        monkeypatch.setattr("apoq.postgres.fast_path.watch", fresh)
        with caplog.at_level(logging.WARNING, "apoq"):
            for _ in range(3):
                assert execute(own, sa.text("SELECT 1"), {}).fetchall() == [(1,)]
        assert len([message for message in caplog.messages if "can't start new thread" in message]) == 1

        threads["can be started"] = True
        with pytest.raises(psycopg.OperationalError):
            execute(own, sa.select(sa.func.pg_sleep(30)), {}, timeout=0.2)

    def test_a_statement_is_not_cancelled_and_is_cut(self, own, monkeypatch):
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "apoq-cancel":
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(psycopg.OperationalError):
            execute(own, sa.select(sa.func.pg_sleep(5)), {}, timeout=0.2)
