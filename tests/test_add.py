"""Adding tasks in the caller's transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, aclosing, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta, timezone

import psycopg
import pytest
import sqlalchemy as sa
import transaction
import zope.sqlalchemy
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from apoq import InvalidData, Queue, Task, prepare
from apoq.client.operations import BATCH_COUNT
from apoq.schema.statements.enqueue import enqueue, enqueue_many


def count(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(Task))


def psycopg_dsn(url: sa.URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def test_a_task_has_its_id_and_what_it_was_given(session, queue):
    task = queue.add(session, "send_message", {"color": "💖"})

    assert task.id > 0
    assert (task.type, task.data, task.queue, task.state) == (
        "send_message",
        {"color": "💖"},
        "default",
        "pending",
    )
    assert (task.priority, task.fail_count, task.attempt, task.retry_limit) == (0, 0, 0, None)
    assert task.process_at == task.created_at


def test_the_task_of_an_orm_session_is_in_the_session(session, queue):
    task = queue.add(session, "send_message")

    assert task in session
    assert session.get(Task, task.id) is task
    assert not session.dirty


def test_data_is_an_empty_object_unless_given(session, queue):
    task = queue.add(session, "send_message")

    assert task.data == {}


@pytest.mark.parametrize(
    "data", [None, True, 0, -1.5, "", "text", [], [1, [2, {}]], {"a": None}, {"ü": "💖"}, 2**70]
)
def test_data_comes_back_as_it_was_given(session, queue, data):
    task = queue.add(session, "t", data)

    session.expire(task)
    assert task.data == data


@pytest.mark.parametrize("kind", ["session", "session that is listened to", "connection", "psycopg"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data": None},
        {
            "data": {"b": [1.0, "ü", {}], "a": 2**70},
            "delay": timedelta(days=3, microseconds=1),
            "priority": -3,
            "retry_limit": 0,
            "retry_delay": 0.1,
            "timeout": timedelta(hours=30),
        },
    ],
    ids=["defaults", "null", "everything"],
)
def test_a_task_is_answered_as_it_stands_in_the_database(engine, url, kind, options):
    queue = Queue("other")
    with ExitStack() as stack:
        match kind:
            case "psycopg":
                given = stack.enter_context(psycopg.connect(psycopg_dsn(url)))
            case "connection":
                given = stack.enter_context(engine.begin())
            case _:
                given = stack.enter_context(Session(engine))
                if kind != "session":
                    sa.event.listen(given, "do_orm_execute", lambda state: None)
        task = queue.add(given, "t", **options)
        columns = list(sa.inspect(Task).columns)
        answered = {column.name: task.__dict__[column.name] for column in columns}
        given.commit()

    with engine.connect() as connection:
        row = connection.execute(sa.select(*columns).where(Task.id == answered["id"])).mappings().one()
    assert answered == dict(row)


def test_a_session_that_chooses_its_engine_by_the_class(engine, queue):
    class Routed(Session):
        def get_bind(self, mapper=None, **others):
            assert issubclass(mapper.class_, Task)
            return engine

    with Routed() as session, session.begin():
        queue.add(session, "t")

    assert count(engine) == 1


def test_a_task_is_seen_by_others_when_the_caller_commits(engine, queue):
    with Session(engine) as session:
        queue.add(session, "t")
        before = count(engine)
        session.commit()

    assert (before, count(engine)) == (0, 1)


def test_a_task_is_gone_with_a_rollback(engine, queue):
    with Session(engine) as session:
        queue.add(session, "t")
        session.rollback()
        session.commit()

    assert count(engine) == 0


def test_a_task_is_gone_with_the_rollback_of_a_savepoint(engine, queue):
    with Session(engine) as session, session.begin():
        queue.add(session, "kept")
        savepoint = session.begin_nested()
        queue.add(session, "gone")
        savepoint.rollback()

    with Session(engine) as session:
        assert session.scalars(sa.select(Task.type)).all() == ["kept"]


def test_adding_is_one_statement_and_nothing_else(engine, queue):
    statements = []
    with Session(engine) as session:
        session.execute(sa.text("SELECT 1"))
        sa.event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
        queue.add(session, "t")
        session.rollback()

    assert [statement.split()[0] for statement in statements] == ["INSERT"]


def test_adding_does_not_flush_what_else_is_in_the_session(session, queue):
    pending = Task(type="not yet")
    session.add(pending)

    queue.add(session, "t")

    assert pending in session.new


def test_a_delay_counts_from_the_call(session, queue):
    session.execute(sa.text("SELECT pg_sleep(0.05)"))

    task = queue.add(session, "t", delay=timedelta(hours=1))

    assert (
        timedelta(hours=1, milliseconds=40)
        < task.process_at - task.created_at
        < timedelta(hours=1, minutes=1)
    )


def test_process_at_is_when_it_is_due(session, queue):
    at = datetime(2031, 5, 4, 12, 30, tzinfo=UTC)

    assert queue.add(session, "t", process_at=at).process_at == at


def test_options_of_a_task_are_kept_on_it(session, queue):
    task = queue.add(session, "t", priority=7, retry_limit=1, retry_delay=2.5, timeout=0.5)

    assert (task.priority, task.retry_limit, task.retry_delay) == (7, 1, timedelta(seconds=2.5))
    assert task.timeout == timedelta(seconds=0.5)


def test_a_queue_names_its_tasks(session):
    assert Queue("emails").add(session, "t").queue == "emails"


def test_tasks_of_a_schema_are_there(engine):
    prepare(engine, schema="jobs")
    queue = Queue("emails", schema="jobs")

    with Session(engine) as session, session.begin():
        task = queue.add(session, "t", {"n": 1})
        assert isinstance(task, Task)
        assert session.get(queue.task_class, task.id) is task
        queue.add_many(session, "t", [2, 3])

    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM jobs.apoq_tasks")) == 3
    assert count(engine) == 0


def test_a_mapped_task_can_be_added_like_any_other_object(session):
    task = Task(type="t", data={"n": 1})
    session.add(task)
    session.flush()

    assert (task.id > 0, task.state, task.queue) == (True, "pending", "default")


def test_a_foreign_key_can_point_at_a_task(session, queue):
    registry = sa.orm.registry()

    @registry.mapped
    class Order:
        __tablename__ = "orders"
        id = sa.Column(sa.Integer, primary_key=True)
        task_id = sa.Column(sa.ForeignKey(Task.id))
        task = sa.orm.relationship(Task)

    registry.metadata.tables["orders"].create(session.connection())
    order = Order(id=1, task=queue.add(session, "t"))
    session.add(order)
    session.flush()

    assert order.task_id == order.task.id


class TestEachKindOfSession:
    """One verb for all."""

    def test_scoped_session(self, engine, queue):
        scoped = scoped_session(sessionmaker(engine))

        queue.add(scoped, "t", [1])
        queue.add_many(scoped, "t", [2, 3])
        scoped.commit()
        scoped.remove()

        assert count(engine) == 3

    def test_core_connection(self, engine, queue):
        with engine.begin() as connection:
            task = queue.add(connection, "t", [1])
            assert queue.add_many(connection, "t", [2, 3]) == 2

        assert task.data == [1]
        assert count(engine) == 3

    def test_core_connection_rolled_back(self, engine, queue):
        with engine.connect() as connection:
            queue.add(connection, "t")
            connection.rollback()

        assert count(engine) == 0

    def test_psycopg_connection(self, engine, url, queue):
        with psycopg.connect(psycopg_dsn(url), row_factory=psycopg.rows.dict_row) as connection:
            task = queue.add(connection, "t", {"color": "💖"}, delay=timedelta(minutes=1))
            assert queue.add_many(connection, "t", [2, 3]) == 2
            assert count(engine) == 0

        assert (task.data, task.state) == ({"color": "💖"}, "pending")
        assert count(engine) == 3

    def test_psycopg_connection_rolled_back(self, engine, url, queue):
        with psycopg.connect(psycopg_dsn(url)) as connection:
            queue.add(connection, "t")
            connection.rollback()

        assert count(engine) == 0

    @pytest.mark.parametrize("scoped", [False, True])
    def test_async_session(self, engine, url, queue, scoped):
        async def main() -> Task:
            async_engine = create_async_engine(url)
            if scoped:
                session = async_scoped_session(async_sessionmaker(async_engine), asyncio.current_task)
            else:
                session = AsyncSession(async_engine)
            task = await queue.add(session, "t", [1])
            assert await queue.add_many(session, "t", [2, 3]) == 2
            await session.refresh(task)
            await session.commit()
            await session.close()
            await async_engine.dispose()
            return task

        asyncio.run(main())

        assert count(engine) == 3

    def test_async_connection(self, engine, url, queue):
        async def main() -> Task:
            async_engine = create_async_engine(url)
            async with async_engine.begin() as connection:
                task = await queue.add(connection, "t", [1])
                assert await queue.add_many(connection, "t", [2, 3]) == 2
            await async_engine.dispose()
            return task

        task = asyncio.run(main())

        assert task.data == [1]
        assert count(engine) == 3

    def test_psycopg_async_connection(self, engine, url, queue):
        async def main() -> Task:
            async with await psycopg.AsyncConnection.connect(psycopg_dsn(url)) as connection:
                task = await queue.add(connection, "t", [1])
                assert await queue.add_many(connection, "t", [2, 3]) == 2
            return task

        task = asyncio.run(main())

        assert task.data == [1]
        assert count(engine) == 3

    def test_the_sync_session_inside_run_sync(self, engine, url, queue):
        async def main() -> None:
            async_engine = create_async_engine(url)
            async with AsyncSession(async_engine) as session:
                await session.run_sync(lambda sync: queue.add(sync, "t"))
                await session.commit()
            await async_engine.dispose()

        asyncio.run(main())

        assert count(engine) == 1


class TestAddMany:
    def test_order_and_options(self, session, queue):
        n = queue.add_many(
            session, "t", ({"n": n} for n in range(2_500)), priority=3, delay=timedelta(hours=1)
        )

        tasks = session.scalars(sa.select(Task).order_by(Task.id)).all()
        assert n == 2_500
        assert [task.data["n"] for task in tasks] == list(range(2_500))
        assert {task.priority for task in tasks} == {3}
        assert all(task.process_at > task.created_at + timedelta(minutes=59) for task in tasks)

    def test_nothing_is_nothing(self, session, queue):
        assert queue.add_many(session, "t", []) == 0

    def test_many_tasks_are_a_stream_of_batches(self, shared_engine, queue):
        """A batch is sent before the next one is asked for: what is read ahead is bounded."""
        read = sent = 0
        furthest = 0

        def items():
            nonlocal read, furthest
            for n in range(100_000):
                read += 1
                furthest = max(furthest, read - sent)
                yield n

        def before(_connection, _cursor, _statement, parameters, *_rest):
            nonlocal sent
            sent += len(parameters["task_data"].split("\n"))

        with Session(shared_engine) as session:
            session.connection()
            sa.event.listen(shared_engine, "before_cursor_execute", before)
            try:
                assert queue.add_many(session, "t", items()) == 100_000
            finally:
                sa.event.remove(shared_engine, "before_cursor_execute", before)
                session.rollback()
        assert furthest <= BATCH_COUNT

    def test_large_data_make_smaller_batches(self, session, queue):
        sizes = []
        session.connection()
        listener = lambda *arguments: sizes.append(len(arguments[3]["task_data"].split("\n")))  # noqa: E731
        sa.event.listen(session.get_bind(), "before_cursor_execute", listener)
        try:
            queue.add_many(session, "t", iter(["x" * 500_000] * 20))
        finally:
            sa.event.remove(session.get_bind(), "before_cursor_execute", listener)

        assert sizes == [9, 9, 2]


@pytest.fixture
def small_batches(monkeypatch):
    """Let a COPY begin after the second task."""
    monkeypatch.setattr("apoq.client.operations.FIRST_COUNT", 2)
    monkeypatch.setattr("apoq.client.operations.BEFORE_COPY", 2)
    monkeypatch.setattr("apoq.client.operations.BATCH_COUNT", 2)


@contextmanager
def inserts(engine: sa.Engine) -> Iterator[list[str]]:
    """Collect the INSERTs that an engine sends: a COPY isn't among them."""
    statements: list[str] = []

    def before(_connection, _cursor, statement, *_rest):
        if statement.startswith("INSERT"):
            statements.append(statement)

    sa.event.listen(engine, "before_cursor_execute", before)
    try:
        yield statements
    finally:
        sa.event.remove(engine, "before_cursor_execute", before)


