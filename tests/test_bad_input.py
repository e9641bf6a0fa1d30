"""What can't be: refused with an error that says what to do, and with nothing written."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta, timezone

import probe
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import registry as dialects
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from apoq import (
    InvalidData,
    InvalidProcessor,
    InvalidTask,
    Queue,
    SchemaMismatch,
    Task,
    UnsupportedDatabase,
    UnsupportedSession,
    Worker,
    prepare,
)

PATIENCE = 10
"""Seconds for what a worker's threads do at once."""

LATER = datetime(2031, 5, 4, tzinfo=UTC)


def count(session: Session) -> int:
    return session.scalar(sa.select(sa.func.count()).select_from(Task))


@contextmanager
def refused(session: Session, error: type[Exception], match: str = "") -> Iterator[None]:
    """Expect an error, nothing written, and the caller's transaction as it was."""
    began = session.scalar(sa.select(sa.func.now()))
    with pytest.raises(error, match=match):
        yield
    assert session.scalar(sa.select(sa.func.now())) == began
    assert session.scalar(sa.text("SELECT pg_current_xact_id_if_assigned()")) is None
    assert not session.new


def psycopg_dsn(url: sa.URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


class TestTypes:
    @pytest.mark.parametrize(
        ("type_", "message"),
        [
            ("", "a task's type must not be empty"),
            ("x" * 256, "a task's type must have at most 255 characters, got 256"),
            (None, "a task's type must be a string, got None"),
            (7, "a task's type must be a string, got 7"),
            (["t"], "a task's type must be a string, got "),
            ("a\0", r"a task's type can't hold U\+0000"),
            ("\udc80", "a task's type can't hold a lone surrogate"),
        ],
        ids=["empty", "long", "None", "int", "list", "NUL", "surrogate"],
    )
    def test_one_that_is_none_is_refused(self, session, queue, type_, message):
        with refused(session, InvalidTask, message):
            queue.add(session, type_)
        with refused(session, InvalidTask, message):
            queue.add_many(session, type_, [1])
        with refused(session, InvalidTask, message):
            session.add(Task(type=type_))

    def test_the_longest_is_stored(self, session, queue):
        assert queue.add(session, "ü" * 255).type == "ü" * 255


ITSELF: list[object] = []
ITSELF.append(ITSELF)
DEEP: list[object] = []
for _ in range(300):
    DEEP = [DEEP]

BAD_DATA = {
    "NaN": (float("nan"), "JSON has no nan"),
    "infinity": (float("inf"), "JSON has no inf"),
    "NUL": ("\0", r"can't hold U\+0000"),
    "surrogate": ("\udc80", "can't hold a lone surrogate"),
    "NUL in a key": ({"\0": 1}, r"can't hold U\+0000"),
    "key": ({1: 1}, "a key of a JSON object must be a string, got 1"),
    "datetime": (LATER, "datetime is not JSON"),
    "bytes": (b"x", "bytes is not JSON"),
    "set": ({1}, "set is not JSON"),
    "object": (object(), "object is not JSON"),
    "itself": (ITSELF, "it contains itself"),
    "deep": (DEEP, "nested more than 200 levels deep"),
    "digits": (10**5000, "more digits"),
    "size": ("x" * 1024 * 1024, "exceed the limit of 1,048,576"),
}


@pytest.mark.parametrize(("value", "message"), BAD_DATA.values(), ids=BAD_DATA)
class TestData:
    def test_add_names_the_path(self, session, queue, value, message):
        with refused(session, InvalidData, rf"^data.*{message}"):
            queue.add(session, "t", {"x": value})

    def test_add_many_names_the_task_and_sends_none_of_its_batch(self, session, queue, value, message):
        items = [{"x": 1}] * 17 + [{"x": value}]

        with refused(session, InvalidData, rf"^items\[17\].*{message}"):
            queue.add_many(session, "t", items)

    def test_a_mapped_task_is_not_made(self, session, value, message):
        with refused(session, InvalidData, rf"^data.*{message}"):
            session.add(Task(type="t", data={"x": value}))

    def test_a_mapped_task_does_not_take_it_later(self, session, value, message):
        task = Task(type="t")

        with refused(session, InvalidData, message):
            task.data = value


def test_add_many_refuses_a_batch_whole_and_says_where(session, queue):
    with refused(session, InvalidData, r"^items\[17\]\['x'\]: set is not JSON"):
        queue.add_many(session, "t", [{"x": n if n != 17 else {n}} for n in range(40)])


@pytest.mark.parametrize("items", ["text", b"bytes", {"a": 1}])
def test_add_many_of_one_tasks_data_is_refused(session, queue, items):
    with refused(session, InvalidTask, "items must be the data of many tasks"):
        queue.add_many(session, "t", items)


def test_what_an_iterable_raises_is_the_callers(session, queue):
    def items():
        yield 1
        raise LookupError("mine")

    with refused(session, LookupError, "mine"):
        queue.add_many(session, "t", items())


def test_the_limit_of_data_is_the_queues(session):
    queue = Queue(max_data_size=10)

    assert queue.add(session, "t", "x" * 8).data == "x" * 8
    with pytest.raises(InvalidData, match=r"11 bytes of JSON exceed the limit of 10: .*Queue\(max_data_size"):
        queue.add(session, "t", "x" * 9)
    with pytest.raises(InvalidData, match=r"items\[1\]"):
        queue.add_many(session, "t", ["x", "x" * 9])
    assert count(session) == 1


def test_data_at_the_limit_is_stored(session, queue):
    data = "x" * (1024 * 1024 - 2)

    assert queue.add(session, "t", data).data == data


class NoRepr:
    """As an object whose repr needs a database that is closed by now."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


BAD_OPTIONS = {
    "naive process_at": (
        {"process_at": LATER.replace(tzinfo=None)},
        r"must have a time zone.*datetime\.now\(UTC\)",
    ),
    "naive datetime.max": ({"process_at": datetime.max}, "must have a time zone"),  # noqa: DTZ901
    "process_at as text": ({"process_at": "2031-05-04"}, "process_at must be a datetime, got '2031"),
    "process_at as a date": ({"process_at": LATER.date()}, "process_at must be a datetime"),
    "process_at as a number": ({"process_at": 0}, "process_at must be a datetime, got 0"),
    "negative delay": ({"delay": timedelta(seconds=-1)}, "delay must be between zero and a century"),
    "endless delay": ({"delay": timedelta.max}, "between zero and a century"),
    "delay as text": ({"delay": "30"}, "delay must be a number of seconds or a timedelta, got '30'"),
    "delay as a bool": ({"delay": True}, "delay must be a number of seconds or a timedelta, got True"),
    "both": ({"delay": timedelta(1), "process_at": LATER}, "can't both be given"),
    "negative retry_limit": ({"retry_limit": -1}, "retry_limit must be a whole number from 0"),
    "absurd retry_limit": ({"retry_limit": 2**31}, "retry_limit must be a whole number"),
    "retry_limit as text": ({"retry_limit": "5"}, "retry_limit must be a whole number"),
    "retry_limit as a bool": ({"retry_limit": True}, "retry_limit must be a whole number"),
    "retry_limit as a float": ({"retry_limit": 1.0}, "retry_limit must be a whole number"),
    "negative retry_delay": ({"retry_delay": -1}, "retry_delay must be between zero and a century, got -1"),
    "absurd retry_delay": ({"retry_delay": 1e300}, "retry_delay must be between"),
    "retry_delay is NaN": ({"retry_delay": float("nan")}, "retry_delay must be between"),
    "retry_delay as text": ({"retry_delay": "30"}, "retry_delay must be a number of seconds"),
    "retry_delay as a function": ({"retry_delay": lambda _: 30}, "retry_delay must be a number"),
    "negative timeout": ({"timeout": -1}, "timeout must be between zero and a century, got -1"),
    "no timeout at all": ({"timeout": 0}, "timeout must be positive, got 0; omit it"),
    "a timeout of less than PostgreSQL counts": ({"timeout": 1e-7}, "timeout must be positive"),
    "absurd timeout": ({"timeout": timedelta.max}, "timeout must be between"),
    "endless timeout": ({"timeout": float("inf")}, "timeout must be between"),
    "timeout is NaN": ({"timeout": float("nan")}, "timeout must be between"),
    "timeout as text": ({"timeout": "30"}, "timeout must be a number of seconds or a timedelta"),
    "timeout as a bool": ({"timeout": True}, "timeout must be a number of seconds"),
    "priority out of range": ({"priority": 2**15}, "priority must be a whole number from -32768 to 32767"),
    "priority below the range": ({"priority": -(2**15) - 1}, "priority must be a whole number"),
    "priority as a bool": ({"priority": True}, "priority must be a whole number"),
    "priority as a float": ({"priority": 1.5}, "priority must be a whole number"),
    "endless priority": (
        {"priority": 10**5000},
        "priority must be a whole number from -32768 to 32767, got <int>",
    ),
    "delay without a repr": ({"delay": NoRepr()}, "delay must be a number"),
    "retry_delay without a repr": ({"retry_delay": NoRepr()}, "retry_delay must be a number"),
    "no priority": ({"priority": None}, "priority must be a whole number"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_an_option_that_makes_no_sense_is_refused(session, queue, options, message):
    with refused(session, InvalidTask, message):
        queue.add(session, "t", **options)
    with refused(session, InvalidTask, message):
        queue.add_many(session, "t", [1], **options)


@pytest.mark.parametrize(
    "options", [{"priority": -(2**15)}, {"priority": 2**15 - 1}, {"retry_limit": 0}], ids=repr
)
def test_an_option_at_its_limit_is_stored(session, queue, options):
    task = queue.add(session, "t", **options)

    assert {name: getattr(task, name) for name in options} == options


@pytest.mark.parametrize("year", [2, 9998])
def test_a_moment_long_ago_or_far_away_is_stored(session, queue, year):
    process_at = datetime(year, 1, 1, tzinfo=UTC)

    assert queue.add(session, "t", process_at=process_at).process_at == process_at


@pytest.mark.parametrize("time_zone", ["Asia/Tokyo", "America/New_York"])
@pytest.mark.parametrize(
    "process_at",
    [
        datetime.max.replace(tzinfo=UTC),
        datetime.min.replace(tzinfo=UTC),
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-12))),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=12))),
    ],
    ids=["last", "first", "after the last", "before the first"],
)
def test_a_moment_at_the_end_of_the_calendar_is_refused(session, queue, process_at, time_zone):
    session.execute(sa.text(f"SET LOCAL TIME ZONE '{time_zone}'"))

    with refused(session, InvalidTask, "process_at"):
        queue.add(session, "t", process_at=process_at)
    with refused(session, InvalidTask, "process_at"):
        queue.add_many(session, "t", [1], process_at=process_at)


class TestNames:
    @pytest.mark.parametrize("what", ["queue", "schema"])
    @pytest.mark.parametrize(
        "name", ["", "x" * 256, 5, b"jobs", "a\0"], ids=["empty", "long", "int", "bytes", "NUL"]
    )
    def test_one_that_is_none_is_refused(self, what, name):
        with pytest.raises(InvalidTask, match=f"a {what}'s name "):
            Queue(**{"name" if what == "queue" else "schema": name})

    def test_a_queue_needs_a_name(self):
        with pytest.raises(InvalidTask, match="a queue's name must be a string, got None"):
            Queue(None)

    def test_a_schema_that_postgresql_would_cut_is_refused(self):
        with pytest.raises(InvalidTask, match="63 bytes"):
            Queue(schema="ü" * 32)

    @pytest.mark.parametrize("limit", ["1 MB", None, 0, -1, True], ids=repr)
    def test_a_limit_of_data_that_is_none_is_refused(self, limit):
        with pytest.raises(InvalidTask, match="max_data_size"):
            Queue(max_data_size=limit)


OTHER_DATABASES = [
    "postgresql+psycopg2",
    "postgresql+asyncpg",
    "postgresql+pg8000",
    "mysql+pymysql",
    "sqlite",
]


def engine_of(drivername: str) -> sa.Engine:
    """Make an engine of a dialect whose driver needn't be installed: it never connects."""
    if drivername == "sqlite":
        return sa.create_engine("sqlite://")
    engine = sa.create_engine("postgresql+psycopg://")
    engine.dialect = dialects.load(drivername.replace("+", "."))()
    return engine


class TestSessions:
    @pytest.mark.parametrize("drivername", OTHER_DATABASES)
    def test_one_on_another_database_or_driver_is_refused(self, queue, drivername):
        session = Session(engine_of(drivername))

        with pytest.raises(UnsupportedDatabase, match=r"got .*postgresql\+psycopg:// URL"):
            queue.add(session, "t")
        with pytest.raises(UnsupportedDatabase):
            queue.add_many(session, "t", [1])
        assert not session.in_transaction()

    def test_an_asyncio_session_on_another_driver_is_refused(self, queue):
        async def main() -> None:
            async with AsyncSession(AsyncEngine(engine_of("postgresql+asyncpg"))) as session:
                await queue.add(session, "t")

        with pytest.raises(UnsupportedDatabase, match=r"got postgresql\+asyncpg"):
            asyncio.run(main())

    def test_a_connection_to_another_database_is_refused(self, queue):
        engine = engine_of("sqlite")

        with engine.connect() as connection:
            with pytest.raises(UnsupportedDatabase, match=r"got sqlite\+pysqlite"):
                queue.add(connection, "t")
            assert not connection.in_transaction()
        engine.dispose()

    @pytest.mark.parametrize(
        "make",
        [
            lambda engine: engine,
            sessionmaker,
            lambda engine: async_sessionmaker(AsyncEngine(engine_of("postgresql+asyncpg"))),
            lambda engine: AsyncEngine(engine_of("postgresql+asyncpg")),
            lambda engine: Session,
            lambda engine: None,
            lambda engine: "postgresql://localhost",
            lambda engine: engine.raw_connection,
        ],
        ids=[
            "Engine",
            "sessionmaker",
            "async_sessionmaker",
            "AsyncEngine",
            "the class",
            "None",
            "URL",
            "method",
        ],
    )
    def test_what_is_none_is_refused_with_what_to_give(self, shared_engine, queue, make):
        with pytest.raises(
            UnsupportedSession, match=r"with Session\(engine\) as session, session\.begin\(\)"
        ):
            queue.add(make(shared_engine), "t")
        with pytest.raises(UnsupportedSession):
            queue.add_many(make(shared_engine), "t", [1])

    def test_one_without_an_engine_is_refused_with_what_to_bind(self, queue):
        with pytest.raises(UnsupportedSession, match=r"Session\(binds=\{apoq\.Task: engine"):
            queue.add(Session(), "t")

    def test_a_scoped_one_without_an_engine_is_refused(self, queue):
        with pytest.raises(UnsupportedSession, match="no engine for apoq's tables"):
            queue.add(scoped_session(sessionmaker()), "t")

    def test_one_that_binds_tasks_alone_is_fine(self, shared_engine, queue):
        with Session(binds={Task: shared_engine}) as session:
            assert queue.add(session, "t").id > 0
            session.rollback()

    # SQLAlchemy closes the coroutine that it can't await, and Python tells of it.
    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
    def test_the_synchronous_side_of_an_asyncio_one_is_refused(self, url, queue):
        session = AsyncSession(create_async_engine(url))

        with pytest.raises(
            UnsupportedSession, match=r"must be the AsyncSession or AsyncConnection itself.*await the result"
        ):
            queue.add(session.sync_session, "t")

    def test_bad_data_are_refused_before_there_is_anything_to_await(self, url, queue):
        session = AsyncSession(create_async_engine(url))

        with pytest.raises(InvalidData):
            queue.add(session, "t", float("nan"))

    def test_a_psycopg_transaction_is_usable_after_a_refusal(self, url, queue):
        with psycopg.connect(psycopg_dsn(url)) as connection:
            with pytest.raises(InvalidData):
                queue.add(connection, "t", {1})
            queue.add(connection, "t")

        with psycopg.connect(psycopg_dsn(url)) as connection:
            assert connection.execute("SELECT count(*) FROM apoq_tasks").fetchone() == (1,)

    def test_a_closed_psycopg_connection_is_its_own_error(self, url, queue):
        connection = psycopg.connect(psycopg_dsn(url))
        connection.close()

        with pytest.raises(psycopg.OperationalError, match="closed"):
            queue.add(connection, "t")

    def test_a_failed_transaction_is_its_own_error(self, session, queue):
        with pytest.raises(sa.exc.ProgrammingError):
            session.execute(sa.text("SELECT 1 FROM nowhere"))

        with pytest.raises(sa.exc.DBAPIError, match="current transaction is aborted"):
            queue.add(session, "t")


def add_through_session(url: sa.URL, queue: Queue) -> None:
    engine = sa.create_engine(url)
    try:
        with Session(engine) as session:
            queue.add(session, "t")
    finally:
        engine.dispose()


def add_many_through_session(url: sa.URL, queue: Queue) -> None:
    engine = sa.create_engine(url)
    try:
        with Session(engine) as session:
            queue.add_many(session, "t", [1])
    finally:
        engine.dispose()


def add_through_connection(url: sa.URL, queue: Queue) -> None:
    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            queue.add(connection, "t")
    finally:
        engine.dispose()


def add_through_psycopg(url: sa.URL, queue: Queue) -> None:
    with psycopg.connect(psycopg_dsn(url)) as connection:
        queue.add(connection, "t")


def add_through_async_session(url: sa.URL, queue: Queue) -> None:
    async def main() -> None:
        engine = create_async_engine(url)
        try:
            async with AsyncSession(engine) as session:
                await queue.add(session, "t")
        finally:
            await engine.dispose()

    asyncio.run(main())


def add_through_async_connection(url: sa.URL, queue: Queue) -> None:
    async def main() -> None:
        engine = create_async_engine(url)
        try:
            async with engine.connect() as connection:
                await queue.add(connection, "t")
        finally:
            await engine.dispose()

    asyncio.run(main())


def add_through_async_psycopg(url: sa.URL, queue: Queue) -> None:
    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(psycopg_dsn(url)) as connection:
            await queue.add(connection, "t")

    asyncio.run(main())


@pytest.mark.parametrize(
    "add",
    [
        add_through_session,
        add_many_through_session,
        add_through_connection,
        add_through_psycopg,
        add_through_async_session,
        add_through_async_connection,
        add_through_async_psycopg,
    ],
)
class TestWithoutTables:
    def test_adding_says_which_command_to_run(self, empty_url, queue, add):
        with pytest.raises(SchemaMismatch, match=r"`apoq\.prepare\(engine\)`, or `alembic upgrade head`"):
            add(empty_url, queue)

    def test_adding_to_the_originals_table_says_so_too(self, empty_url, queue, add):
        with psycopg.connect(psycopg_dsn(empty_url)) as connection:
            connection.execute(ORIGINAL)

        with pytest.raises(SchemaMismatch, match=r"`apoq\.prepare\(engine\)`"):
            add(empty_url, queue)

        with psycopg.connect(psycopg_dsn(empty_url)) as connection:
            assert connection.execute("SELECT count(*) FROM apoq_tasks").fetchone() == (0,)

    def test_the_message_names_the_schema_of_the_queue(self, url, add):
        with pytest.raises(SchemaMismatch, match=r"`apoq\.prepare\(engine, schema='jobs'\)`"):
            add(url, Queue(schema="jobs"))


ORIGINAL = """
CREATE TABLE apoq_tasks (
    id bigserial PRIMARY KEY,
    created_at timestamptz DEFAULT now(),
    process_at timestamptz DEFAULT now(),
    completed_at timestamptz,
    data jsonb DEFAULT '{}',
    type text,
    state text DEFAULT 'pending'
)
"""


def nothing(task) -> None:
    """Complete the task."""


class TestProcessors:
    @pytest.fixture
    def worker(self, shared_engine) -> Worker:
        """A worker that is not to work."""
        return Worker(shared_engine)

    def test_a_type_is_configured_once(self, worker):
        worker.use("t", nothing)

        with pytest.raises(InvalidProcessor, match=r"'t' has a processor already.*by `use` or `@queue.task`"):
            worker.use("t", print)

    @pytest.mark.parametrize("type_", ["", None, 5, "x" * 256], ids=["empty", "None", "int", "long"])
    def test_its_type_is_one_that_a_task_can_have(self, worker, type_):
        with pytest.raises(InvalidProcessor, match="a task's type "):
            worker.use(type_, nothing)

    @pytest.mark.parametrize("processor", [None, "send", 5, asyncio], ids=["None", "str", "int", "module"])
    def test_it_is_a_function(self, worker, processor):
        with pytest.raises(
            InvalidProcessor, match="the processor for 't' must be a function that takes the task, got "
        ):
            worker.use("t", processor)

    def test_it_is_no_generator_function_of_which_nothing_would_run(self, worker):
        def generator(task):
            yield

        async def async_generator(task):
            yield

        for processor in (generator, async_generator):
            with pytest.raises(
                InvalidProcessor, match=r"must not be a generator function.*remove its `yield`"
            ):
                worker.use("t", processor)

    def test_what_was_refused_is_not_configured(self, worker):
        with pytest.raises(InvalidProcessor):
            worker.use("t", nothing, retry_limit=-1)

        worker.use("t", nothing)

    @pytest.mark.parametrize("retry_limit", [-1, 1.5, "5", None, True], ids=repr)
    def test_a_retry_limit_is_a_number_of_retries(self, worker, retry_limit):
        with pytest.raises(
            InvalidProcessor, match="retry_limit must be a number of retries, 0 or more, got "
        ):
            worker.use("t", nothing, retry_limit=retry_limit)

    @pytest.mark.parametrize(
        "retry_delay",
        [-1, float("nan"), timedelta.max, "30", True, None, asyncio.sleep],
        ids=lambda value: getattr(value, "__name__", repr(value)),
    )
    def test_a_retry_delay_is_a_duration_or_a_function(self, worker, retry_delay):
        with pytest.raises(InvalidProcessor, match=r"^retry_delay must be "):
            worker.use("t", nothing, retry_delay=retry_delay)

    @pytest.mark.parametrize(
        "timeout", [-1, 0, 1e-7, timedelta(), timedelta.max, float("inf"), float("nan"), "30", True], ids=repr
    )
    def test_a_timeout_is_a_time_longer_than_nothing(self, worker, timeout):
        with pytest.raises(InvalidProcessor, match=r"^timeout must be "):
            worker.use("t", nothing, timeout=timeout)


class TestWorkers:
    @pytest.mark.parametrize(
        "make", [lambda engine: None, lambda engine: engine.url, Session, lambda engine: "postgresql://"]
    )
    def test_it_takes_an_engine(self, shared_engine, make):
        with pytest.raises(TypeError, match="engine must be an Engine or an AsyncEngine, got "):
            Worker(make(shared_engine))

    @pytest.mark.parametrize("drivername", OTHER_DATABASES)
    def test_it_works_on_postgresql_through_psycopg_alone(self, drivername):
        with pytest.raises(UnsupportedDatabase, match=r"got .*postgresql\+psycopg:// URL"):
            Worker(engine_of(drivername))

    @pytest.mark.parametrize(
        "other", ["emails", None, Queue, ["emails"]], ids=["str", "None", "class", "list"]
    )
    def test_after_the_engine_come_queues(self, shared_engine, other):
        with pytest.raises(TypeError, match=r"such as Queue\('emails'\), got "):
            Worker(shared_engine, Queue(), other)

    @pytest.mark.parametrize("concurrency", [0, -1, "4", True, 1.5, None], ids=repr)
    def test_concurrency_is_a_number_of_tasks(self, shared_engine, concurrency):
        with pytest.raises(ValueError, match="concurrency must be a number of tasks, 1 or more"):
            Worker(shared_engine, concurrency=concurrency)

    @pytest.mark.parametrize("option", ["poll_interval", "lease"])
    @pytest.mark.parametrize("value", [0, timedelta(), timedelta(-1), float("nan"), timedelta.max], ids=repr)
    def test_its_intervals_are_positive(self, shared_engine, option, value):
        with pytest.raises(ValueError, match=f"^{option} must be "):
            Worker(shared_engine, **{option: value})

    @pytest.mark.parametrize("act", ["start", "work"])
    @pytest.mark.parametrize("schema", [None, "jobs"])
    def test_without_tables_it_says_so_and_leaves_no_thread(self, empty_url, act, schema):
        engine = sa.create_engine(empty_url)
        worker = Worker(engine, Queue(schema=schema))
        worker.use("t", nothing)
        before = set(threading.enumerate())

        with pytest.raises(
            SchemaMismatch, match=r"apoq\.prepare\(engine" if schema is None else "schema='jobs'"
        ):
            getattr(worker, act)()

        left = set(threading.enumerate()) - before
        assert {thread.name for thread in left} <= {"apoq-watch", "apoq-exit"}  # all workers'
        worker.stop()
        engine.dispose()

    @pytest.mark.parametrize("act", ["start", "work"])
    def test_without_tables_it_leaves_no_connection(self, empty_url, act):
        engine = sa.create_engine(empty_url)
        worker = Worker(engine)
        with pytest.raises(SchemaMismatch):
            getattr(worker, act)()

        assert probe.own_engine(worker).pool.checkedin() == 0
        engine.dispose()

    def test_it_starts_once_the_tables_are_there(self, empty_url, queue):
        engine = sa.create_engine(empty_url)
        worker = Worker(engine)
        worker.use("t", nothing)
        with pytest.raises(SchemaMismatch):
            worker.work()

        prepare(engine)
        with Session(engine) as session, session.begin():
            queue.add(session, "t")

        assert worker.work().state == "completed"
        engine.dispose()


def added(engine: sa.Engine, type_: str = "t", **options) -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, type_, **options).id


