"""Whatever stands in a row, reading it raises nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import Task
from apoq.postgres.connections import _IS_POOLED, execute, own_engine
from apoq.postgres.loaders import read_anything

INTERVALS = {
    "5000000 years": timedelta.max,
    "178000000 years": timedelta.max,
    "-178000000 years": timedelta.min,
    "-5000000 years": timedelta.min,
    "2147483647 days": timedelta.max,
    "-2147483648 days": timedelta.min,
    "5000000 years -5 days -1 hour": timedelta.max,
    "-5000000 years 5 days": timedelta.min,
    "1 day": timedelta(days=1),
    "-1 year 2 mons -3 days +04:05:06.789": timedelta(
        days=-10 * 30 - 3, hours=4, minutes=5, seconds=6, microseconds=789_000
    ),
    "00:00:00": timedelta(0),
}


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(("text", "expected"), INTERVALS.items(), ids=INTERVALS)
def test_an_interval_that_python_can_not_hold_is_its_longest(engine, text, expected, binary):
    with engine.connect() as connection:
        cursor = connection.connection.driver_connection.cursor(binary=binary)
        read_anything(cursor)
        assert cursor.execute(f"SELECT interval '{text}'").fetchone() == (expected,)
        cursor.close()


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(("text", "expected"), [("infinity", timedelta.max), ("-infinity", timedelta.min)])
def test_an_endless_interval_is_pythons_longest(engine, text, expected, binary):
    with engine.connect() as connection:
        if connection.dialect.server_version_info < (17,):
            pytest.skip("before PostgreSQL 17 there is none")
        cursor = connection.connection.driver_connection.cursor(binary=binary)
        read_anything(cursor)
        assert cursor.execute(f"SELECT interval '{text}'").fetchone() == (expected,)
        cursor.close()


ODD = {
    "an endless retry_delay": "retry_delay = '5000000 years'",
    "a negative retry_delay": "retry_delay = '-178000000 years'",
    "an endless timeout": "timeout = '178000000 years'",
    "the first time there is": "process_at = '4714-11-24 00:00:00+00 BC'",
    "before all time": "process_at = '-infinity', created_at = 'infinity'",
    "the most failures": "fail_count = 2147483647, attempt = 2147483647, rescue_count = 2147483647",
    "the least failures": "fail_count = -2147483648, attempt = -2147483648, rescue_count = -2147483648",
    "a number of many digits": "data = ('1' || repeat('0', 100000))::jsonb",
    "a fraction of many digits": "data = ('0.' || repeat('0', 16000) || '1')::jsonb",
    "deep data": "data = (repeat('[', 5000) || repeat(']', 5000))::jsonb",
    "an odd error": "error = '[[1]]'",
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("format_", ["binary", "text"])
@pytest.mark.parametrize("is_pooled", [False, True], ids=["direct", "through a pooler"])
def test_any_row_is_read(engine, odd, format_, is_pooled):
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO apoq_tasks (type) VALUES ('t')")
        connection.exec_driver_sql(f"UPDATE apoq_tasks SET {odd}")
    own = own_engine(engine)
    own.update_execution_options(**{_IS_POOLED: is_pooled})

    if format_ == "binary":
        assert len(execute(own, sa.select(Task.__table__), {}).mappings()) == 1
    else:
        with Session(own) as session:
            assert session.scalars(sa.select(Task)).one().type == "t"
    own.dispose()


def test_any_row_of_a_worker_is_read(engine):
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO apoq_workers "
            "(id, host, pid, version, queues, concurrency, started_at, last_heartbeat_at, expires_at, grace) "
            "VALUES (gen_random_uuid(), '', -1, '', '{{a,NULL},{\"\",b}}', -1, 'infinity', '-infinity', "
            "'infinity', '-178000000 years')"
        )
        connection.exec_driver_sql(
            "INSERT INTO apoq_claims (worker_id, number, task_ids) "
            "VALUES (gen_random_uuid(), -1, '{{1,NULL},{2,3}}'), (gen_random_uuid(), -1, '{}')"
        )
    own = own_engine(engine)

    ((queues, started_at, last_heartbeat_at),) = execute(
        own, sa.text("SELECT queues, started_at, last_heartbeat_at FROM apoq_workers"), {}
    )
    assert queues == [["a", None], ["", "b"]]
    assert (started_at, last_heartbeat_at) == (
        datetime.max.replace(tzinfo=UTC),
        datetime.min.replace(tzinfo=UTC),
    )
    assert len(execute(own, sa.text("SELECT * FROM apoq_claims"), {}).fetchall()) == 2
    own.dispose()


@pytest.mark.parametrize("style", ["sql_standard", "postgres_verbose", "iso_8601"])
def test_a_worker_reads_intervals_whatever_the_database_says_of_their_style(engine, queue, worker, style):
    with engine.begin() as connection:
        name = connection.scalar(sa.select(sa.func.current_database()))
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET IntervalStyle = {style}")
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET DateStyle = German")
    worker.use("t", lambda task: None)
    with engine.begin() as connection:
        queue.add(connection, "t", timeout=timedelta(days=400, hours=5))

    found = worker.work()

    assert found is not None
    assert found.timeout == timedelta(days=400, hours=5)


@pytest.mark.parametrize("fails", [False, True])
def test_a_task_with_the_most_failures_is_settled(engine, worker, fails):
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO apoq_tasks (type, fail_count, retry_limit) VALUES ('t', 2147483647, 2147483647)"
        )

    def process(task) -> None:
        if fails:
            raise ValueError

    worker.use("t", process, retry_delay=lambda fail_count: 60)

    found = worker.work()

    assert found is not None
    assert (found.state, found.fail_count) == ("pending" if fails else "completed", 2147483647)
