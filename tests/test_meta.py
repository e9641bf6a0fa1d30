"""The application's own metadata of a task, from `add` to the processor, and tasks that wait."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from apoq import InvalidTask, Queue, Task
from apoq.cli import main
from apoq.errors import InvalidData

META = {"request_id": "9f", "tenant": {"id": 7, "name": "Zoë"}}

queue = Queue()


@queue.task(type="typed")
def typed(number: int) -> None:
    """Do nothing."""


@pytest.fixture
def run(url, monkeypatch) -> Callable[..., Any]:
    """Call the command line on the test's database, and return what it prints as JSON."""
    monkeypatch.setenv("APOQ_DATABASE_URL", url.render_as_string(hide_password=False))

    def call(*arguments: str) -> Any:
        return json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)

    return call


class TestAdding:
    def test_add_returns_and_stores_it(self, session):
        task = queue.add(session, "t", meta=META)

        session.flush()
        session.expire(task)

        assert task.meta == META

    @pytest.mark.parametrize("meta", [None, {}])
    def test_without_any_the_column_is_null(self, session, meta):
        task = queue.add(session, "t", meta=meta)

        assert task.meta is None
        assert session.scalar(sa.text("SELECT meta IS NULL FROM apoq_tasks"))

    @pytest.mark.parametrize("number", [3, 1_500])
    def test_add_many_gives_it_to_each_task(self, engine, number):
        with Session(engine) as session, session.begin():
            queue.add_many(session, "t", [{"n": n} for n in range(number)], meta=META)

        with Session(engine) as session:
            assert session.scalars(sa.select(Task.meta).distinct()).all() == [META]
            assert session.scalar(sa.select(sa.func.count(Task.meta))) == number

    def test_an_async_session_takes_it(self, url):
        async def add() -> dict:
            engine = create_async_engine(url)
            try:
                async with AsyncSession(engine) as session, session.begin():
                    return (await queue.add(session, "t", meta=META)).meta
            finally:
                await engine.dispose()

        assert asyncio.run(add()) == META

    def test_a_psycopg_connection_takes_it(self, url):
        with psycopg.connect(url.set(drivername="postgresql").render_as_string(False)) as connection:
            assert queue.add(connection, "t", meta=META).meta == META

    def test_a_typed_task_takes_it_by_using(self, session):
        assert typed.using(meta=META).add(session, 1).meta == META

    @pytest.mark.parametrize(
        ("meta", "message"),
        [
            ([1], "meta must be a dict"),
            ("text", "meta must be a dict"),
            ({"traceparent": "00-1"}, "'traceparent', which is reserved for tracing"),
            ({"tracestate": ""}, "'tracestate', which is reserved for tracing"),
            ({"at": object()}, r"meta\['at'\]"),
            ({1: 2}, "a key of a JSON object must be a string"),
            ({"long": "x" * 5_000}, "exceed the limit of 4,096"),
        ],
    )
    def test_what_it_can_not_be_is_refused_before_anything_is_sent(self, session, meta, message):
        with pytest.raises((InvalidTask, InvalidData), match=message):
            queue.add(session, "t", meta=meta)
        with pytest.raises((InvalidTask, InvalidData), match=message):
            typed.using(meta=meta)

        assert session.scalar(sa.select(sa.func.count(Task.id))) == 0

    def test_the_command_line_adds_and_shows_it(self, run):
        task_id = run("add", "t", "--meta", json.dumps(META))["id"]

        assert run("show", str(task_id))["meta"] == META


class TestProcessing:
    def test_the_processor_reads_it(self, engine, worker):
        found = []
        worker.use("t", lambda task: found.append(task.meta))
        with Session(engine) as session, session.begin():
            queue.add(session, "t", meta=META)
            queue.add(session, "t")

        worker.work()
        worker.work()

        assert found == [META, {}]

    def test_a_coroutine_reads_it(self, engine, worker):
        found = []

        async def process(task):
            found.append(task.meta)

        worker.use("t", process)
        with Session(engine) as session, session.begin():
            queue.add(session, "t", meta=META)

        worker.work()

        assert found == [META]

    def test_listeners_and_work_get_it_when_the_task_is_not_kept(self, engine, make_worker):
        worker = make_worker(keep_completed=timedelta())
        worker.use("t", lambda task: None)
        told = []
        worker.events.on("task.completed", lambda task: told.append(task.meta))
        with Session(engine) as session, session.begin():
            queue.add(session, "t", meta=META)

        task = worker.work()

        assert (task.meta, told) == (META, [META])

    @pytest.mark.parametrize("meta", ["[1]", '"text"', "1e131071", f'{{"long": "{"x" * 9_000}"}}'])
    def test_what_another_program_wrote_is_no_error(self, engine, worker, meta):
        found = []
        worker.use("t", lambda task: found.append(task.meta))
        with engine.begin() as connection:
            connection.execute(
                sa.text("INSERT INTO apoq_tasks (type, meta) VALUES ('t', CAST(:meta AS jsonb))"),
                {"meta": meta},
            )

        assert worker.work().state == "completed"
        assert found == [{}]


class TestWaitingTasks:
    @pytest.fixture
    def waiting(self, engine) -> int:
        with engine.begin() as connection:
            return connection.scalar(
                sa.text("INSERT INTO apoq_tasks (type, state) VALUES ('t', 'waiting') RETURNING id")
            )

    def test_a_waiting_task_is_not_claimed(self, engine, worker, waiting):
        worker.use("t", lambda task: None)

        assert worker.work() is None

        with Session(engine) as session:
            task = session.get_one(Task, waiting)
            assert (task.state, task.indexed_state) == ("waiting", "waiting")

    def test_it_can_be_cancelled_but_not_retried(self, engine, waiting):
        with Session(engine) as session, session.begin():
            assert not queue.retry(session, waiting)
            assert queue.cancel(session, waiting)

    def test_it_is_claimed_once_it_is_pending(self, engine, worker, waiting):
        worker.use("t", lambda task: None)
        with engine.begin() as connection:
            connection.execute(sa.text("UPDATE apoq_tasks SET state = 'pending'"))

        assert worker.work().id == waiting

    def test_the_command_line_shows_it(self, run, waiting):
        assert run("list", "--state", "waiting")["id"] == waiting
        [figures] = run("stats")["queues"]
        assert (figures["waiting"], figures["ready"]) == (1, 0)
