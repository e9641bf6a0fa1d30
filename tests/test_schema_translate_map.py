"""A schema_translate_map would hide apoq's tables from workers, so it is refused everywhere alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from click.testing import CliRunner
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session

from apoq import Queue, UnsupportedDatabase, Worker, migrations, prepare
from apoq.cli.group import Commands
from apoq.cli.target import Target
from apoq.testing import assert_enqueued, drain, enqueued

queue = Queue()


@queue.task
def send() -> None: ...


MAP: dict[str | None, str] = {None: "tenant"}
OPTIONS = {"schema_translate_map": MAP}

refused = pytest.raises(
    UnsupportedDatabase,
    match=r"schema_translate_map must not map .* it maps None to 'tenant': use Queue\(schema='tenant'\)",
)


@contextmanager
def on_engine(engine: sa.Engine) -> Iterator[Session]:
    with Session(engine.execution_options(**OPTIONS)) as session:
        yield session


@contextmanager
def on_scoped_session(engine: sa.Engine) -> Iterator[Any]:
    session = scoped_session(lambda: given)
    with Session(engine.execution_options(**OPTIONS)) as given:
        yield session


@contextmanager
def on_sessions_connection(engine: sa.Engine) -> Iterator[Session]:
    with Session(engine) as session:
        session.connection(execution_options=OPTIONS)
        yield session


@contextmanager
def on_connection(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection:
        yield connection.execution_options(**OPTIONS)


@contextmanager
def by_listener(engine: sa.Engine) -> Iterator[Session]:
    with Session(engine) as session:
        sa.event.listen(session, "do_orm_execute", lambda state: state.update_execution_options(**OPTIONS))
        yield session


@contextmanager
def on_session(engine: sa.Engine) -> Iterator[Session]:
    if sa.__version__ < "2.1":
        pytest.skip("before SQLAlchemy 2.1, sessions have no execution options")
    with Session(engine, execution_options=OPTIONS) as session:
        yield session


WAYS = [on_engine, on_scoped_session, on_sessions_connection, on_connection, by_listener, on_session]
ADDING: dict[str, Callable[[Any], Any]] = {
    "add": lambda session: queue.add(session, "t"),
    "add_many": lambda session: queue.add_many(session, "t", [{}] * 3_000),
    "a typed task": send.add,
    "cancel": lambda session: queue.cancel(session, 1),
    "retry": lambda session: queue.retry(session, 1),
}
TESTING: dict[str, Callable[[Any], Any]] = {
    "enqueued": enqueued,
    "assert_enqueued": lambda session: assert_enqueued(session, "t"),
    "drain": lambda session: drain(session, queue),
}


@pytest.fixture(scope="module")
def tenants(template, create_database, drop_database) -> Iterator[sa.Engine]:
    """An engine to a database with apoq's tables in two schemas."""
    url = create_database(template.database)
    engine = sa.create_engine(url)
    prepare(engine, schema="tenant")
    yield engine
    engine.dispose()
    drop_database(url)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verb", ADDING.values(), ids=ADDING)
def test_by_what_adds_or_changes_a_task(tenants, way, verb):
    if way is by_listener and verb in {ADDING["cancel"], ADDING["retry"]} and sa.__version__ < "2.1":
        pytest.skip("before SQLAlchemy 2.1, nothing says with what options these were executed")
    with way(tenants) as session:
        with refused:
            verb(session)
        session.rollback()


@pytest.mark.parametrize("way", [way for way in WAYS if way not in {by_listener, on_session}])
@pytest.mark.parametrize("verb", TESTING.values(), ids=TESTING)
def test_by_the_test_helpers(tenants, way, verb):
    with way(tenants) as session, refused:
        verb(session)


@pytest.mark.parametrize("verb", [*ADDING.values(), *TESTING.values()], ids=[*ADDING, *TESTING])
def test_by_asyncio_sessions_and_connections(tenants, verb):
    async def main() -> None:
        engine = create_async_engine(tenants.url).execution_options(**OPTIONS)
        async with AsyncSession(engine) as session, engine.connect() as connection:
            for given in (session, connection):
                with refused:
                    await verb(given)
        await engine.dispose()

    asyncio.run(main())


@pytest.mark.parametrize("kind", [sa.Engine, AsyncEngine])
def test_by_workers(tenants, kind):
    engine = tenants if kind is sa.Engine else create_async_engine(tenants.url)

    with refused:
        Worker(engine.execution_options(**OPTIONS))
    with refused:
        Worker(engine.execution_options(**OPTIONS), Queue(schema="tenant"), Queue("mails"))


def test_by_prepare(tenants):
    with refused:
        prepare(tenants.execution_options(**OPTIONS))

    async def main() -> None:
        engine = create_async_engine(tenants.url).execution_options(**OPTIONS)
        with refused:
            await prepare(engine)
        await engine.dispose()

    asyncio.run(main())


@pytest.mark.parametrize(
    "verb",
    [
        lambda connection, op: migrations.upgrade(op),
        lambda connection, op: migrations.downgrade(op),
        lambda connection, op: migrations.current(connection),
        lambda connection, op: migrations.differences(connection),
    ],
    ids=["upgrade", "downgrade", "current", "differences"],
)
def test_by_migrations(tenants, verb):
    with tenants.connect().execution_options(**OPTIONS) as connection, refused:
        verb(connection, Operations(MigrationContext.configure(connection)))


@pytest.mark.parametrize(
    "command",
    [
        "migrate",
        "check",
        "doctor",
        "add t",
        "list",
        "show 1",
        "retry 1",
        "cancel 1",
        "prune --completed-before 1d --yes",
        "stats",
    ],
)
def test_by_the_command_line_of_a_framework(tenants, command):
    @click.group(cls=Commands)
    @click.pass_context
    def theirs(ctx):
        ctx.obj = Target(engine=tenants.execution_options(**OPTIONS))

    done = CliRunner().invoke(theirs, command.split())

    assert done.exit_code != 0
    assert "use Queue(schema='tenant')" in done.output


@pytest.mark.parametrize(
    ("queue", "translated"),
    [(Queue(), {"tenant": "other"}), (Queue(schema="tenant"), MAP), (Queue(), {None: None})],
    ids=["of the application's other schemas", "beside a schema's name", "to the same"],
)
def test_one_that_leaves_the_queues_schema_alone_is_fine(url, queue, translated):
    plain = sa.create_engine(url)
    prepare(plain, schema="tenant")
    engine = plain.execution_options(schema_translate_map=translated)
    worker = Worker(engine, queue)
    worker.use("t", lambda task: task.session.execute(sa.text("SELECT 1")))

    with Session(engine) as session, session.begin():
        queue.add(session, "t")
        queue.add_many(session, "t", [{}] * 3_000)
    with engine.begin() as connection:
        assert len(enqueued(connection, queue=queue)) == 3_001

    assert worker.work().state == "completed"
    plain.dispose()
