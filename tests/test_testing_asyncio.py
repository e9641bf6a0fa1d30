"""apoq.testing in an asyncio test, on its own event loop and session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from apoq import Task, UnsupportedSession, Worker
from apoq.testing import assert_enqueued, drain, enqueued, freeze, travel

LEDGER = sa.table("ledger", sa.column("task_id"))
HOUR = timedelta(hours=1)


@pytest.fixture(params=["engine", "connection"])
def with_session(request, shared_engine) -> Callable[[Callable[[AsyncSession], Coroutine]], None]:
    """Run a test's coroutine with a session that is rolled back."""

    @asynccontextmanager
    async def session() -> AsyncIterator[AsyncSession]:
        engine = create_async_engine(shared_engine.url, poolclass=NullPool)
        async with engine.connect() as connection:
            bind = engine if request.param == "engine" else connection
            if bind is connection:
                await connection.begin()
            options = {"join_transaction_mode": "create_savepoint", "expire_on_commit": False}
            async with AsyncSession(bind, **options) as opened:
                yield opened

    async def run(test: Callable[[AsyncSession], Coroutine]) -> None:
        async with session() as opened:
            await test(opened)

    return lambda test: asyncio.run(run(test))


@pytest.fixture
def worker(shared_engine) -> Worker:
    return Worker(shared_engine)


def test_what_was_added_is_found(with_session, queue):
    async def test(session):
        task = await queue.add(session, "greet", {"user_id": 7})

        assert await enqueued(session, "greet", user_id=7) == [task]
        assert await assert_enqueued(session, "greet", user_id=7) is task

    with_session(test)


def test_a_coroutine_runs_on_the_test_s_own_loop(with_session, queue, worker):
    loops = []

    async def greet(task):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        await task.session.execute(sa.insert(LEDGER).values(task_id=task.id))
        await (await task.session.connection()).execute(sa.select(1))
        await queue.add(task.session, "leave")

    async def leave(task):
        pass

    worker.use("greet", greet)
    worker.use("leave", leave)

    async def test(session):
        task = await queue.add(session, "greet")

        ran = await drain(session, worker)

        assert [(ran.type, ran.state) for ran in ran] == [("greet", "completed"), ("leave", "completed")]
        assert task.state == "completed"
        assert loops == [asyncio.get_running_loop()]
        assert (await session.scalars(sa.select(LEDGER.c.task_id))).all() == [task.id]

    with_session(test)


def test_a_plain_function_runs_there_too(with_session, queue, worker):
    def greet(task):
        task.session.execute(sa.insert(LEDGER).values(task_id=task.id))
        queue.add(task.session, "leave", delay=HOUR)

    worker.use("greet", greet)

    async def test(session):
        await queue.add(session, "greet")

        (ran,) = await drain(session, worker)

        assert ran.state == "completed"
        assert await enqueued(session, "leave")

    with_session(test)


def test_a_coroutine_that_fails_raises_and_is_undone(with_session, queue, worker):
    async def greet(task):
        await task.session.execute(sa.insert(LEDGER).values(task_id=task.id))
        await task.session.execute(sa.text("SELECT 1 / 0"))

    worker.use("greet", greet)

    async def test(session):
        await queue.add(session, "greet")

        with pytest.raises(sa.exc.DataError):
            await drain(session, worker)

        task = (await session.scalars(sa.select(Task).execution_options(populate_existing=True))).one()
        assert (task.state, task.fail_count) == ("pending", 1)
        assert not (await session.scalars(sa.select(LEDGER.c.task_id))).all()

    with_session(test)


def test_a_timeout_cancels_a_coroutine(with_session, queue, worker):
    async def greet(task):
        await asyncio.Event().wait()

    worker.use("greet", greet, timeout=0.01)

    async def test(session):
        await queue.add(session, "greet")

        (task,) = await drain(session, worker, errors="record")

        assert task.error["class"] == "TimeoutError"

    with_session(test)


def test_a_test_that_is_cancelled_ends(with_session, queue, worker):
    begun = asyncio.Event()

    async def greet(task):
        begun.set()
        await asyncio.Event().wait()

    worker.use("greet", greet)

    async def test(session):
        await queue.add(session, "greet")
        draining = asyncio.create_task(drain(session, worker, errors="record"))
        await begun.wait()

        draining.cancel()

        with pytest.raises(asyncio.CancelledError):
            await draining

    with_session(test)


def test_its_clock_is_set_by_async_with(with_session, queue, worker):
    at = datetime(2026, 1, 1, 9, tzinfo=UTC)

    async def greet(task):
        pass

    worker.use("greet", greet)

    async def test(session):
        async with freeze(session, at):
            task = await queue.add(session, "greet", delay=HOUR)
            mapped = Task(type="greet")
            session.add(mapped)
            assert [ran.id for ran in await drain(session, worker)] == [mapped.id]
            async with travel(session, HOUR):
                assert [ran.id for ran in await drain(session, worker)] == [task.id]
        assert (task.process_at, task.completed_at) == (at + HOUR, at + HOUR)
        assert mapped.created_at == at

    with_session(test)


def test_connections_and_scoped_sessions_are_drained(shared_engine, queue, worker):
    async def greet(task):
        pass

    worker.use("greet", greet)

    async def test():
        engine = create_async_engine(shared_engine.url, poolclass=NullPool)
        async with engine.connect() as connection:
            await queue.add(connection, "greet")
            assert len(await drain(connection, worker)) == 1
        scoped = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
        await queue.add(scoped, "greet")
        assert len(await drain(scoped, worker)) == 1
        await scoped.remove()

    asyncio.run(test())


def test_a_plain_with_says_what_to_write(with_session):
    async def test(session):
        with pytest.raises(TypeError, match="async with"), freeze(session, datetime(2026, 1, 1, tzinfo=UTC)):
            pass

    with_session(test)


def test_the_synchronous_side_of_an_asyncio_session_is_refused(with_session, worker):
    async def test(session):
        await session.connection()
        with pytest.raises(UnsupportedSession, match="must be the AsyncSession"):
            drain(session.sync_session, worker)

    with_session(test)


def test_an_async_with_of_a_plain_session_says_what_to_write(session):
    async def test():
        async with travel(session, HOUR):
            pass

    with pytest.raises(TypeError, match="plain `with`"):
        asyncio.run(test())
