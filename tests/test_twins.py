"""Engines of the other kind connect as the caller's engine does."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from proxy import Proxy
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Task, UnsupportedDatabase, Worker, prepare
from apoq.postgres.connections import own_engine
from apoq.postgres.engine_twins import async_twin, sync_twin

SOON = 30.0

until = patience(SOON)

Ask = Callable[[str], Any]


def ask_own(engine: AsyncEngine, question: str) -> Any:
    own = own_engine(engine.sync_engine)
    try:
        with own.connect() as connection:
            return connection.exec_driver_sql(question).scalar()
    finally:
        own.dispose()


def ask_sync(engine: AsyncEngine, question: str) -> Any:
    twin = sync_twin(engine)
    try:
        with twin.connect() as connection:
            return connection.exec_driver_sql(question).scalar()
    finally:
        twin.dispose()


def ask_async(engine: sa.Engine | AsyncEngine, question: str) -> Any:
    async def main() -> Any:
        twin = async_twin(engine)
        try:
            async with twin.connect() as connection:
                return (await connection.exec_driver_sql(question)).scalar()
        finally:
            await twin.dispose()

    return asyncio.run(main())


CASES = {
    "own engine of an asyncio one": (create_async_engine, ask_own),
    "sync twin": (create_async_engine, ask_sync),
    "asyncio twin of a sync engine": (sa.create_engine, ask_async),
    "asyncio twin of an asyncio engine": (create_async_engine, ask_async),
}
every_kind = pytest.mark.parametrize(("create", "ask"), CASES.values(), ids=CASES)
twins = pytest.mark.parametrize(("create", "ask"), list(CASES.values())[1:], ids=list(CASES)[1:])
crossing = pytest.mark.parametrize(("create", "ask"), list(CASES.values())[:3], ids=list(CASES)[:3])


def sync_side(engine: sa.Engine | AsyncEngine) -> sa.Engine:
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


@every_kind
def test_they_connect_with_the_same_arguments(url, create, ask):
    engine = create(url, connect_args={"options": "-c search_path=shop", "application_name": "mine"})

    assert ask(engine, "SHOW search_path") == "shop"
    assert ask(engine, "SHOW application_name") == "mine"


@every_kind
def test_one_that_must_be_encrypted_is_not_made_in_plain_text(server, url, create, ask):
    with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
        if connection.exec_driver_sql("SHOW ssl").scalar() == "on":
            pytest.skip("this server speaks TLS")
    proxy = Proxy(url)  # over TCP, for a Unix socket needs no TLS
    engine = create(proxy.url, connect_args={"sslmode": "require"})

    with pytest.raises((sa.exc.OperationalError, psycopg.OperationalError), match="SSL"):
        ask(engine, "SELECT 1")
    proxy.close()


@every_kind
def test_a_listener_gives_each_its_arguments(url, create, ask):
    """As where a token is fetched for each connection; whenever it begins to listen."""
    engine = create(url)

    @sa.event.listens_for(sync_side(engine), "do_connect")
    def give(_dialect, _record, _arguments, options) -> None:
        options["application_name"] = "listener's"

    assert ask(engine, "SHOW application_name") == "listener's"


@every_kind
def test_a_listener_makes_the_connection_by_the_dialect_that_it_is_given(url, create, ask):
    engine = create(url)

    @sa.event.listens_for(sync_side(engine), "do_connect")
    def make(dialect, _record, arguments, options):
        return dialect.connect(*arguments, **{**options, "application_name": "listener's"})

    assert ask(engine, "SHOW application_name") == "listener's"


@every_kind
def test_what_a_listener_sets_on_each_connection_is_set(url, create, ask):
    engine = create(url)

    @sa.event.listens_for(sync_side(engine), "connect", named=True)
    def set_path(dbapi_connection, **_) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute("SET search_path = shop")
        cursor.close()
        dbapi_connection.commit()

    assert ask(engine, "SHOW search_path") == "shop"


@twins
def test_a_class_wide_listener_is_called_once(url, create, ask):
    calls = []

    def count(connection, record) -> None:
        calls.append(connection)

    engine = create(url, connect_args={"application_name": "mine"})
    sa.event.listen(sa.pool.Pool, "connect", count)
    try:
        assert ask(engine, "SELECT 1") == 1
    finally:
        sa.event.remove(sa.pool.Pool, "connect", count)
    assert len({id(connection) for connection in calls}) == len(calls)


@twins
def test_they_are_at_the_same_isolation_level(url, create, ask):
    engine = create(url, isolation_level="REPEATABLE READ")

    assert ask(engine, "SHOW transaction_isolation") == "repeatable read"


# SQLAlchemy 2.0 leaves a connection open whose listener fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@crossing
def test_a_listener_that_works_for_one_kind_only_is_named(url, create, ask):
    engine = create(url)

    @sa.event.listens_for(sync_side(engine), "connect")
    def picky(connection, _record) -> None:
        if isinstance(engine, AsyncEngine):
            connection.run_async(lambda _: asyncio.sleep(0))
        else:
            connection.run_sync()

    with pytest.raises(UnsupportedDatabase, match=r"listener .*picky .*must work for"):
        ask(engine, "SELECT 1")


# SQLAlchemy makes the coroutine before it finds that it can't be awaited here.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@crossing
def test_a_listener_that_makes_connections_of_one_kind_only_is_named(url, create, ask):
    engine = create(url)
    made = []

    @sa.event.listens_for(sync_side(engine), "do_connect")
    def picky(_dialect, _record, arguments, options):
        if isinstance(engine, AsyncEngine):
            return engine.dialect.connect(*arguments, **options)
        made.append(psycopg.connect(*arguments, **options))
        return made[0]

    with pytest.raises(UnsupportedDatabase, match=r"listener .*picky .*must work for"):
        ask(engine, "SELECT 1")
    for connection in made:
        connection.close()


def psycopg_dsn(url: sa.URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
def created(url) -> Iterator[AsyncEngine]:
    """An engine whose connections a coroutine makes."""
    return create_async_engine(
        url,
        poolclass=sa.NullPool,
        async_creator=lambda: psycopg.AsyncConnection.connect(psycopg_dsn(url), application_name="created"),
    )


def test_where_only_a_coroutine_makes_connections_a_worker_says_so_when_it_starts(created, queue):
    worker = Worker(created, queue)

    with pytest.raises(UnsupportedDatabase, match=r"async_creator.*connect_args.*pass an Engine to Worker"):
        worker.start()
    with pytest.raises(UnsupportedDatabase):
        worker.work()


def test_where_only_a_coroutine_makes_connections_tasks_are_added_without_notifications(
    created, engine, queue, caplog
):
    async def main() -> None:
        async with AsyncSession(created) as session, session.begin():
            await queue.add(session, "t")

    with caplog.at_level(logging.WARNING, "apoq"):
        asyncio.run(main())

    with Session(engine) as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Task)) == 1
    assert caplog.messages == []


def test_an_asyncio_twin_of_such_an_engine_is_made_by_the_same_coroutine(created):
    assert ask_async(created, "SHOW application_name") == "created"


def test_where_only_a_function_makes_connections_task_session_of_a_coroutine_says_so(url, queue):
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(psycopg_dsn(url)))
    failed = []
    worker = Worker(engine, queue)
    worker.events.on("task.failed", lambda task, error: failed.append(error))

    async def process(task) -> None:
        await task.session.execute(sa.text("SELECT 1"))

    worker.use("t", process, retry_limit=0)
    with Session(engine) as session, session.begin():
        queue.add(session, "t")
    worker.work()

    (error,) = failed
    assert isinstance(error, UnsupportedDatabase)
    assert "pass an AsyncEngine to Worker" in str(error)
    engine.dispose()


@pytest.mark.parametrize("create", [sa.create_engine, create_async_engine])
def test_a_worker_finds_its_tables_by_what_the_engine_is_told(empty_url, queue, create):
    """Its own statements, and those of both kinds of task.session."""
    plain = sa.create_engine(empty_url, poolclass=sa.NullPool)
    with plain.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA shop")
    told = {"connect_args": {"options": "-c search_path=shop"}}
    with_path = sa.create_engine(empty_url, poolclass=sa.NullPool, **told)
    prepare(with_path)
    with Session(with_path) as session, session.begin():
        queue.add_many(session, "plain", [1])
        queue.add_many(session, "coroutine", [1])
    ran = threading.Semaphore(0)
    paths = []
    path = sa.text("SHOW search_path")

    def work_plainly(task) -> None:
        paths.append(task.session.scalar(path))
        ran.release()

    async def work(task) -> None:
        paths.append(await task.session.scalar(path))
        ran.release()

    engine = create(empty_url, **told)
    worker = Worker(engine, queue)
    worker.use("plain", work_plainly)
    worker.use("coroutine", work)
    worker.start()
    try:
        assert ran.acquire(timeout=SOON)
        assert ran.acquire(timeout=SOON)
    finally:
        worker.stop(timeout=5)
        sync_side(engine).dispose()

    assert paths == ["shop", "shop"]
    with with_path.connect() as connection:
        states = connection.scalars(sa.text("SELECT state FROM shop.apoq_tasks")).all()
    assert states == ["completed", "completed"]
