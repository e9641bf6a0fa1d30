"""The time of a transaction of `task.session`, compared with that of a plain loop.

The worker's transaction has one more statement, the completion. To measure its cost, and how much of that is
the round trip, this times transactions that differ only in that statement, alternating, on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import psycopg
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from apoq import database_url, prepare
from apoq.embedded import PostgreSQL
from apoq.postgres import fast_path
from apoq.postgres.connections import compiled
from apoq.schema.statements.settle import complete_last

ROUNDS = 20
TRANSACTIONS = 50
"""Number of transactions of each kind in each round."""

INSERT = sa.text("INSERT INTO effects (n) VALUES (:n)")
RUNNING = """
    INSERT INTO apoq_tasks (type, state)
    SELECT 'bench', 'running' FROM generate_series(1, {})
"""

BARE = sa.table(
    "bare", sa.column("id", sa.BigInteger), sa.column("token", sa.BigInteger), sa.column("state", sa.Text)
)
"""A table with a primary key and nothing else."""

Do = Callable[[sa.Connection, dict[str, int]], Any]


def _driver(connection: sa.Connection) -> psycopg.Connection[Any]:
    return cast("psycopg.Connection[Any]", connection.connection.dbapi_connection)


def kinds() -> dict[str, Do]:
    """Return the kinds of statements between the insert and the commit."""
    statement = complete_last(None)
    text, _ = compiled(statement)
    of_bare = (
        sa.update(BARE)
        .where(BARE.c.id == sa.bindparam("task_id"), BARE.c.token == sa.bindparam("held_under"))
        .values(state="completed")
    )
    prepared: set[bytes] = set()
    return {
        "a plain loop": lambda _connection, _task: None,
        "+ SELECT 1, through libpq": lambda connection, _task: _driver(connection).pgconn.exec_(b"SELECT 1"),
        "+ minimal update, through libpq": lambda connection, task: fast_path.execute(
            _driver(connection), of_bare, task, prepared=prepared
        ),
        "+ completion, libpq, prepared": lambda connection, task: fast_path.execute(
            _driver(connection), statement, task, prepared=prepared
        ),
        "+ … not prepared": lambda connection, task: fast_path.execute(
            _driver(connection), statement, task, prepared=None
        ),
        "+ … through psycopg's cursor": lambda connection, task: _driver(connection).execute(text, task),
        "+ … through SQLAlchemy, as a worker": lambda connection, task: connection.exec_driver_sql(
            text, task
        ),
    }


def show() -> None:
    """Time all kinds, alternating, and print the medians."""
    found: dict[str, list[float]] = {name: [] for name in kinds()}
    with PostgreSQL() as server:
        engine = sa.create_engine(database_url(make_url(server.url)))
        prepare(engine)
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE effects (n bigint NOT NULL)")
            connection.exec_driver_sql("CREATE TABLE bare (id bigint PRIMARY KEY, token bigint, state text)")
            count = len(found) * ROUNDS * TRANSACTIONS
            connection.exec_driver_sql(RUNNING.format(count))
            connection.exec_driver_sql(
                f"INSERT INTO bare SELECT n, 0, 'running' FROM generate_series(1, {count}) n"
            )
        ids = iter(range(1, count + 1))
        todo = kinds()
        for _ in range(ROUNDS):
            for name, do in todo.items():
                for _ in range(TRANSACTIONS):
                    task = {"task_id": next(ids), "held_under": 0}
                    began = time.perf_counter()
                    with Session(engine) as session:
                        session.execute(INSERT, {"n": 1})
                        do(session.connection(), task)
                        session.commit()
                    found[name].append((time.perf_counter() - began) * 1e6)
        engine.dispose()
    plain = statistics.median(found["a plain loop"])
    print(f"{'sessions: µs per transaction':36}{'median':>15}{'plain / this':>14}")
    for name, times in found.items():
        median = statistics.median(times)
        print(f"{name:36}{median:15.0f}{plain / median:14.2f}")
