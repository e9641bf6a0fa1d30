"""apoq.testing in the usual test set-ups of FastAPI: TestClient, and AsyncClient with asyncio's sessions."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Annotated

import httpx
import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool

from apoq import AsyncRunningTask, Queue, Task, Worker
from apoq.fastapi import transaction
from apoq.testing import assert_enqueued, drain, enqueued, rolled_back

queue = Queue()


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "fastapi_users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    is_welcome: Mapped[bool] = mapped_column(default=False)


new_session = sessionmaker()
in_transaction = transaction(new_session)
new_async_session = async_sessionmaker(expire_on_commit=False)


def get_session() -> Iterator[Session]:
    with new_session() as session:
        yield session


async def get_async_session() -> AsyncIterator[AsyncSession]:
    async with new_async_session() as session:
        yield session


app = FastAPI()


@app.post("/sign-up")
def sign_up(session: Annotated[Session, Depends(get_session)], email: str, fail: bool = False) -> int:
    user = User(email=email)
    session.add(user)
    session.flush()
    queue.add(session, "send_welcome", {"user_id": user.id})
    if fail:
        raise HTTPException(500)
    session.commit()
    return user.id


@app.post("/async/sign-up")
async def async_sign_up(
    session: Annotated[AsyncSession, Depends(get_async_session)],
    email: str,
    fail: bool = False,
) -> int:
    user = User(email=email)
    session.add(user)
    await session.flush()
    await queue.add(session, "send_welcome", {"user_id": user.id})
    if fail:
        raise HTTPException(500)
    await session.commit()
    return user.id


async def send_welcome(task: AsyncRunningTask) -> None:
    user = await task.session.get(User, task.data["user_id"])
    await asyncio.sleep(0)
    user.is_welcome = True


@pytest.fixture(scope="module")
def tables(shared_engine) -> Iterator[None]:
    Base.metadata.create_all(shared_engine)
    yield
    Base.metadata.drop_all(shared_engine)


@pytest.fixture
def worker(shared_engine) -> Worker:
    worker = Worker(shared_engine)
    worker.use("send_welcome", send_welcome)
    return worker


@pytest.fixture
def session(shared_engine, tables) -> Iterator[Session]:
    with rolled_back(shared_engine) as session:

        def own_session() -> Iterator[Session]:
            # Each request has a session of its own, in the transaction of the test.
            with Session(session.connection(), join_transaction_mode="create_savepoint") as own:
                yield own

        app.dependency_overrides[get_session] = own_session
        yield session
        app.dependency_overrides.clear()


@pytest.fixture
def client(session):
    with warnings.catch_warnings(action="ignore"):  # it would rather have httpx2 than httpx
        from fastapi.testclient import TestClient
    return TestClient(app)


def test_a_request_has_added_the_task(client, session):
    user_id = client.post("/sign-up", params={"email": "ann@example.com"}).json()

    assert_enqueued(session, "send_welcome", user_id=user_id)


def test_a_request_that_raises_has_added_none(client, session):
    client.post("/sign-up", params={"email": "ann@example.com", "fail": "1"})

    assert not enqueued(session)


def test_the_task_of_a_request_runs(client, session, worker):
    user_id = client.post("/sign-up", params={"email": "ann@example.com"}).json()

    (task,) = drain(session, worker)

    assert task.state == "completed"
    assert session.get(User, user_id).is_welcome


@pytest.fixture
def on_loop(shared_engine, tables):
    """Run a test's coroutine with an AsyncClient, and with a connection for the application's sessions."""

    async def run(test) -> None:
        engine = create_async_engine(shared_engine.url, poolclass=NullPool)
        async with rolled_back(engine) as session:
            connection = await session.connection()
            new_async_session.configure(bind=connection, join_transaction_mode="create_savepoint")
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await test(client, session)

    return lambda test: asyncio.run(run(test))


def test_an_asyncio_request_has_added_the_task(on_loop):
    async def test(client, session):
        response = await client.post("/async/sign-up", params={"email": "ann@example.com"})

        await assert_enqueued(session, "send_welcome", user_id=response.json())

    on_loop(test)


def test_an_asyncio_request_that_raises_has_added_none(on_loop):
    async def test(client, session):
        await client.post("/async/sign-up", params={"email": "ann@example.com", "fail": "1"})

        assert not await enqueued(session)

    on_loop(test)


def test_the_task_of_an_asyncio_request_runs_on_the_test_s_loop(on_loop, worker):
    async def test(client, session):
        response = await client.post("/async/sign-up", params={"email": "ann@example.com"})

        (task,) = await drain(session, worker)

        assert task.state == "completed"
        assert (await session.get(User, response.json())).is_welcome

    on_loop(test)


@pytest.mark.parametrize("fail", [False, True])
def test_the_dependency_of_apoq_is_overridden_by_another(shared_engine, tables, fail):
    app = FastAPI()

    @app.post("/sign-up")
    def sign_up(session: Annotated[Session, in_transaction]) -> None:
        queue.add(session, "send_welcome")
        if fail:
            raise HTTPException(500)

    with rolled_back(shared_engine) as session, warnings.catch_warnings(action="ignore"):
        from fastapi.testclient import TestClient

        sessions = sessionmaker(session.connection(), join_transaction_mode="create_savepoint")
        app.dependency_overrides[in_transaction.dependency] = transaction(sessions).dependency
        assert TestClient(app).post("/sign-up").status_code == (500 if fail else 200)

        assert len(enqueued(session)) == (0 if fail else 1)

    with Session(shared_engine) as other:
        assert not other.scalars(sa.select(Task)).all()


def test_nothing_is_committed(on_loop, worker, shared_engine):
    async def test(client, session):
        await client.post("/async/sign-up", params={"email": "ann@example.com"})
        await drain(session, worker)

    on_loop(test)

    with Session(shared_engine) as other:
        assert not other.scalars(sa.select(User)).all()
        assert not other.scalars(sa.select(Task)).all()
