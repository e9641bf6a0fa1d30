"""Behind a real PgBouncer, which hands each transaction to any of a few sessions."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from functools import partial

import probe
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq import AsyncRunningTask, Queue, RunningTask, Task, Worker, prepare
from apoq.cli import main
from apoq.postgres.connections import SESSION, execute, own_engine
from apoq.schema.statements.notify import CHANNEL
from apoq.worker.claiming import listener

PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="no pgbouncer here: apt-get install pgbouncer"),
    pytest.mark.slow,
]

SOON = 30.0

until = patience(SOON)
LONG = timedelta(hours=1)
POOL_SIZE = 3
UNPREPARED = {"prepare_threshold": None}
"""What psycopg must be told behind a transaction pooler, by whoever makes an engine."""


class PgBouncer:
    """A PgBouncer in front of a server, as a process of its own, reached through a Unix socket."""

    def __init__(self, server: sa.URL, **settings: object) -> None:
        self._user = probe.server_user()  # it refuses to run as root, as PostgreSQL does
        self.folder = probe.new_folder(self._user)
        host = server.query.get("host") or server.host
        port = server.query.get("port") or server.port or 5432
        target = f"host={host} port={port} user={server.username}"
        if server.password:
            target += " password='{}'".format(server.password.replace("'", "''"))
        settings = {
            "listen_port": 6432,
            "unix_socket_dir": self.folder,
            "logfile": self.folder / "log",
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": POOL_SIZE,
            "server_login_retry": 0.1,
            **settings,
        }
        lines = ["[databases]", f"* = {target}", "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in settings.items()]
        (self.folder / "pgbouncer.ini").write_text("\n".join(lines))
        if self._user:
            for path in (self.folder, self.folder / "pgbouncer.ini"):
                os.chown(path, self._user["user"], self._user["group"])

    def start(self) -> None:
        command = [PROGRAM, "-q", self.folder / "pgbouncer.ini"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        # PR_SET_PDEATHSIG: tests that are killed take it along.
        with_tests = partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL) if sys.platform == "linux" else None
        options = {**quiet, **self._user, "cwd": "/", "preexec_fn": with_tests}
        self._process = subprocess.Popen(command, **options)
        until(self._answers)

    def end(self, how: int = signal.SIGTERM) -> None:
        while self._process.poll() is None:  # newer ones wait for their clients until they are told twice
            self._process.send_signal(how)
            try:
                self._process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue

    def url(self, database: str | None) -> sa.URL:
        return sa.URL.create(
            "postgresql+psycopg",
            username="anybody",
            database=database,
            query={"host": str(self.folder), "port": "6432"},
        )

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.folder / "log").read_text()
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.folder / ".s.PGSQL.6432")) == 0


def prepared_settings() -> list[dict[str, object]]:
    """Answer with what to try: as it comes, and without its support of prepared statements, if it has any."""
    if PROGRAM is None:
        return [{}]
    said = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
    version = tuple(map(int, re.findall(r"\d+", said)[:2]))
    return [{}, {"max_prepared_statements": 0}] if version >= (1, 21) else [{}]


@pytest.fixture
def start_pgbouncer(server) -> Iterator[Callable[..., PgBouncer]]:
    started = []

    def start(**settings) -> PgBouncer:
        started.append(PgBouncer(server, **settings))
        started[-1].start()
        return started[-1]

    yield start
    for pgbouncer in started:
        pgbouncer.end()
        shutil.rmtree(pgbouncer.folder)


@pytest.fixture(params=prepared_settings(), ids=lambda settings: "-".join(map(str, settings)) or "default")
def pgbouncer(request, start_pgbouncer) -> PgBouncer:
    return start_pgbouncer(**request.param)


@pytest.fixture
def pooled(pgbouncer, url) -> Iterator[sa.Engine]:
    """An engine through PgBouncer, to the test's own database."""
    engine = sa.create_engine(pgbouncer.url(url.database), connect_args=UNPREPARED)
    yield engine
    engine.dispose()


@pytest.fixture
def make_worker() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(engine, **options) -> Worker:
        made.append(Worker(engine, **options))
        return made[-1]

    yield make
    for worker in made:
        worker.stop(timeout=5)


def effect(task: RunningTask) -> None:
    task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})


async def async_effect(task: AsyncRunningTask) -> None:
    await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})


async def async_noop(task: AsyncRunningTask) -> None:
    await asyncio.sleep(0)


def flaky(task: RunningTask) -> None:
    effect(task)
    if task.attempt == 1:
        raise ConnectionError("not this time")


