"""Adding tasks on a connection of plain psycopg, however its owner has set it up."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import sqlalchemy as sa
from psycopg.pq import TransactionStatus
from psycopg.rows import class_row, dict_row, namedtuple_row, scalar_row
from psycopg.types.json import set_json_loads
from psycopg.types.string import TextLoader

from apoq import Queue, SchemaMismatch, Task

DATA = {"colour": "100 % 💖", "sizes": [1, 2.5, None]}


@pytest.fixture
def dsn(url) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def count(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(Task))


class Person:
    def __init__(self, name: str) -> None:
        self.name = name


@pytest.mark.parametrize("row_factory", [dict_row, namedtuple_row, scalar_row, class_row(Person)])
def test_a_connections_row_factory_does_not_matter(dsn, queue, row_factory):
    with psycopg.connect(dsn, row_factory=row_factory) as connection:
        task = queue.add(connection, "t", DATA)

        assert (task.data, task.state) == (DATA, "pending")
        assert connection.row_factory is row_factory


@pytest.mark.parametrize("cursor", [psycopg.Cursor, psycopg.ClientCursor, psycopg.RawCursor])
def test_a_connections_kind_of_cursors_does_not_matter(engine, dsn, queue, cursor):
    with psycopg.connect(dsn, cursor_factory=cursor) as connection:
        task = queue.add(connection, "t", DATA, delay=timedelta(hours=1), retry_delay=5)
        assert queue.add_many(connection, "t", [DATA] * 3_000) == 3_000  # some by an INSERT, some by a COPY

    assert task.data == DATA
    assert task.retry_delay == timedelta(seconds=5)
    assert count(engine) == 3_001


@pytest.mark.parametrize("cursor", [psycopg.AsyncCursor, psycopg.AsyncClientCursor, psycopg.AsyncRawCursor])
def test_an_asyncio_connections_kind_of_cursors_does_not_matter(engine, dsn, queue, cursor):
    async def main() -> Task:
        async with await psycopg.AsyncConnection.connect(dsn, cursor_factory=cursor) as connection:
            assert await queue.add_many(connection, "t", [DATA] * 3_000) == 3_000
            return await queue.add(connection, "t", DATA)

    assert asyncio.run(main()).data == DATA
    assert count(engine) == 3_001


def test_how_a_connection_reads_json_and_times_does_not_matter(dsn, queue):
    with psycopg.connect(dsn) as connection:
        connection.adapters.register_loader("timestamptz", TextLoader)
        set_json_loads(lambda _: pytest.fail("read by its own"), connection)

        task = queue.add(connection, "t", DATA, process_at=datetime(2031, 5, 4, tzinfo=UTC))

        assert (task.data, task.process_at) == (DATA, datetime(2031, 5, 4, tzinfo=UTC))
        assert connection.execute("SELECT now()").fetchone()[0].startswith("2")


def test_a_cursor_of_its_own_goes_on_beside_it(dsn, queue):
    with psycopg.connect(dsn) as connection, connection.cursor(binary=True) as cursor:
        cursor.execute("SELECT generate_series(1, 3)")
        assert cursor.fetchone() == (1,)

        queue.add(connection, "t")

        assert cursor.fetchall() == [(2,), (3,)]


def test_a_server_side_cursor_goes_on_beside_it(dsn, queue):
    with psycopg.connect(dsn) as connection, connection.cursor("numbers") as cursor:
        cursor.execute("SELECT generate_series(1, 3)")
        assert cursor.fetchone() == (1,)

        queue.add(connection, "t")

        assert cursor.fetchall() == [(2,), (3,)]


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_transaction_block_that_raises_leaves_none(engine, dsn, queue, autocommit):
    with (
        psycopg.connect(dsn, autocommit=autocommit) as connection,
        pytest.raises(ZeroDivisionError),
        connection.transaction(),
    ):
        queue.add(connection, "t")
        raise ZeroDivisionError

    assert count(engine) == 0


def test_a_savepoint_takes_its_tasks_with_it(engine, dsn, queue):
    with psycopg.connect(dsn) as connection, connection.transaction():
        kept = queue.add(connection, "kept")
        with connection.transaction() as savepoint:
            queue.add(connection, "lost")
            raise psycopg.Rollback(savepoint)

    with engine.connect() as connection:
        assert connection.scalars(sa.select(Task.id)).all() == [kept.id]


def test_in_autocommit_a_task_stands_at_once(engine, dsn, queue):
    with psycopg.connect(dsn, autocommit=True) as connection:
        queue.add(connection, "t")

        assert connection.info.transaction_status == TransactionStatus.IDLE
        assert count(engine) == 1


def test_in_a_pipeline_each_task_is_answered(engine, dsn, queue):
    with psycopg.connect(dsn) as connection, connection.pipeline():
        before = connection.execute("SELECT 1")
        tasks = [queue.add(connection, "t", {"n": n}) for n in range(3)]
        assert before.fetchone() == (1,)

    assert [task.data for task in tasks] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert count(engine) == 3


def test_in_an_asyncio_pipeline_too(engine, dsn, queue):
    async def main() -> list[int]:
        async with (
            await psycopg.AsyncConnection.connect(dsn) as connection,
            connection.transaction(),
            connection.pipeline(),
        ):
            return [(await queue.add(connection, "t", [n])).data[0] for n in range(3)]

    assert asyncio.run(main()) == [0, 1, 2]
    assert count(engine) == 3


def test_in_a_pipeline_what_is_missing_is_said(empty_url, queue):
    dsn = empty_url.set(drivername="postgresql").render_as_string(hide_password=False)
    with (
        psycopg.connect(dsn) as connection,
        pytest.raises(SchemaMismatch, match="apoq_tasks"),
        connection.pipeline(),
    ):
        queue.add(connection, "t")


def test_a_typed_task_is_added_on_it(dsn):
    queue = Queue()

    @queue.task(type="greet")
    def greet(name: str) -> None: ...

    with psycopg.connect(dsn) as connection:
        task = greet.add(connection, name="Ada")

        found = connection.execute("SELECT data::text FROM apoq_tasks WHERE id = %s", [task.id]).fetchone()
        assert json.loads(found[0]) == {"name": "Ada"}


def test_a_worker_finds_it_without_a_notification(engine, dsn, queue, make_worker):
    worker = make_worker(queue)
    worker.use("t", lambda task: None)
    with psycopg.connect(dsn) as connection:
        task = queue.add(connection, "t")

    assert worker.work().id == task.id


def test_its_documentation_runs(engine, dsn, monkeypatch, capsys, run_page):
    monkeypatch.setenv("DATABASE_URL", dsn)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE users (email text)")

    run_page("django.md")

    assert capsys.readouterr().out == "task 10003 is pending\n"
    assert count(engine) == 10_003
