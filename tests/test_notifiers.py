"""How many threads and connections notify the workers, and when they end."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from datetime import timedelta

import probe
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq.client.notifier import IDLE_SECONDS, MAX_NOTIFIERS

SOON = 10.0

until = patience(SOON)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "apoq-notifications"]


@pytest.fixture(autouse=True)
def none_is_left():
    """Begin when those of other tests have ended."""
    gc.collect()
    patience(2 * IDLE_SECONDS)(lambda: not threads())


@pytest.fixture
def connections(url):
    """Count the connections to the test's database."""
    others = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    engine = sa.create_engine(url, poolclass=sa.NullPool)

    def count() -> int:
        with engine.connect() as connection:
            return connection.scalar(others)

    return count


def add_by_session(engine, queue) -> None:
    with Session(engine) as session, session.begin():
        queue.add(session, "t")


def add_by_connection(engine, queue) -> None:
    with engine.begin() as connection:
        queue.add(connection, "t")


@pytest.mark.parametrize("add", [add_by_session, add_by_connection])
def test_engines_that_share_a_pool_share_a_thread_and_a_connection(url, queue, connections, add):
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    for number in range(30):
        add(engine.execution_options(number=number), queue)
    with engine.connect() as connection, connection.execution_options(number=30).begin():
        queue.add(connection, "t")

    assert (len(threads()), len([pool for pool in probe.notifiers() if pool is engine.pool])) == (1, 1)
    until(lambda: connections() == 1)


def test_a_burst_of_commits_is_notified_on_one_connection(engine, queue):
    """Each second one took another connection from the pool and prepared its statement there."""
    taken: list[object] = []
    add_by_session(engine, queue)
    line = probe.line(engine)
    until(lambda: probe.line_connection(line) is not None)
    sa.event.listen(probe.line_engine(line), "checkout", lambda *_: taken.append(None))
    for _ in range(200):
        add_by_session(engine, queue)
    until(lambda: not probe.pending(engine))

    assert len(taken) < 10  # if the server was late with a response


async def async_session(engine, queue) -> None:
    async with AsyncSession(engine) as session, session.begin():
        await queue.add(session, "t")


async def async_connection(engine, queue) -> None:
    connection: AsyncConnection
    async with engine.begin() as connection:
        await queue.add(connection, "t")


@pytest.mark.parametrize("add", [async_session, async_connection])
def test_asyncio_engines_that_share_a_pool_share_a_thread_and_a_connection(url, queue, connections, add):
    async def main() -> None:
        engine = create_async_engine(url, poolclass=sa.NullPool)
        await asyncio.gather(
            *(add(engine.execution_options(number=number), queue) for number in range(10)), add(engine, queue)
        )
        assert len(threads()) == 1
        until(lambda: connections() == 1)

    asyncio.run(main())


def test_many_pools_have_a_few_threads_and_connections_and_all_notifications_arrive(
    url, queue, make_worker, connections
):
    ran = threading.Semaphore(0)
    worker = make_worker(poll_interval=timedelta(hours=1))
    worker.use("t", lambda task: ran.release())
    worker.start()
    until(lambda: probe.is_scanner_asleep(worker))
    before = connections()
    engines = [sa.create_engine(url, poolclass=sa.NullPool) for _ in range(4 * MAX_NOTIFIERS)]

    for _ in range(3):
        for engine in engines:
            add_by_session(engine, queue)
            assert len(threads()) <= MAX_NOTIFIERS + 1
        for _ in engines:
            assert ran.acquire(timeout=SOON)
        # Before idle ones would be closed anyway; the server takes a moment to end a session.
        until(lambda: connections() <= before + MAX_NOTIFIERS + 1, timeout=IDLE_SECONDS / 2)


@pytest.mark.parametrize("add", [add_by_session, add_by_connection])
@pytest.mark.parametrize("derive", [lambda engine: engine, lambda engine: engine.execution_options(n=1)])
def test_they_end_when_the_engine_is_freed(url, queue, connections, add, derive):
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    add(derive(engine), queue)
    until(lambda: connections() == 1)
    freed = weakref.ref(engine)

    began = time.monotonic()
    del engine

    until(lambda: gc.collect() >= 0 and freed() is None)  # when the notification has been sent
    until(lambda: connections() == 0 and not threads())
    assert time.monotonic() - began < IDLE_SECONDS * 0.9


def test_an_asyncio_engine_is_freed_too(url, queue, connections):
    async def main() -> weakref.ref:
        engine = create_async_engine(url)
        await async_session(engine, queue)
        await async_connection(engine, queue)
        await engine.dispose()
        return weakref.ref(engine.sync_engine)

    freed = asyncio.run(main())

    until(lambda: gc.collect() >= 0 and freed() is None)  # when the notifications have been sent
    until(lambda: connections() == 0 and not threads())


def test_they_end_when_the_engine_is_disposed_of(url, queue, connections):
    """So that its database can be dropped, as at the end of a test."""
    engine = sa.create_engine(url)
    add_by_session(engine, queue)

    began = time.monotonic()
    engine.dispose()

    until(lambda: connections() == 0 and not threads())
    assert time.monotonic() - began < IDLE_SECONDS * 0.9


def test_a_notification_is_sent_although_its_engine_is_freed_at_once(url, queue, make_worker):
    ran = threading.Event()
    worker = make_worker(poll_interval=timedelta(hours=1))
    worker.use("t", lambda task: ran.set())
    worker.start()
    until(lambda: probe.is_scanner_asleep(worker))

    add_by_session(sa.create_engine(url, poolclass=sa.NullPool), queue)
    gc.collect()

    assert ran.wait(SOON)
