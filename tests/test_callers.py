"""Sessions and connections that can't be used, or that are used in an unusual way."""

from __future__ import annotations

import asyncio
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock

import flask_sqlalchemy
import flask_sqlalchemy_lite
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import SAWarning
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    object_session,
    scoped_session,
    sessionmaker,
)

from apoq import Queue, Task, UnsupportedSession
from apoq.testing import assert_enqueued, drain, enqueued, freeze

queue = Queue()


@queue.task(type="send")
def send(user_id: int) -> None: ...


class Base(DeclarativeBase):
    pass


class Doc(Base):
    __tablename__ = "docs"
    id: Mapped[int] = mapped_column(primary_key=True)


def count(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(Task)) or 0


def add_once(
    session: Session, name: str, do: Callable[[Session], Any] = lambda session: queue.add(session, "t")
):
    called = []

    def add(*_: Any) -> None:
        if not called:
            called.append(True)
            do(session)

    sa.event.listen(session, name, add)


@pytest.fixture
def shards(engine, clones) -> Iterator[dict[str, sa.Engine]]:
    other = clones.take()
    shards = {"eu": engine, "us": sa.create_engine(other)}
    yield shards
    shards["us"].dispose()
    clones.give_back(other)


def choosers(shards: dict[str, Any]) -> dict[str, Any]:
    return {
        "shards": shards,
        "shard_chooser": lambda mapper, instance, clause=None: "eu",
        "identity_chooser": lambda mapper, key, **options: list(shards),
        "execute_chooser": lambda context: list(shards),
    }


VERBS: dict[str, Callable[[Any], Any]] = {
    "add": lambda session: queue.add(session, "t"),
    "add_many": lambda session: queue.add_many(session, "t", [{}] * 3_000),
    "cancel": lambda session: queue.cancel(session, 1),
    "retry": lambda session: queue.retry(session, 1),
    "a typed task": lambda session: send.add(session, 7),
    "many typed tasks": lambda session: send.add_many(session, [send.call(7)]),
    "enqueued": lambda session: enqueued(session, send),
    "assert_enqueued": lambda session: assert_enqueued(session, "t"),
    "drain": lambda session: drain(session, queue),
}


class TestShardedSessions:
    """SQLAlchemy executes a statement on each shard that its `execute_chooser` names."""

    @pytest.fixture
    def session(self, shards) -> Iterator[ShardedSession]:
        with ShardedSession(**choosers(shards)) as session:
            yield session

    @pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
    def test_one_is_refused_before_anything_is_sent(self, session, shards, verb):
        with pytest.raises(
            UnsupportedSession,
            match=r"pass the connection of one shard, .*'shard_id': .*Session\(engine_of_the_shard",
        ):
            verb(session)

        assert not session.in_transaction()
        session.commit()
        assert [count(engine) for engine in shards.values()] == [0, 0]

    def test_a_scoped_one_is_refused(self, session):
        with pytest.raises(UnsupportedSession, match="a ShardedSession, which has several databases"):
            queue.add(scoped_session(lambda: session), "t")

    def test_its_clock_can_not_be_frozen(self, session):
        with pytest.raises(UnsupportedSession, match="a ShardedSession"), freeze(session, datetime.now(UTC)):
            pass

    @pytest.mark.parametrize("scoped", [False, True])
    @pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
    def test_an_asyncio_one_is_refused(self, url, verb, scoped):
        async def main() -> None:
            engine = create_async_engine(url)
            make = async_sessionmaker(
                sync_session_class=ShardedSession, **choosers({"eu": engine.sync_engine})
            )
            session = make()
            given: Any = async_scoped_session(lambda: session, asyncio.current_task) if scoped else session
            with pytest.raises(UnsupportedSession, match="a ShardedSession"):
                await verb(given)
            assert not session.in_transaction()
            await engine.dispose()

        asyncio.run(main())

    def test_the_connection_of_a_shard_is_in_the_sessions_transaction(self, session, shards):
        connection = session.connection(bind_arguments={"shard_id": "us"})

        assert queue.add(connection, "t").id > 0
        assert queue.add_many(connection, "t", [{}] * 3_000) == 3_000

        assert [count(engine) for engine in shards.values()] == [0, 0]
        session.commit()
        assert [count(engine) for engine in shards.values()] == [0, 3_001]

    def test_a_session_on_the_engine_of_a_shard_is_fine(self, shards):
        with Session(shards["us"]) as session, session.begin():
            queue.add(session, "t")

        assert [count(engine) for engine in shards.values()] == [0, 1]


