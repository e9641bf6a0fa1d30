"""apoq's own connections."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator

import probe
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from apoq.postgres.connections import _IS_POOLED, execute, own_engine


def test_its_own_engine_needs_nothing_of_the_callers_pool(url):
    engine = sa.create_engine(url, pool_size=1, max_overflow=0, pool_timeout=1)
    own = own_engine(engine)

    with engine.connect(), own.connect() as first, own.connect() as second:
        pids = {connection.scalar(sa.text("SELECT pg_backend_pid()")) for connection in (first, second)}

    assert len(pids) == 2
    own.dispose()
    engine.dispose()


@pytest.fixture
def own(url) -> Iterator[sa.Engine]:
    engine = own_engine(sa.create_engine(url, poolclass=sa.NullPool))
    yield engine
    engine.dispose()


def answer(rows):
    ((value,),) = rows
    return value


def ask(engine, statement, **parameters):
    return answer(execute(engine, sa.text(statement), parameters))


PREPARED = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '% + 1%'"


def test_straight_to_the_server_it_prepares_its_statements(own):
    plus_one = sa.text("SELECT CAST(:n AS int) + 1")

    assert [answer(execute(own, plus_one, {"n": n})) for n in range(20)] == list(range(1, 21))
    assert ask(own, PREPARED) == 2  # and this question


def test_the_server_compiles_nothing_for_it(own):
    assert ask(own, "SHOW jit") == "off"


def test_through_a_pooler_it_relies_on_nothing_that_a_session_keeps(own):
    own.update_execution_options(**{_IS_POOLED: True})

    plus_one = sa.text("SELECT CAST(:n AS int) + 1")
    assert [answer(execute(own, plus_one, {"n": n})) for n in range(20)] == list(range(1, 21))
    assert ask(own, PREPARED) == 0
    assert ask(own, "SELECT setting FROM pg_settings WHERE name = 'statement_timeout'") == "60000"
    with contextlib.closing(own.raw_connection()) as pooled:
        assert pooled.driver_connection.execute("SHOW statement_timeout").fetchone() == ("0",)


@pytest.mark.parametrize(
    ("next_session", "question", "error"),
    [
        ("DEALLOCATE ALL", "SELECT 1", psycopg.errors.InvalidSqlStatementName),
        ("PREPARE {name} AS SELECT 2", "SELECT 2", psycopg.errors.DuplicatePreparedStatement),
    ],
)
def test_a_pooler_that_hides_itself_is_found_out(own, next_session, question, error):
    """By a prepared statement that is lost, or there already: one fails, and the next ones do without."""
    assert ask(own, "SELECT 1") == 1
    taken = next_session.format(name=probe.statement_name(sa.text(question)).decode())
    with contextlib.closing(own.raw_connection()) as pooled:
        pooled.driver_connection.pgconn.exec_(taken.encode())  # as if another had been given

    with pytest.raises(error):
        ask(own, question)
    assert ask(own, "SELECT 1") == 1
    assert ask(own, "SELECT count(*) FROM pg_prepared_statements") == 0


def test_a_statement_that_fails_leaves_no_broken_connection_behind(own):
    for _ in range(20):
        with pytest.raises(psycopg.errors.DivisionByZero):
            ask(own, "SELECT 1 / 0")
    assert ask(own, "SELECT 1") == 1
    assert own.pool.checkedout() == 0


def test_where_one_of_its_connections_has_died_none_of_the_others_is_used_again(engine, own):
    with contextlib.closing(own.raw_connection()), contextlib.closing(own.raw_connection()):
        pass  # now there are two
    with engine.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    with pytest.raises(psycopg.OperationalError):
        ask(own, "SELECT 1")
    # Both at once, for the one that has failed is made anew in any case.
    with contextlib.closing(own.raw_connection()) as one, contextlib.closing(own.raw_connection()) as other:
        for pooled in (one, other):
            assert pooled.driver_connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("is_pooled", [False, True], ids=["direct", "through a pooler"])
def test_it_is_at_read_committed_whatever_the_database_says(url, own, is_pooled):
    own.update_execution_options(**{_IS_POOLED: is_pooled})
    with sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool).connect() as connection:
        name = sa.make_url(url).database
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_isolation = serializable")

    assert ask(own, "SHOW transaction_isolation") == "read committed"
    with own.begin() as connection:
        assert connection.scalar(sa.text("SHOW transaction_isolation")) == "read committed"


def test_its_own_engine_connects_as_the_callers_does(url):
    """With the same arguments and events, as where a token is fetched for each connection."""
    engine = sa.create_engine(url, connect_args={"application_name": "mine"})
    connected = []

    @sa.event.listens_for(engine, "do_connect")
    def connect(_dialect, _record, _arguments, parameters) -> None:
        connected.append(parameters["application_name"])

    own = own_engine(engine)
    with own.connect() as connection:
        name = connection.scalar(sa.text("SHOW application_name"))

    assert (name, connected) == ("mine", ["mine"])
    own.dispose()
    engine.dispose()


def test_an_asyncio_engine_has_a_twin_for_threads(url):
    own = own_engine(create_async_engine(url).sync_engine)

    with own.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    own.dispose()


@pytest.mark.parametrize("is_pooled", [False, True], ids=["direct", "through a pooler"])
def test_it_waits_for_a_lock_no_longer_than_it_was_told(engine, is_pooled):
    own = own_engine(engine, lock_timeout="123ms")
    own.update_execution_options(**{_IS_POOLED: is_pooled})

    assert ask(own, "SHOW lock_timeout") == "123ms"
    with own.begin() as connection:
        assert connection.scalar(sa.text("SHOW lock_timeout")) == "123ms"
    with engine.connect() as holding:
        holding.execute(sa.text("LOCK apoq_tasks"))
        with pytest.raises(psycopg.errors.LockNotAvailable):
            ask(own, "SELECT count(*) FROM apoq_tasks")
    own.dispose()


@pytest.mark.parametrize("create", [sa.create_engine, create_async_engine])
def test_an_engine_that_the_caller_drops_is_not_kept_by_apoqs_own(url, create):
    engine = create(url)
    side = getattr(engine, "sync_engine", engine)
    sa.event.listen(side, "connect", lambda connection, record: None)
    own = own_engine(side)
    assert ask(own, "SELECT 1") == 1
    dropped = weakref.ref(side)

    del engine, side
    gc.collect()

    assert dropped() is None
    assert ask(own, "SELECT 1") == 1
    own.dispose()
