"""Sessions that read from a replica and write to the primary: all that apoq does goes to the primary."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import probe
import pytest
import sqlalchemy as sa
from flask import Flask
from pyramid.config import Configurator
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import UpdateBase
from waiting import patience

from apoq import Queue, Task
from apoq.flask import Apoq
from apoq.pyramid import make_worker as make_pyramid_worker
from apoq.testing import assert_enqueued, drain, enqueued, freeze

SOON = 10.0
LONG = timedelta(hours=1)
"""A poll interval in which nothing is found by looking."""

until = patience(SOON)

WRITES: dict[str, Callable[[Session, Any], bool]] = {
    "as in SQLAlchemy's documentation": lambda session, clause: (
        session._flushing or isinstance(clause, sa.Update | sa.Delete)
    ),
    "in a flush": lambda session, clause: session._flushing,
    "by the statement": lambda session, clause: clause is None or isinstance(clause, UpdateBase),
    "by the statement, or in a flush": lambda session, clause: (
        session._flushing or isinstance(clause, UpdateBase)
    ),
    "all but a query": lambda session, clause: not isinstance(clause, sa.Select),
}
"""When a session writes."""


DOCUMENTED = pytest.mark.parametrize(
    "routing", [next(iter(WRITES.values()))], ids=["documented"], indirect=True
)


def made(is_writing: Callable[[Session, Any], bool], primary: sa.Engine, replica: sa.Engine) -> type[Session]:
    class Routing(Session):
        def get_bind(self, mapper: Any = None, clause: Any = None) -> sa.Engine:
            return primary if is_writing(self, clause) else replica

    return Routing


@pytest.fixture
def replica(shared_engine) -> Iterator[sa.Engine]:
    """An engine to another database, which can't be written to."""
    options = "-c default_transaction_read_only=on"
    engine = sa.create_engine(shared_engine.url, connect_args={"options": options})
    yield engine
    engine.dispose()


@pytest.fixture(params=WRITES.values(), ids=WRITES)
def routing(request, engine, replica) -> type[Session]:
    """A class of sessions that write to the one engine, and read from the other."""
    return made(request.param, engine, replica)


@pytest.fixture(params=[False, True], ids=["unheard", "heard"])
def session(request, routing) -> Iterator[Session]:
    with routing() as session:
        if request.param:
            sa.event.listen(session, "do_orm_execute", lambda state: None)
        yield session


def states(engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(Task.__table__.c.state).order_by(Task.__table__.c.id)))


def test_tasks_are_added_cancelled_and_tried_again_in_the_primary(engine, queue, session):
    first = queue.add(session, "t")
    queue.add_many(session, "t", [{}] * 3_000)
    assert queue.cancel(session, first)
    session.commit()
    assert states(engine).count("pending") == 3_000

    assert queue.retry(session, first)
    session.commit()
    assert states(engine).count("pending") == 3_001
    assert not session._flushing


@DOCUMENTED
def test_what_else_the_session_does_goes_where_it_went_before(replica, queue, session):
    queue.add(session, "t")

    assert session.scalar(sa.select(sa.func.current_database())) == replica.url.database


@DOCUMENTED
def test_what_it_adds_starts_at_once(queue, session, make_worker):
    ran = threading.Semaphore(0)
    worker = make_worker(poll_interval=LONG)
    worker.use("t", lambda task: ran.release())
    worker.start()
    until(lambda: probe.is_scanner_asleep(worker))

    for _ in range(2):
        queue.add(session, "t")
        session.commit()
        assert ran.acquire(timeout=SOON)


@DOCUMENTED
def test_what_it_cancels_stops_at_once(engine, queue, routing, make_worker):
    started, stopped = threading.Event(), threading.Event()

    def process(task) -> None:
        started.set()
        with suppress(AssertionError):
            until(lambda: task.should_stop)
            stopped.set()

    worker = make_worker(poll_interval=LONG, lease=timedelta(minutes=5))
    worker.use("t", process)
    worker.start()
    with Session(engine) as session, session.begin():
        task_id = queue.add(session, "t").id
    assert started.wait(SOON)

    with routing() as session, session.begin():
        assert queue.cancel(session, task_id)

    assert stopped.wait(SOON)


def test_the_test_helpers_look_and_work_in_the_primary(engine, session):
    queue, ran = Queue(), []

    @queue.task
    def note(number: int) -> None:
        ran.append(number)

    with freeze(session, datetime(2030, 1, 1, tzinfo=UTC)):
        task = note.add(session, 7)
        assert task.created_at.year == 2030
        assert assert_enqueued(session, note, number=7).id == task.id
        assert len(enqueued(session)) == 1
        drain(session, queue)

    assert ran == [7]
    session.rollback()
    assert states(engine) == []


@pytest.mark.parametrize("is_writing", WRITES.values(), ids=WRITES)
def test_an_asyncio_session_does_the_same(url, replica, engine, queue, make_worker, is_writing):
    ran = threading.Event()
    worker = make_worker(poll_interval=LONG)
    worker.use("t", lambda task: ran.set())
    worker.start()
    until(lambda: probe.is_scanner_asleep(worker))

    async def main() -> None:
        primary, other = create_async_engine(url), create_async_engine(replica.url)
        routing = made(is_writing, primary.sync_engine, other.sync_engine)
        async with AsyncSession(sync_session_class=routing) as session:
            task = await queue.add(session, "elsewhere")
            assert await enqueued(session)
            assert await queue.cancel(session, task)
            await queue.add(session, "t")
            await session.commit()
        await primary.dispose()
        await other.dispose()

    asyncio.run(main())

    assert ran.wait(SOON)
    assert "cancelled" in states(engine)


@DOCUMENTED
def test_flask_works_on_the_primary(engine, queue, routing):
    app = Flask("shop")
    apoq = Apoq(app, session=routing)

    with app.app_context():
        assert probe.engine(apoq.worker) is engine


@DOCUMENTED
def test_pyramid_works_on_the_primary(engine, routing):
    with Configurator() as config:
        config.add_request_method(lambda request: routing(), "dbsession", reify=True)
        config.include("apoq.pyramid")

    assert probe.engine(make_pyramid_worker(config.registry)) is engine