def task_of(engine: sa.Engine, id_: int) -> Task:
    with Session(engine) as session:
        return session.get_one(Task, id_)


def ledger(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.text("SELECT count(*) FROM ledger"))


def worked_in_the_background(worker: Worker, engine: sa.Engine) -> None:
    """Start the worker, and see that it works another task."""
    done = threading.Event()
    worker.use("after", lambda task: done.set())
    added(engine, "after")
    worker.start()
    assert done.wait(PATIENCE)


def test_tasks_of_a_type_that_nobody_configured_wait_untouched_and_unmentioned(engine, worker, caplog):
    caplog.set_level(logging.DEBUG, "apoq")
    waiting = added(engine, "nobody's")

    worked_in_the_background(worker, engine)
    worker.stop()

    task = task_of(engine, waiting)
    assert (task.state, task.attempt, task.claim_token, task.fail_count) == ("pending", 0, 0, 0)
    assert "nobody's" not in caplog.text
    assert f"task {waiting}" not in caplog.text


@pytest.mark.parametrize("answer", [None, "soon", -1], ids=repr)
def test_a_retry_delay_of_nonsense_is_the_default_and_the_log_says_why(engine, worker, caplog, answer):
    worker.use("t", lambda task: 1 / 0, retry_delay=lambda fail_count: answer)
    added(engine)

    task = worker.work()

    assert (task.state, task.fail_count) == ("pending", 1)
    assert timedelta(seconds=0.9) < task.process_at - task.failed_at < timedelta(seconds=2.1)
    assert "using the default delay" in caplog.text