PROCESSORS = {
    "noop": lambda task: None,
    "effect": effect,
    "flaky": flaky,
    "async_noop": async_noop,
    "async_effect": async_effect,
}


def use_all(worker: Worker) -> None:
    for name, processor in PROCESSORS.items():
        worker.use(name, processor, retry_limit=100, retry_delay=lambda fail_count: 0)


def add_each(engine: sa.Engine, count: int) -> None:
    with Session(engine) as session, session.begin():
        for name in PROCESSORS:
            Queue().add_many(session, name, range(count))


def completed(engine: sa.Engine, *conditions) -> int:
    with engine.connect() as connection:
        query = sa.select(sa.func.count()).where(Task.state == "completed", *conditions)
        return connection.scalar(query)


def effects(engine: sa.Engine) -> tuple[int, int]:
    """Answer how many effects there are, and of how many tasks."""
    with engine.connect() as connection:
        query = sa.text("SELECT count(*), count(DISTINCT task_id) FROM ledger")
        return tuple(connection.execute(query).one())


def in_each_session(pooled: sa.Engine, statement: str) -> list[object]:
    """Ask each of the pooler's sessions for a list, by holding all of them at once."""
    answers: list[object] = []
    with ExitStack() as stack:
        connections = [stack.enter_context(pooled.begin()) for _ in range(POOL_SIZE)]
        pids = {connection.scalar(sa.text("SELECT pg_backend_pid()")) for connection in connections}
        assert len(pids) == POOL_SIZE
        for connection in connections:
            answers += connection.scalars(sa.text(statement)).all()
    return answers


def test_it_is_recognised_and_settings_last_for_a_transaction(pooled):
    own = own_engine(pooled)
    ask = "SELECT setting FROM pg_settings WHERE name = :name"
    for _ in range(20):
        answer = execute(own, sa.text(ask), {"name": "idle_in_transaction_session_timeout"})
        assert answer.fetchall() == [("5000",)]
    with own.begin() as connection:
        assert connection.scalar(sa.text("SHOW statement_timeout")) == "1min"
    own.dispose()

    assert set(in_each_session(pooled, "SHOW statement_timeout")) == {"0"}


def test_the_tables_are_prepared_through_it(pgbouncer, empty_url):
    engine = sa.create_engine(pgbouncer.url(empty_url.database), connect_args=UNPREPARED)
    for _ in range(10):
        prepare(engine)

    with Session(engine) as session, session.begin():
        assert Queue().add(session, "t").id == 1
    engine.dispose()


@pytest.mark.parametrize("count", [1, 3, 2_000])
def test_tasks_are_added_through_it(pooled, engine, count):
    for _ in range(10):
        with Session(pooled) as session, session.begin():
            Queue().add(session, "t")
            Queue().add_many(session, "t", range(count))

    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(Task)) == 10 * (count + 1)


@pytest.mark.parametrize("is_async", [False, True], ids=["engine", "async_engine"])
def test_a_thousand_tasks_are_worked_and_nothing_is_left_behind(
    pgbouncer, url, pooled, engine, make_worker, is_async
):
    given = create_async_engine(pgbouncer.url(url.database), connect_args=UNPREPARED) if is_async else pooled
    add_each(pooled, 200)
    workers = [make_worker(given) for _ in range(2)]
    for worker in workers:
        use_all(worker)
        worker.start()

    until(lambda: completed(engine) == 1_000, timeout=60)
    for worker in workers:
        worker.stop()

    assert effects(engine) == (600, 600)
    assert completed(engine, Task.fail_count == 0, Task.attempt == 1) == 800
    assert completed(engine, Task.type == "flaky", Task.fail_count == 1, Task.attempt == 2) == 200
    assert in_each_session(pooled, "SELECT statement FROM pg_prepared_statements") == []
    mine = ", ".join(f"'{name}'" for name in re.findall(r"SET (\w+)", SESSION))
    changed = f"SELECT name FROM pg_settings WHERE source = 'session' AND name IN ({mine})"
    assert in_each_session(pooled, changed) == []
    assert CHANNEL not in in_each_session(pooled, "SELECT pg_listening_channels()")
    if is_async:
        asyncio.run(given.dispose())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_lost_or_doubled_while_it_is_restarted_again_and_again(
    pgbouncer, pooled, engine, make_worker, how
):
    add_each(pooled, 200)
    worker = make_worker(pooled)
    use_all(worker)
    worker.start()

    for part in (100, 300, 500):
        until(lambda part=part: completed(engine) >= part)
        pgbouncer.end(how)
        pgbouncer.start()
    until(lambda: completed(engine) == 1_000, timeout=60)

    assert effects(engine) == (600, 600)