class TestEnginesOfASession:
    @pytest.mark.parametrize(
        ("made", "shown"),
        [
            (lambda engine: None, "NoneType"),
            (lambda engine: [engine, engine], "list"),
            (lambda engine: engine.url, r"sqlalchemy\.engine\.url\.URL"),
            (
                lambda engine: create_async_engine(engine.url),
                r"sqlalchemy\.ext\.asyncio\.engine\.AsyncEngine",
            ),
        ],
        ids=["None", "several", "URL", "AsyncEngine"],
    )
    @pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
    def test_what_is_not_one_engine_is_refused(self, shared_engine, verb, made, shown):
        class Routed(Session):
            def get_bind(self, *_: Any, **__: Any) -> Any:
                return made(shared_engine)

        with pytest.raises(
            UnsupportedSession, match=rf"must return one Engine or Connection .*Routed returned {shown}: pass"
        ) as raised:
            verb(Routed())
        assert "postgresql" not in str(raised.value)

    @pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
    def test_none_for_tasks_is_refused_with_what_to_bind(self, shared_engine, verb):
        session = Session(binds={Base: shared_engine})

        with pytest.raises(UnsupportedSession, match=r"add `Task` to its binds"):
            verb(session)
        assert not session.in_transaction()

    def test_an_asyncio_engine_wants_an_asyncio_session(self, url):
        with pytest.raises(UnsupportedSession, match=r"returned .*AsyncEngine: .* AsyncSession\(engine\)"):
            queue.add(Session(create_async_engine(url)), "t")  # type: ignore[arg-type]

    # SQLAlchemy closes the coroutine that it can't await, and Python tells of it.
    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
    def test_a_session_on_a_connection_of_an_asyncio_engine(self, url, engine):
        async def main() -> AsyncConnection:
            async_engine = create_async_engine(url)
            async with async_engine.begin() as connection:
                session = Session(connection.sync_connection, join_transaction_mode="create_savepoint")
                with pytest.raises(
                    UnsupportedSession, match="must be the AsyncSession or AsyncConnection itself"
                ):
                    queue.add(session, "t")
                await queue.add(AsyncSession(connection), "t")
            await async_engine.dispose()

        asyncio.run(main())

        assert count(engine) == 1

    def test_a_session_of_two_phases(self, engine):
        with Session(engine, twophase=True) as session:
            queue.add(session, "t")
            queue.add_many(session, "t", [{}] * 3_000)
            assert session.scalar(sa.select(sa.func.count()).select_from(Task)) == 3_001
            session.rollback()

        assert count(engine) == 0


class TestWhatIsNone:
    @pytest.mark.parametrize("mock", [Mock, MagicMock, AsyncMock])
    @pytest.mark.parametrize(
        "spec",
        [Session, scoped_session, sa.Connection, psycopg.Connection, AsyncSession, AsyncConnection, None],
    )
    def test_a_mock_is_refused_with_what_to_do_in_a_test(self, mock, spec):
        with pytest.raises(UnsupportedSession, match=r"session must not be a mock, .*pass a real one"):
            queue.add(mock(spec=spec), "t")

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (sessionmaker, r"orm\.session\.sessionmaker: call it, and pass the result"),
            (lambda engine: async_sessionmaker(), r"async_sessionmaker: call it"),
            (lambda engine: Session, r"the class sqlalchemy\.orm\.session\.Session: call it"),
            (
                lambda engine: engine,
                r"engine\.base\.Engine: begin a session: `with Session\(engine\) as session",
            ),
            (lambda engine: engine.begin(), "enter it with `with` or `async with`, and pass the result"),
            (lambda engine: flask_sqlalchemy.SQLAlchemy(), "pass its session, `db.session`"),
            (
                lambda engine: flask_sqlalchemy_lite.SQLAlchemy(),
                "pass its session, `db.session` or `db.async",
            ),
            (lambda engine: sqlite3.connect(":memory:"), r"sqlite3\.Connection: apoq needs PostgreSQL"),
            (lambda engine: type("connection", (), {"__module__": "psycopg2.extensions"})(), "psycopg 3"),
            (
                lambda engine: type("Pool", (), {"__module__": "asyncpg.pool"})(),
                "psycopg 3, also with asyncio",
            ),
            (
                lambda engine: "send",
                r"^the first argument must be .*: did you mean `queue\.add(_many)?\(session, 'send', ",
            ),
            (lambda engine: None, "NoneType: begin a session"),
        ],
        ids=[
            *["sessionmaker", "async_sessionmaker", "class", "engine", "begin", "db", "lite", "sqlite"],
            *["psycopg2", "asyncpg", "type", "None"],
        ],
    )
    def test_the_message_says_what_to_give_instead(self, engine, make, message):
        given = make(engine)

        with pytest.raises(UnsupportedSession, match=message):
            queue.add(given, "t")
        with pytest.raises(UnsupportedSession, match=message):
            queue.add_many(given, "t", [1])
        if not isinstance(given, str):
            with pytest.raises(UnsupportedSession, match=message):
                enqueued(given)

    @pytest.mark.parametrize("mock", [Mock, MagicMock, AsyncMock])
    def test_a_mock_has_nothing_enqueued(self, mock):
        with pytest.raises(UnsupportedSession, match="session must not be a mock"):
            enqueued(mock(spec=Session), "t")

    def test_its_module_is_named(self, engine):
        raw = engine.raw_connection()

        with pytest.raises(UnsupportedSession, match=r"got sqlalchemy\.pool\.base\._ConnectionFairy: "):
            queue.add(raw, "t")  # type: ignore[call-overload]
        raw.close()