@pytest.mark.parametrize("error", [LookupError("mine"), SystemExit(3)], ids=repr)
def test_a_retry_delay_that_raises_is_the_default_and_the_log_says_why(engine, worker, caplog, error):
    def retry_delay(fail_count):
        raise error

    worker.use("t", lambda task: 1 / 0, retry_delay=retry_delay)
    added(engine)

    task = worker.work()

    assert (task.state, task.error["class"]) == ("pending", "ZeroDivisionError")
    assert type(error).__name__ in caplog.text


EXITS = [SystemExit(1), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]


@pytest.mark.parametrize("error", EXITS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["function", "coroutine function", "coroutine function with asyncio tasks"])
def test_what_would_end_a_program_fails_one_attempt_and_no_worker(engine, make_worker, error, kind):
    if kind == "coroutine function with asyncio tasks" and isinstance(error, GeneratorExit):
        pytest.skip("asyncio closes the coroutine that awaits the task")

    def function(task):
        raise error

    async def coroutine_function(task):
        raise error

    async def with_a_task_of_its_own(task):
        await asyncio.gather(coroutine_function(task), asyncio.sleep(0))

    functions = {"function": function, "coroutine function": coroutine_function}
    processor = functions.get(kind, with_a_task_of_its_own)
    worker = make_worker(concurrency=1)
    retried = threading.Event()
    worker.events.on("task.retried", lambda task, error: retried.set())
    worker.use("t", processor, retry_delay=lambda _: 3600)
    failing = added(engine)

    worked_in_the_background(worker, engine)

    assert retried.wait(PATIENCE)
    task = task_of(engine, failing)
    assert (task.state, task.fail_count, task.error["class"]) == ("pending", 1, type(error).__name__)