def test_no_session_of_the_pooler_stands_for_a_worker(pooled, engine, make_worker):
    """Straight to the server, a worker's death is noticed by the end of its session."""
    make_worker(pooled).start()

    with engine.connect() as connection:
        assert connection.scalars(sa.text("SELECT backend_pid FROM apoq_workers")).all() == [None]


class Ran:
    """A worker's tasks, waited for one by one."""

    def __init__(self, worker: Worker) -> None:
        self._ran = threading.Semaphore(0)
        worker.use("t", lambda task: self._ran.release())

    def add_and_wait(self, engine: sa.Engine) -> float:
        began = time.monotonic()
        with Session(engine) as session, session.begin():
            Queue().add(session, "t")
        assert self._ran.acquire(timeout=SOON)
        return time.monotonic() - began


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_with_a_listen_url_past_it_notifications_arrive(pooled, url, make_worker, caplog):
    worker = make_worker(pooled, poll_interval=LONG, listen_url=url)
    ran = Ran(worker)
    with caplog.at_level(logging.DEBUG, "apoq"):
        worker.start()
        took = [ran.add_and_wait(pooled) for _ in range(10)]

    assert sorted(took)[5] < 1
    assert warnings(caplog) == []


def test_without_one_tasks_are_found_by_looking_and_it_is_said_once(pooled, make_worker, monkeypatch, caplog):
    monkeypatch.setattr(listener, "PROBE_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(listener, "PROBE_RETRY_SECONDS", 0.01)
    worker = make_worker(pooled, poll_interval=timedelta(milliseconds=500))
    ran = Ran(worker)

    def said() -> list[int]:
        return [
            record.levelno for record in caplog.records if "receives no notifications" in record.getMessage()
        ]

    with caplog.at_level(logging.DEBUG, "apoq"):
        worker.start()
        for _ in range(5):
            ran.add_and_wait(pooled)
        until(lambda: len(said()) > 3)

    assert said()[:2] == [logging.WARNING, logging.DEBUG]
    (warning,) = warnings(caplog)
    assert "listen_url" in warning


def test_in_session_mode_notifications_arrive_through_it(start_pgbouncer, url, make_worker, caplog):
    pgbouncer = start_pgbouncer(pool_mode="session", default_pool_size=20)
    engine = sa.create_engine(pgbouncer.url(url.database))
    worker = make_worker(engine, poll_interval=LONG)
    ran = Ran(worker)
    worker.start()
    for _ in range(5):
        ran.add_and_wait(engine)

    assert warnings(caplog) == []
    worker.stop()
    engine.dispose()


def test_a_listener_that_is_killed_past_it_listens_again(pooled, engine, url, make_worker):
    worker = make_worker(pooled, poll_interval=LONG, listen_url=url)
    ran = Ran(worker)
    worker.start()
    ran.add_and_wait(pooled)

    def kill() -> list[bool]:
        with engine.begin() as connection:
            sessions = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE datname = current_database() AND query LIKE '%LISTEN \"{CHANNEL}\"'"
            )
            return connection.scalars(sa.text(sessions)).all()

    until(kill)
    for _ in range(3):
        ran.add_and_wait(pooled)


def test_an_asyncio_session_adds_through_it_and_its_notification_arrives(pgbouncer, pooled, url, make_worker):
    worker = make_worker(pooled, poll_interval=LONG, listen_url=url)
    ran = threading.Semaphore(0)
    worker.use("t", lambda task: ran.release())
    worker.start()

    async def main() -> None:
        engine = create_async_engine(pgbouncer.url(url.database), connect_args=UNPREPARED)
        for _ in range(10):
            async with AsyncSession(engine) as session, session.begin():
                await Queue().add(session, "t")
            assert await asyncio.to_thread(ran.acquire, timeout=SOON)
        await engine.dispose()

    asyncio.run(main())


def test_the_doctor_and_its_colleagues_work_there_and_notice_it(pooled):
    told = []
    for command in ("stats", "list", "doctor"):
        url = pooled.url.render_as_string(hide_password=False)
        told.append(CliRunner().invoke(main, [command, "--json", "--database-url", url]))
    findings = {finding["subject"]: finding for finding in json.loads(told[-1].stdout)}

    assert [done.exit_code for done in told] == [0, 0, 0]
    assert (findings["pooler"]["level"], findings["notifications"]["level"]) == ("warning", "warning")
    assert "prepare_threshold" in findings["pooler"]["cure"]
    assert "listen_url" in findings["notifications"]["cure"]
