"""Databases and engines of another encoding than UTF-8."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import probe
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, RunningTask, Task, Worker, prepare
from apoq.postgres.connections import _IS_POOLED, execute, own_engine

SOON = 30.0

until = patience(SOON)


@pytest.fixture
def create_encoded(admin, server, drop_database) -> Iterator[Callable[[str], sa.URL]]:
    """Create databases with apoq's tables, in an encoding."""
    created = []

    def create(encoding: str) -> sa.URL:
        name = f"apoq_test_{uuid.uuid4().hex[:10]}"
        with admin.connect() as connection:
            connection.exec_driver_sql(
                f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
            )
        url = server.set(database=name)
        created.append(url)
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        prepare(engine)
        engine.dispose()
        return url

    yield create
    for url in created:
        drop_database(url)


def tasks(engine: sa.Engine) -> list[tuple[str, str]]:
    with engine.connect() as connection:
        return [(type_, state) for type_, state in connection.execute(sa.select(Task.type, Task.state))]


def work_all(engine: sa.Engine, worker: Worker) -> None:
    worker.start()
    try:
        until(lambda: {state for _, state in tasks(engine)} <= {"completed", "failed"})
    finally:
        worker.stop(timeout=5)


@pytest.mark.parametrize(
    ("encoding", "stored"),
    [
        ("LATIN1", "café <U+201C>one<U+201D> <U+1F496>"),
        ("UTF8", "café “one” 💖"),
    ],
)
@pytest.mark.parametrize("is_pooled", [False, True], ids=["direct", "through a pooler"])
def test_an_error_is_stored_as_far_as_the_database_can_hold_it(
    create_encoded, queue, encoding, stored, is_pooled, caplog
):
    engine = sa.create_engine(create_encoded(encoding))
    worker = Worker(engine, queue)
    probe.own_engine(worker).update_execution_options(**{_IS_POOLED: is_pooled})

    def fail(task) -> None:
        raise ValueError("café “one” 💖")

    worker.use("bad", fail, retry_limit=0)
    worker.use("good", lambda task: None)
    with Session(engine) as session, session.begin():
        queue.add_many(session, "good", range(5))
        queue.add(session, "bad")
    work_all(engine, worker)

    with engine.connect() as connection:
        connection.exec_driver_sql("SET client_encoding = 'UTF8'")
        (message,) = connection.scalars(
            sa.text("SELECT error ->> 'message' FROM apoq_tasks WHERE type = 'bad'")
        ).all()
    assert message == stored
    assert "refused the result" not in caplog.text
    engine.dispose()


@pytest.mark.parametrize("in_session", [False, True])
def test_a_result_that_the_database_can_not_hold_fails_its_attempt(create_encoded, queue, in_session):
    engine = sa.create_engine(create_encoded("LATIN1"))
    worker = Worker(engine, queue)

    def process(task: RunningTask) -> str:
        if in_session:
            task.session.execute(sa.text("SELECT 1"))
        return task.type

    for type_ in ("good", "bad"):
        returned = {"good": "café", "bad": "“one”"}[type_]
        worker.use(type_, lambda task, its=returned: process(task) and its, keep_result=True, retry_limit=0)
    with Session(engine) as session, session.begin():
        ids = [queue.add(session, type_).id for type_ in ("good", "bad", "good")]
    work_all(engine, worker)

    with Session(engine) as session:
        good, bad, other = (queue.result(session, task_id) for task_id in ids)
    assert (good.value, bad.state, other.value) == ("café", "failed", "café")
    assert "character" in bad.error["message"] or "Unicode" in bad.error["message"], bad.error["message"]
    engine.dispose()


def test_a_type_and_a_queue_that_the_database_can_not_hold_stop_nobody(create_encoded):
    """They can't be there; the worker serves another database, too."""
    engine = sa.create_engine(create_encoded("LATIN1"))
    queue, other = Queue("café"), Queue("💖")
    worker = Worker(engine, queue, other)
    for type_ in ("“quoted”", "thé"):
        worker.use(type_, lambda task: None, retry_limit=3)
    with Session(engine) as session, session.begin():
        queue.add_many(session, "thé", range(5))

    work_all(engine, worker)
    engine.dispose()


@pytest.mark.parametrize("is_pooled", [False, True], ids=["direct", "through a pooler"])
@pytest.mark.parametrize("by", ["engine", "environment"])
def test_what_a_client_encoding_does_not_have_stops_nobody(url, engine, queue, by, is_pooled, monkeypatch):
    with Session(engine) as session, session.begin():
        queue.add_many(session, "t", ["€💥"] * 3)
        queue.add(session, "“💥”", "€")
    options = {"client_encoding": "latin1"} if by == "engine" else {}
    if by == "environment":
        monkeypatch.setenv("PGCLIENTENCODING", "latin1")
    narrow = sa.create_engine(url, **options)
    seen = []
    worker = Worker(narrow, queue)
    probe.own_engine(worker).update_execution_options(**{_IS_POOLED: is_pooled})
    worker.use("t", lambda task: seen.append(task.data))
    worker.use("“💥”", lambda task: seen.append(task.type))

    worker.start()
    try:
        until(lambda: len(seen) == 4)
    finally:
        worker.stop(timeout=5)

    assert sorted(seen) == ["“💥”", "€💥", "€💥", "€💥"]
    narrow.dispose()


def test_what_no_encoding_holds_is_a_database_error(engine):
    """So the settler parts it from the others."""
    own = own_engine(engine)
    with pytest.raises(psycopg.DataError, match="can't be encoded"):
        execute(own, sa.select(sa.bindparam("text", type_=sa.Text)), {"text": "\ud800"})
    own.dispose()