async def coroutine(task) -> None:
    """Do nothing, asynchronously."""


def test_a_plain_function_that_answers_a_coroutine_fails_with_what_to_do(engine, worker):
    worker.use("t", lambda task: coroutine(task))  # noqa: PLW0108 - plain, unlike what it calls
    added(engine)

    task = worker.work()

    assert (task.state, task.error["class"]) == ("pending", "InvalidProcessor")
    assert "make it `async def`" in task.error["message"]


@pytest.mark.parametrize("value", [5, [], NotImplemented], ids=repr)
def test_a_processor_that_answers_a_value_completes(engine, worker, value):
    worker.use("t", lambda task: value)
    added(engine)

    assert worker.work().state == "completed"


def test_a_coroutine_processor_that_raises_fails(engine, worker):
    async def processor(task):
        await asyncio.sleep(0)
        raise LookupError("no such colour")

    worker.use("t", processor, retry_limit=0)
    added(engine)

    task = worker.work()

    assert (task.state, task.error["class"], task.error["message"]) == (
        "failed",
        "LookupError",
        "no such colour",
    )


def test_a_processor_that_takes_no_task_fails(engine, worker):
    worker.use("t", lambda: None)
    added(engine)

    assert worker.work().error["class"] == "TypeError"


@pytest.mark.parametrize("raised", [ValueError("oops"), SystemExit(1)], ids=repr)
@pytest.mark.parametrize(("name", "limit"), [("task.completed", 0), ("task.retried", 1), ("task.failed", 0)])
def test_a_listener_that_raises_hurts_neither_the_task_nor_the_worker(
    engine, worker, caplog, name, limit, raised
):
    heard = threading.Event()

    def listener(*arguments):
        heard.set()
        raise raised

    def processor(task):
        if name != "task.completed":
            raise LookupError

    worker.events.on(name, listener)
    worker.use("t", processor, retry_limit=limit, retry_delay=lambda _: 3600)
    id_ = added(engine)
    worker.start()
    assert heard.wait(PATIENCE)

    worked_in_the_background(worker, engine)
    worker.stop()

    states = {"task.completed": "completed", "task.retried": "pending", "task.failed": "failed"}
    assert task_of(engine, id_).state == states[name]
    assert f"a listener of {name} raised" in caplog.text


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "error",
    [ValueError("a\0b"), ValueError("a\udc80b"), ValueError("x" * 50_000_000), Wordless()],
    ids=["NUL", "surrogate", "50 MB", "no text"],
)
@pytest.mark.parametrize(("limit", "state"), [(0, "failed"), (1, "pending")])
def test_an_error_that_could_not_be_stored_is_stored_bounded(engine, worker, error, limit, state):
    def processor(task):
        raise error

    worker.use("t", processor, retry_limit=limit)
    added(engine)

    task = worker.work()

    assert (task.state, task.error["class"]) == (state, type(error).__name__)
    assert 0 < len(task.error["message"]) < 5_000
    assert 0 < len(task.error["traceback"]) < 20_000


