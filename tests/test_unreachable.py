"""A task whose session could not connect is tried again, and uses up no attempt."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator

import probe
import pytest
import sqlalchemy as sa
from proxy import Proxy
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, Retry, Task, Worker

SOON = 30.0

until = patience(SOON)

SELECT = sa.text("SELECT 1")
NOBODY = "postgresql+psycopg://nobody@127.0.0.1:1/nowhere"
"""Where nothing listens."""


def add(engine: sa.Engine, count: int = 1, **options) -> None:
    with Session(engine) as session, session.begin():
        Queue().add_many(session, "t", range(count), **options)


def tasks(engine: sa.Engine) -> list[Task]:
    with Session(engine) as session:
        return list(session.scalars(sa.select(Task).order_by(Task.id)))


@pytest.fixture(params=["plain", "coroutine"])
def on_session(request) -> Callable[..., Callable]:
    """Make a processor that does this, and then uses its session: of either kind."""

    def make(before: Callable[[], object], after: Callable[[Exception], None] | None = None) -> Callable:
        def process(task) -> None:
            before()
            try:
                task.session.execute(SELECT)
            except Exception as error:
                if after is None:
                    raise
                after(error)

        async def process_async(task) -> None:
            await asyncio.to_thread(before)
            try:
                await task.session.execute(SELECT)
            except Exception as error:
                if after is None:
                    raise
                after(error)

        return process if request.param == "plain" else process_async

    return make


@pytest.fixture(params=[sa.create_engine, create_async_engine], ids=["Engine", "AsyncEngine"])
def create(request) -> Callable:
    return request.param


class Gate:
    """Whether those who run tasks can connect; apoq's own threads can."""

    def __init__(self, engine: sa.Engine) -> None:
        self.is_open = False
        self.tries = 0
        self._right: dict[str, object] = {}
        sa.event.listen(engine, "do_connect", self._connect)

    def _connect(self, _dialect, _record, _arguments, options) -> None:
        # SQLAlchemy 2.0 gives the next connection what was made of this one's.
        self._right = self._right or dict(options)
        options.clear()
        options.update(self._right)
        if not self.is_open and threading.current_thread().name.startswith(("apoq-slot", "apoq-loop")):
            self.tries += 1
            options.update(host="127.0.0.1", port="1")


@pytest.fixture
def gated(url, create) -> Iterator[tuple[Worker, Gate]]:
    """A worker whose tasks can't connect until its gate is open."""
    engine = create(url)
    sync_engine = getattr(engine, "sync_engine", engine)
    gate = Gate(sync_engine)
    worker = Worker(engine, concurrency=3)
    yield worker, gate
    worker.stop(timeout=5)
    if sync_engine is engine:
        engine.dispose()


def test_it_is_tried_again_until_it_can_and_said_once(engine, gated, on_session, caplog):
    worker, gate = gated
    worker.use("t", on_session(lambda: None), retry_limit=0)
    add(engine, 5)
    with caplog.at_level(logging.WARNING, "apoq"):
        worker.start()
        began = time.monotonic()
        until(lambda: gate.tries >= 15)
        assert time.monotonic() > began + 1.9  # each of the five for the third time: no hot loop
        gate.is_open = True
        until(lambda: all(task.state == "completed" for task in tasks(engine)))

    assert [(task.attempt, task.fail_count, task.error) for task in tasks(engine)] == [(1, 0, None)] * 5
    (message,) = caplog.messages
    assert message.startswith("task.session could not connect: ")
    assert "refused" in message


@pytest.mark.parametrize("wrapped", [True, False])
def test_what_the_processor_makes_of_the_error_is_no_failure_either(engine, gated, on_session, wrapped):
    worker, gate = gated

    def wrap(error: Exception) -> None:
        if wrapped:
            raise RuntimeError("while the order was written") from error
        raise LookupError("no such order")  # while the other was handled

    worker.use("t", on_session(lambda: None, wrap), retry_limit=0)
    add(engine)
    worker.start()
    until(lambda: gate.tries >= 2)
    gate.is_open = True
    until(lambda: tasks(engine)[0].state == "completed")

    assert tasks(engine)[0].fail_count == 0


def test_an_outcome_that_the_processor_chooses_stands(engine, gated, on_session):
    worker, _ = gated

    def choose(error: Exception) -> None:
        raise Retry(delay=60) from error

    worker.use("t", on_session(lambda: None, choose))
    add(engine)
    worker.start()

    until(lambda: tasks(engine)[0].fail_count == 1)


def test_another_database_that_is_away_is_a_failure(engine, make_worker, on_session):
    def connect() -> None:
        other = sa.create_engine(NOBODY, poolclass=sa.NullPool)
        with other.connect():
            pass

    worker = make_worker()
    worker.use("t", on_session(connect), retry_limit=0)
    add(engine)
    worker.start()

    until(lambda: tasks(engine)[0].state == "failed")


def test_a_connection_that_is_lost_is_a_failure(engine, url, create, on_session):
    quiet = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    worker_engine = create(url)
    worker = Worker(worker_engine)

    def lose(task) -> None:
        pid = task.session.scalar(sa.text("SELECT pg_backend_pid()"))
        with quiet.connect() as connection:
            assert connection.scalar(sa.text(f"SELECT pg_terminate_backend({pid}, 5000)"))
        task.session.execute(SELECT)

    worker.use("t", lose, retry_limit=0)
    add(engine)
    worker.start()
    until(lambda: tasks(engine)[0].state == "failed")
    worker.stop(timeout=5)
    if isinstance(worker_engine, sa.Engine):
        worker_engine.dispose()


def test_a_server_that_stops_while_a_task_runs_costs_it_no_attempt(engine, url, create, on_session):
    proxy = Proxy(url)
    worker_engine = create(proxy.url)
    worker = Worker(worker_engine)
    begun, go_on = threading.Semaphore(0), threading.Event()

    def wait() -> None:
        begun.release()
        assert go_on.wait(SOON)

    worker.use("t", on_session(wait), retry_limit=0)
    add(engine)
    worker.start()
    assert begun.acquire(timeout=SOON)
    proxy.close()  # nobody listens there any more
    go_on.set()
    until(lambda: probe.settler_failures(worker))

    there = Proxy(url, proxy.url.port)
    assert begun.acquire(timeout=SOON)
    until(lambda: tasks(engine)[0].state == "completed")
    assert (tasks(engine)[0].attempt, tasks(engine)[0].fail_count) == (1, 0)
    worker.stop(timeout=5)
    if isinstance(worker_engine, sa.Engine):
        worker_engine.dispose()
    there.close()
