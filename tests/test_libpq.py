"""apoq's own statements, executed past the driver's cursors."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL

from apoq.postgres.connections import _IS_POOLED, execute, own_engine
from apoq.schema.statements.notify import Notification
from apoq.worker.claiming.listener import MAX_NOTIFICATIONS, ListeningConnection, Received


@pytest.fixture
def own(engine) -> Iterator[sa.Engine]:
    own = own_engine(engine)
    yield own
    own.dispose()


@pytest.fixture
def waker() -> Iterator[socket.socket]:
    receiver, sender = socket.socketpair()
    with receiver, sender:
        yield receiver


def echo(own, value, type_):
    """Answer what the server understands by a value, as the driver reads it."""
    ((found,),) = execute(
        own, sa.select(sa.cast(sa.bindparam("value", type_=sa.Text), type_)), {"value": value}
    )
    return found


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        ("", sa.Text()),
        ('it\'s "quoted", \\ and 💖\n', sa.Text()),
        (True, sa.Boolean()),
        (False, sa.Boolean()),
        (-(2**63), sa.BigInteger()),
        (math.inf, sa.Double()),
        (1 / 3, sa.Double()),
        (UUID(int=7), sa.Uuid()),
        (timedelta(days=-1, microseconds=1), INTERVAL()),
        (timedelta(days=400, hours=5, microseconds=999_999), INTERVAL()),
        (timedelta(), INTERVAL()),
        ([], ARRAY(sa.Text)),
        (["", "NULL", 'a "b", \\ {c}', "💖", " "], ARRAY(sa.Text)),
        (["a", None], ARRAY(sa.Text)),
        ([1.5, None, math.inf], ARRAY(sa.Double)),
        (None, sa.Text()),
    ],
)
def test_a_value_is_understood_as_it_was_meant(own, value, type_):
    assert echo(own, value, type_) == value


@pytest.mark.parametrize(("is_pooled", "shown"), [(False, "ISO"), (True, "German")])
def test_times_are_read_whatever_the_database_says_of_their_style(engine, own, is_pooled, shown):
    own.update_execution_options(**{_IS_POOLED: is_pooled})
    with engine.begin() as connection:
        name = connection.scalar(sa.select(sa.func.current_database()))
        for setting in ("DateStyle = German", "IntervalStyle = sql_standard", "TimeZone = 'Asia/Tokyo'"):
            connection.execute(sa.text(f"ALTER DATABASE {name} SET {setting}"))
    columns = ("timestamptz '2026-11-26 03:00:00.5+00'", "timestamptz '-infinity'", "timestamptz 'infinity'")
    statement = sa.select(
        *map(sa.literal_column, (*columns, "interval '-1 day +2 hours'", "current_setting('DateStyle')"))
    )

    ((time, first, last, span, style),) = execute(own, statement, {})

    assert style.startswith(shown)
    assert time == datetime(2026, 11, 26, 3, 0, 0, 500_000, UTC)
    assert (first.year, last.year) == (1, 9999)
    assert span == timedelta(hours=-22)


@pytest.mark.parametrize("value", ["a\0b", ["a\0b"]])
def test_a_value_that_would_be_cut_short_is_refused(own, value):
    with pytest.raises(psycopg.DataError, match="NUL"):
        echo(own, value, sa.Text())


def test_rows_are_answered_with_their_names(own):
    statement = sa.select(sa.literal_column("1").label("ä"), sa.literal_column("NULL").label("b"))

    answer = execute(own, statement, {})

    assert answer.rowcount == 1
    assert answer.fetchall() == [(1, None)]
    assert answer.mappings() == [{"ä": 1, "b": None}]


def test_what_the_server_refuses_is_psycopgs_error_and_the_connection_is_not_used_again(own):
    with pytest.raises(psycopg.errors.DivisionByZero) as caught:
        execute(own, sa.select(sa.literal_column("1 / 0")), {})

    assert caught.value.sqlstate == "22012"
    assert caught.value.diag.message_primary == "division by zero"
    assert own.pool.checkedin() == 1
    assert execute(own, sa.select(sa.literal_column("1")), {}).fetchall() == [(1,)]


def test_a_lost_connection_is_an_operational_error_each_time(engine, own, waker):
    statement = sa.select(sa.func.pg_backend_pid())
    with ListeningConnection(own, waker) as connection, engine.begin() as other:
        ((pid,),) = execute(connection.pooled, statement, {})
        assert other.scalar(sa.select(sa.func.pg_terminate_backend(pid, 5_000)))
        for _ in range(2):
            with pytest.raises(psycopg.OperationalError):
                execute(connection.pooled, statement, {})


def test_what_is_prepared_survives_a_rollback(own):
    names = sa.select(sa.func.count()).select_from(sa.text("pg_prepared_statements"))
    with own.connect() as connection:
        pooled = connection.connection
        ((before,),) = execute(pooled, names, {})
        for _ in range(10):
            connection.execute(sa.text("SELECT 1"))
            connection.rollback()
        assert execute(pooled, names, {}).fetchall() == [(before,)]


def test_what_is_prepared_is_named_by_what_it_says(own):
    """Where sessions are shared, the same name must not be another statement."""
    names = sa.select(sa.literal_column("name")).select_from(sa.text("pg_prepared_statements"))
    marked = sa.select(sa.literal_column(f"'{uuid4()}'"))
    (first,) = execute(own, names, {}).fetchall()
    execute(own, marked, {})

    assert first in execute(own, names, {}).fetchall()
    assert len(set(execute(own, names, {}))) == 2


def test_a_notification_that_comes_beside_an_answer_is_heard(own, waker):
    """The driver reads it together with the rows of the statement, and nothing is left to wait for."""
    with ListeningConnection(own, waker) as connection:
        ours = Notification("here", "ours")
        connection.listen(["here"], [ours, Notification("here", "")])
        execute(connection.pooled, sa.select(sa.func.pg_notify("here", "ours")), {})
        assert connection.wait(0.0) == Received(1, expected={ours}, cancelled=set(), is_all=True)
        connection.execute("NOTIFY {}", "here")
        assert connection.wait(0.0).expected
        execute(connection.pooled, sa.select(sa.func.pg_notify("here", "another's")), {})
        assert connection.wait(0.0) == Received(1, expected=set(), cancelled=set(), is_all=True)
        assert connection.wait(0.0).number == 0


def test_of_notifications_that_come_beside_an_answer_only_so_many_are_kept(own, waker):
    ids = sa.text("SELECT count(pg_notify('apoq_cancelled', id::text)) FROM generate_series(1, 5000) id")
    with ListeningConnection(own, waker) as connection:
        connection.listen(["apoq_cancelled"], [])
        execute(connection.pooled, ids, {})
        heard = connection.wait(0.0)

    assert heard.number == 5_000
    assert len(heard.cancelled) == MAX_NOTIFICATIONS