class TestSeveralAtOnce:
    @pytest.mark.parametrize("kind", ["session", "scoped", "connection"])
    @pytest.mark.parametrize("begun", [False, True])
    def test_a_gather_on_one_asyncio_session_adds_one_by_one(self, url, engine, kind, begun):
        async def main() -> None:
            async_engine = create_async_engine(url)
            async with AsyncSession(async_engine) as session, session.begin():
                given: Any = session
                if begun or kind == "connection":
                    connection = await session.connection()
                if kind == "scoped":
                    given = async_scoped_session(lambda: session, asyncio.current_task)
                elif kind == "connection":
                    given = connection
                adding = [queue.add(given, "t", {"n": n}) for n in range(20)]
                cancelling = [queue.cancel(given, n) for n in range(5)]
                await asyncio.gather(*adding, send.add_many(given, [send.call(7)]), *cancelling)
            await async_engine.dispose()

        asyncio.run(main())

        assert count(engine) == 21


class TestEventsOfAFlush:
    @pytest.mark.parametrize("name", ["before_insert", "after_insert"])
    @pytest.mark.parametrize("through", ["connection", "session"])
    def test_a_task_may_be_added_in_one(self, engine, name, through):
        added = []

        def add(mapper: Any, connection: sa.Connection, doc: Doc) -> None:
            added.append(queue.add(connection if through == "connection" else object_session(doc), "index"))

        sa.event.listen(Doc, name, add)
        Base.metadata.create_all(engine)
        try:
            with warnings.catch_warnings(), Session(engine) as session:
                warnings.simplefilter("error", SAWarning)
                session.add(Doc())
                session.commit()
                assert added[0] not in session
        finally:
            sa.event.remove(Doc, name, add)

        assert count(engine) == 1

    @pytest.mark.parametrize("name", ["before_commit", "after_flush", "after_flush_postexec"])
    def test_a_task_that_is_added_before_the_commit_is_committed(self, engine, name):
        with Session(engine) as session:
            add_once(session, name)
            session.add(Task(type="t"))
            session.commit()

        assert count(engine) == 2

    @pytest.mark.parametrize("name", ["after_begin", "after_commit", "after_rollback"])
    @pytest.mark.parametrize("verb", ["add", "add_many", "cancel", "a typed task"])
    def test_while_its_transaction_begins_or_ends_a_session_adds_nothing(self, engine, name, verb):
        with Session(engine) as session:
            if name == "after_begin":  # SQLAlchemy 2.0 allows it
                pytest.importorskip("sqlalchemy", "2.1")
            add_once(session, name, VERBS[verb])
            with pytest.raises(UnsupportedSession, match="add it in before_commit or earlier, or"):
                _ = session.execute(sa.select(1)), session.rollback(), session.connection(), session.commit()

        assert count(engine) == 0

    def test_before_the_flush_the_task_is_in_the_session(self, engine):
        with Session(engine) as session:
            added = []
            sa.event.listen(session, "before_flush", lambda *_: added.append(queue.add(session, "index")))
            session.add(Task(type="t"))
            session.flush()
            assert added[0] in session