INSERT = sa.text("INSERT INTO ledger VALUES (1)")


def commit(task):
    task.session.execute(INSERT)
    task.session.commit()


def commit_untouched(task):
    task.session.commit()


def begin_block(task):
    with task.session.begin():
        task.session.execute(INSERT)


async def async_commit(task):
    await task.session.execute(INSERT)
    await task.session.commit()


async def async_begin_block(task):
    async with task.session.begin():
        await task.session.execute(INSERT)


@pytest.mark.parametrize(
    "processor", [commit, commit_untouched, begin_block, async_commit, async_begin_block]
)
def test_a_processor_that_commits_its_session_fails_and_writes_nothing(engine, worker, processor):
    worker.use("t", processor)
    added(engine)

    task = worker.work()

    assert (task.state, task.error["class"]) == ("pending", "SessionMisused")
    assert "remove the commit" in task.error["message"]
    assert ledger(engine) == 0


def with_block(task):
    with task.session:
        task.session.execute(INSERT)


async def async_with_block(task):
    async with task.session as session:
        await session.execute(INSERT)


def rolled_back_and_written_again(task):
    task.session.execute(INSERT)
    task.session.rollback()
    task.session.execute(INSERT)


@pytest.mark.parametrize("processor", [with_block, async_with_block, rolled_back_and_written_again])
def test_a_processor_may_use_its_session_in_other_ways(engine, worker, processor):
    worker.use("t", processor)
    added(engine)

    assert worker.work().state == "completed"
    assert ledger(engine) == 1


