"""A database, or a role, may set how times, intervals and arrays are written: nothing depends on it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from apoq import Queue, Worker
from apoq.cli import main

STYLES = {
    "German": "SET DateStyle = 'German'; SET IntervalStyle = 'sql_standard'",
    "SQL": "SET DateStyle = 'SQL, DMY'; SET IntervalStyle = 'iso_8601'",
    "Postgres": "SET DateStyle = 'Postgres'; SET IntervalStyle = 'postgres_verbose'",
    "others": "SET array_nulls = off; SET standard_conforming_strings = off; SET bytea_output = 'escape'; "
    "SET extra_float_digits = -15; SET quote_all_identifiers = on; SET timezone = 'Asia/Kathmandu'; "
    "SET row_security = off; SET default_transaction_isolation = 'serializable'; "
    "SET default_transaction_deferrable = on; SET lock_timeout = '10s'; SET client_encoding = 'LATIN1'",
}
LONG = timedelta(days=400, hours=5, microseconds=7)
FAR = datetime(2999, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
OPTIONS = {"retry_delay": LONG, "timeout": LONG}


@pytest.fixture(scope="module")
def module_url(template, create_database, drop_database) -> Iterator[sa.URL]:
    url = create_database(template.database)
    yield url
    drop_database(url)


@pytest.fixture(params=STYLES)
def url(request, module_url) -> sa.URL:
    """A database, emptied, of which every session begins with these settings."""
    with sa.create_engine(
        module_url, isolation_level="AUTOCOMMIT", poolclass=NullPool
    ).connect() as connection:
        database = f"ALTER DATABASE {module_url.database}"
        connection.exec_driver_sql(f"{database} RESET ALL")
        for setting in STYLES[request.param].split("; "):
            connection.exec_driver_sql(f"{database} {setting}")
        connection.exec_driver_sql("TRUNCATE apoq_tasks, apoq_workers, apoq_claims RESTART IDENTITY")
        connection.exec_driver_sql(
            "INSERT INTO apoq_workers (id, host, pid, version, queues, concurrency, expires_at, grace) "
            "VALUES (gen_random_uuid(), 'h', 1, '1', '{default}', 1, now(), '1 day')"
        )
    return module_url


@pytest.fixture
def engine(url) -> Iterator[sa.Engine]:
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()


def plain(url: sa.URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


SYNC: dict[str, Callable[[sa.URL], object]] = {
    "Session": lambda url: Session(sa.create_engine(url, poolclass=NullPool)),
    "Connection": lambda url: sa.create_engine(url, poolclass=NullPool).connect(),
    "psycopg": lambda url: psycopg.connect(plain(url)),
}


@pytest.mark.parametrize("open_", SYNC.values(), ids=SYNC)
def test_a_task_is_added_cancelled_and_retried(url, queue, open_):
    with open_(url) as session:
        task = queue.add(session, "t", process_at=FAR, **OPTIONS)
        assert task.process_at == FAR
        many = queue.add_many(session, "t", range(1_100), process_at=FAR, **OPTIONS)  # the last by COPY
        changed = queue.cancel(session, task.id), queue.retry(session, task.id, delay=timedelta(hours=1))

        assert (many, changed) == (1_100, (True, True))
        assert task.retry_delay == LONG
        assert abs(task.created_at - datetime.now(UTC)) < timedelta(minutes=1)


ASYNC = {
    "AsyncSession": lambda engine, url: AsyncSession(engine),
    "AsyncConnection": lambda engine, url: AsyncConnection(engine),
    "psycopg": lambda engine, url: psycopg.AsyncConnection.connect(plain(url)),
}


@pytest.mark.parametrize("open_", ASYNC.values(), ids=ASYNC)
def test_a_task_is_added_cancelled_and_retried_with_asyncio(url, queue, open_):
    async def run() -> None:
        engine = create_async_engine(url, poolclass=NullPool)
        opened = open_(engine, url)
        async with await opened if asyncio.iscoroutine(opened) else opened as session:
            task = await queue.add(session, "t", process_at=FAR, **OPTIONS)
            assert task.process_at == FAR
            many = await queue.add_many(session, "t", range(1_100), **OPTIONS)
            changed = await queue.cancel(session, task.id), await queue.retry(session, task.id)
            assert (many, changed) == (1_100, (True, True))

    asyncio.run(run())


def test_a_task_in_the_session_knows_what_was_written_to_it(engine, queue):
    with Session(engine) as session:
        task = queue.add(session, "t")
        queue.cancel(session, task)
        cancelled_at = task.cancelled_at
        queue.retry(session, task, delay=timedelta(days=1))

        assert cancelled_at - task.created_at < timedelta(minutes=1)
        assert timedelta(hours=23) < task.process_at - task.created_at < timedelta(hours=25)


@pytest.mark.parametrize("keep", [timedelta(days=1), timedelta()], ids=["kept", "deleted"])
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "coroutine"])
def test_a_completion_in_the_tasks_session_is_heard_whole(engine, queue, keep, is_async):
    worker = Worker(engine, queue, keep_completed=keep)
    heard = []
    worker.events.on("task.completed", heard.append)

    def use_session(task) -> None:
        task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

    async def use_async_session(task) -> None:
        await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

    worker.use("t", use_async_session if is_async else use_session)
    with Session(engine) as session, session.begin():
        queue.add(session, "t", **OPTIONS)

    worker.work()

    (task,) = heard
    assert (task.state, task.retry_delay, task.timeout) == ("completed", LONG, LONG)
    assert timedelta() < task.completed_at - task.created_at < timedelta(minutes=1)


def test_a_worker_settles_what_failed(engine, queue):
    worker = Worker(engine, queue)
    worker.use("t", lambda task: 1 / 0, retry_limit=0)
    with Session(engine) as session, session.begin():
        queue.add(session, "t")

    assert worker.work().state == "failed"


COMMANDS = [
    ["add", "t", '"€"', "--delay", "1h", "--retry-delay", "400d", "--timeout", "5"],
    ["list", "--since", "1h"],
    ["show", "1", "--json"],
    ["cancel", "1"],
    ["retry", "1"],
    ["stats", "--types"],
    ["doctor"],
    ["check"],
    ["migrate"],
    ["prune", "--completed-before", "1h", "--failed-before", "1h"],
]


def test_every_command_works(url, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", plain(url))

    for command in COMMANDS:
        done = CliRunner().invoke(main, command)

        assert (command, done.exit_code) == (command, 0), done.output
    found = json.loads(CliRunner().invoke(main, ["list", "--json"]).stdout)
    assert (found["retry_delay"], found["timeout"], found["data"]) == (400 * 86_400, 5, "€")


def test_an_interval_of_years_is_read_as_psycopg_reads_it(engine, queue):
    heard = []
    worker = Worker(engine, Queue())
    worker.events.on("task.completed", heard.append)
    worker.use("t", lambda task: task.session.execute(sa.text("SELECT 1")))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO apoq_tasks (type, retry_delay) "
            "VALUES ('t', '2 years 3 months -4 days 5:06:07.000008')"
        )

    worker.work()

    (task,) = heard
    days = 2 * 365 + 3 * 30 - 4
    assert task.retry_delay == timedelta(days=days, hours=5, minutes=6, seconds=7, microseconds=8)