ODD_TEXTS = [
    "\\",
    "\\\\",
    "\\n",
    "\\.",
    "\\N",
    "\n\r\t\b\f\v\x01\x7f",
    "'\"$$;%s%%:x{}",
    "\u2028\u2029\x85",
    "💖 ü",
    "",
]


@pytest.mark.usefixtures("small_batches")
class TestCopy:
    """What is beyond the first batch of a list is sent by COPY, and is as if it had been inserted."""

    def test_a_list_is_one_insert_and_a_copy_and_an_iterator_is_inserts(self, session, queue):
        with inserts(session.get_bind()) as of_a_list:
            assert queue.add_many(session, "t", list(range(7))) == 7
        with inserts(session.get_bind()) as of_an_iterator:
            assert queue.add_many(session, "t", iter(range(7))) == 7

        assert (len(of_a_list), len(of_an_iterator)) == (1, 4)
        assert session.scalars(sa.select(Task.data).order_by(Task.id)).all() == [*range(7), *range(7)]

    def test_a_list_of_one_batch_is_one_statement(self, session, queue):
        statements = []
        session.connection()
        listener = lambda *arguments: statements.append(arguments[2])  # noqa: E731
        sa.event.listen(session.get_bind(), "before_cursor_execute", listener)
        try:
            queue.add_many(session, "t", [1, 2])
        finally:
            sa.event.remove(session.get_bind(), "before_cursor_execute", listener)

        assert [statement.split()[0] for statement in statements] == ["INSERT"]

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"priority": -5},
            {"process_at": datetime(2031, 5, 4, 12, 30, 0, 7, tzinfo=timezone(timedelta(hours=-9)))},
            {"process_at": datetime(2, 1, 1, tzinfo=UTC)},
            {"retry_limit": 0},
            {"retry_delay": timedelta(days=400, hours=3, microseconds=1)},
            {"priority": 7, "retry_limit": 9, "retry_delay": 0.5},
            {"timeout": timedelta(days=400, hours=3, microseconds=1)},
        ],
        ids=repr,
    )
    @pytest.mark.parametrize(
        "settings",
        [
            "",
            "SET LOCAL DateStyle = German; SET LOCAL IntervalStyle = sql_standard; SET LOCAL TimeZone = PRC",
        ],
        ids=["usual", "other"],
    )
    def test_its_rows_are_as_inserted(self, session, queue, options, settings):
        session.execute(sa.text(settings or "SELECT 1"))

        queue.add_many(session, "t", [None] * 5, **options)

        session.execute(sa.text("SET LOCAL DateStyle = ISO; SET LOCAL IntervalStyle = postgres"))
        columns = [column for column in Task.__table__.c if column.name != "id"]
        assert len(session.execute(sa.select(*columns).distinct()).all()) == 1

    def test_a_delay_counts_from_the_call(self, session, queue):
        session.execute(sa.text("SELECT pg_sleep(0.05)"))

        queue.add_many(session, "t", [1, 2, 3], delay=timedelta(hours=1))

        assert session.scalar(sa.select(sa.func.min(Task.process_at - Task.created_at))) > timedelta(
            hours=1, milliseconds=40
        )

    def test_odd_texts_come_back(self, session):
        names = [text for text in ODD_TEXTS if text]
        items = [{text: [text]} for text in ODD_TEXTS]

        for name in names:
            Queue(name).add_many(session, name, items)

        for name in names:
            found = session.execute(
                sa.select(Task.type, Task.data).where(Task.queue == name).order_by(Task.id)
            ).all()
            assert found == [(name, data) for data in items]

    @pytest.mark.parametrize("schema", ['Odd "name"', "a:b", "ü 💖", "select"])
    def test_a_schema_may_have_any_name(self, engine, schema):
        prepare(engine, schema=schema)
        queue = Queue(schema=schema)

        with Session(engine) as session, session.begin(), inserts(engine) as statements:
            queue.add_many(session, "t", list(range(5)))
            assert len(session.scalars(sa.select(queue.task_class)).all()) == 5
        assert len(statements) == 1
        assert count(engine) == 0

    def test_a_rollback_leaves_none(self, engine, queue):
        with Session(engine) as session:
            queue.add_many(session, "t", [1, 2, 3])
            session.rollback()
            session.commit()

        assert count(engine) == 0

    def test_the_rollback_of_a_savepoint_leaves_none(self, session, queue):
        savepoint = session.begin_nested()
        queue.add_many(session, "t", [1, 2, 3])
        savepoint.rollback()

        assert session.scalars(sa.select(Task.id)).all() == []

    def test_data_that_json_cannot_hold_is_named_and_a_savepoint_helps(self, session, queue):
        with pytest.raises(InvalidData, match=r"^items\[3\]\['x'\]: set is not JSON"), session.begin_nested():
            queue.add_many(session, "t", [1, 2, 3, {"x": {4}}, 5])

        assert session.scalars(sa.select(Task.id)).all() == []
        assert queue.add_many(session, "t", [1, 2, 3]) == 3

    def test_an_error_of_the_database_is_sqlalchemys_as_for_an_insert(self, session, queue):
        session.execute(sa.text("ALTER TABLE apoq_tasks ADD CHECK (data <> '3')"))

        with pytest.raises(sa.exc.IntegrityError, match="check constraint") as caught, session.begin_nested():
            queue.add_many(session, "t", [1, 2, 3])

        assert isinstance(caught.value.orig, psycopg.errors.CheckViolation)

    def test_what_else_is_in_the_session_is_not_flushed(self, session, queue):
        pending = Task(type="not yet")
        session.add(pending)

        queue.add_many(session, "t", [1, 2, 3])

        assert pending in session.new

    def test_a_session_that_zope_commits(self, engine, queue):
        session = sessionmaker(engine)()
        zope.sqlalchemy.register(session)

        with transaction.manager:
            queue.add_many(session, "t", [1, 2, 3])

        assert count(engine) == 3

    def test_a_session_that_chooses_its_engine_by_the_statement(self, engine, queue):
        nowhere = sa.create_engine("postgresql+psycopg://nowhere.invalid/")

        class Routing(Session):
            def get_bind(self, mapper=None, *, clause=None, **options):
                return engine if clause is None or isinstance(clause, sa.Insert) else nowhere

        with Routing() as session:
            queue.add_many(session, "t", [1, 2, 3])
            session.commit()

        assert count(engine) == 3

    def test_a_role_that_is_subject_to_row_level_security_inserts(self, session, queue):
        session.execute(
            sa.text("""
                CREATE ROLE apoq_test_secured;
                ALTER TABLE apoq_tasks ENABLE ROW LEVEL SECURITY;
                CREATE POLICY small ON apoq_tasks USING (type = 't');
                GRANT ALL ON ALL TABLES IN SCHEMA public TO apoq_test_secured;
                GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO apoq_test_secured;
                SET LOCAL ROLE apoq_test_secured""")
        )

        with inserts(session.get_bind()) as statements:
            assert queue.add_many(session, "t", [1, 2, 3]) == 3
        assert len(statements) == 2
        assert len(session.scalars(sa.select(Task.id)).all()) == 3

    def test_an_iterator_may_read_from_the_same_session(self, session, queue):
        numbers = session.scalars(sa.text("SELECT generate_series(1, 10)").execution_options(yield_per=2))

        def items():
            for number in numbers:
                yield [number, session.scalar(sa.text("SELECT 1"))]

        assert queue.add_many(session, "t", items()) == 10

    @pytest.mark.parametrize("autocommit", [False, True])
    @pytest.mark.parametrize("pipeline", [False, True])
    def test_a_psycopg_connection(self, engine, url, queue, autocommit, pipeline):
        with psycopg.connect(psycopg_dsn(url), autocommit=autocommit) as connection:
            with connection.pipeline() if pipeline else nullcontext():
                assert queue.add_many(connection, "t", [1, 2, 3, 4, 5]) == 5
            assert connection.info.transaction_status == (
                psycopg.pq.TransactionStatus.IDLE if autocommit else psycopg.pq.TransactionStatus.INTRANS
            )
            assert count(engine) == (5 if autocommit else 0)

        assert count(engine) == 5

    @pytest.mark.parametrize("pipeline", [False, True])
    def test_a_psycopg_async_connection(self, engine, url, queue, pipeline):
        async def main() -> None:
            async with await psycopg.AsyncConnection.connect(psycopg_dsn(url)) as connection:
                async with connection.pipeline() if pipeline else nullcontext():
                    assert await queue.add_many(connection, "t", [1, 2, 3, 4, 5]) == 5
                with pytest.raises(InvalidData, match=r"^items\[2\]"):
                    async with connection.transaction():
                        await queue.add_many(connection, "t", [1, 2, {3}])

        asyncio.run(main())

        assert count(engine) == 5

    def test_a_scoped_session_and_a_core_connection(self, engine, queue):
        scoped = scoped_session(sessionmaker(engine))

        with inserts(engine) as statements:
            queue.add_many(scoped, "t", (1, 2, 3))
            scoped.commit()
            scoped.remove()
            with engine.begin() as connection, connection.begin_nested():
                queue.add_many(connection, "t", [4, 5, 6])

        assert len(statements) == 2
        assert count(engine) == 6

    @pytest.mark.parametrize("kind", ["session", "scoped session", "connection"])
    def test_asyncio(self, engine, url, queue, kind):
        async def main() -> int:
            async_engine = create_async_engine(url)
            kinds = {
                "session": lambda: AsyncSession(async_engine),
                "scoped session": lambda: aclosing(
                    async_scoped_session(async_sessionmaker(async_engine), asyncio.current_task)
                ),
                "connection": async_engine.connect,
            }
            async with kinds[kind]() as session:
                with inserts(async_engine.sync_engine) as statements:
                    assert await queue.add_many(session, "t", [1, 2, 3, 4, 5]) == 5
                with pytest.raises(InvalidData, match=r"^items\[2\]"):
                    async with session.begin_nested():
                        await queue.add_many(session, "t", [1, 2, {3}])
                await session.commit()
            await async_engine.dispose()
            return len(statements)

        assert asyncio.run(main()) == 1
        assert count(engine) == 5


class TestZopeTransactions:
    """zope.sqlalchemy commits only the sessions of which it has seen an ORM statement."""

    @pytest.mark.parametrize("many", [False, True])
    def test_a_session_that_does_nothing_else_is_committed(self, engine, queue, many):
        session = sessionmaker(engine)()
        zope.sqlalchemy.register(session)

        with transaction.manager:
            if many:
                queue.add_many(session, "t", [1])
            else:
                queue.add(session, "t")

        assert count(engine) == 1

    def test_an_aborted_transaction_leaves_none(self, engine, queue):
        session = sessionmaker(engine)()
        zope.sqlalchemy.register(session)

        queue.add(session, "t")
        transaction.abort()

        assert count(engine) == 0


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"])
def test_adding_works_at_any_isolation_level(url, queue, level):
    engine = sa.create_engine(url, isolation_level=level)

    with Session(engine) as session, session.begin():
        queue.add(session, "t")

    assert count(engine) == 1
    engine.dispose()


def test_a_statement_can_be_printed():
    assert "INSERT INTO jobs.apoq_tasks" in str(enqueue("jobs"))
    assert "INSERT INTO apoq_tasks" in str(
        enqueue_many(None).compile(dialect=sa.dialects.postgresql.dialect())
    )