def write_twice(task):
    task.session.execute(INSERT)
    task.session.execute(INSERT)


async def async_write_twice(task):
    await task.session.execute(INSERT)
    await task.session.execute(INSERT)


@pytest.mark.parametrize("processor", [write_twice, async_write_twice])
def test_a_constraint_that_is_violated_at_the_commit_fails_the_attempt(engine, worker, processor):
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE ledger ADD UNIQUE (task_id) DEFERRABLE INITIALLY DEFERRED")
    worker.use("t", processor)
    added(engine)

    task = worker.work()

    assert (task.state, task.fail_count, task.error["class"]) == ("pending", 1, "IntegrityError")
    assert "duplicate key" in task.error["message"]
    assert (task.completed_at, ledger(engine)) == (None, 0)


ODD_ROWS = {
    "retry_limit below zero": "(retry_limit) VALUES (-1)",
    "retry_delay below zero": "(retry_delay) VALUES ('-1 hour')",
    "endless retry_delay": "(retry_delay) VALUES ('178000000 years')",
    "timeout below zero": "(timeout) VALUES ('-1 hour')",
    "endless timeout": "(timeout) VALUES ('178000000 years')",
    "no type": "(type) VALUES ('')",
    "attempts beyond counting": "(attempt) VALUES (2147483647)",
    "failures beyond counting": "(fail_count) VALUES (2147483647)",
    "due never": "(process_at) VALUES ('infinity')",
    "due after Python's last year": "(process_at) VALUES ('20000-01-01')",
}
ODDER_ROWS = {
    "due for ever": "(process_at) VALUES ('-infinity')",
    "due before Python's first year": "(process_at) VALUES ('0044-03-15 BC')",
    "made after Python's last year": "(created_at) VALUES ('infinity')",
    "nested deeper than Python reads": "(data) VALUES ((repeat('[', 3000) || repeat(']', 3000))::jsonb)",
    "a number longer than Python reads": "(data) VALUES (repeat('9', 5000)::jsonb)",
}


def insert(engine: sa.Engine, row: str) -> None:
    """Write a row as another program may, past all that this library checks."""
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE apoq_tasks ALTER type SET DEFAULT 't'")
        connection.exec_driver_sql(f"INSERT INTO apoq_tasks {row}")


@pytest.mark.parametrize("row", ODD_ROWS.values(), ids=ODD_ROWS)
def test_an_odd_row_stops_no_worker(engine, worker, row):
    worker.use("t", nothing)
    insert(engine, row)

    worked_in_the_background(worker, engine)


@pytest.mark.parametrize("row", ODDER_ROWS.values(), ids=ODDER_ROWS)
def test_a_row_that_python_cannot_read_stops_no_worker(engine, worker, row):
    worker.use("t", nothing)
    worker.use("after", nothing)
    insert(engine, row)
    after = added(engine, "after")

    for _ in range(3):
        with suppress(Exception):  # one turn fails, and the next may do better
            worker.work()

    assert task_of(engine, after).state == "completed"
