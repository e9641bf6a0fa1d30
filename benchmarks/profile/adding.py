"""Compares COPY with INSERT for many tasks: `add_many` uses COPY, or INSERT if the role can't use COPY."""

from __future__ import annotations

import statistics
import time
from unittest import mock

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from apoq import Queue, database_url, prepare
from apoq.client import operations
from apoq.embedded import PostgreSQL

TASKS = 50_000
RUNS = 7


def measure(engine: sa.Engine) -> float:
    """Return the tasks per second that one call adds."""
    with engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE apoq_tasks")
    documents = [{"n": n, "padding": "x" * 80} for n in range(TASKS)]
    began = time.monotonic()
    with Session(engine) as session:
        Queue().add_many(session, "bench", documents)
        session.commit()
    return TASKS / (time.monotonic() - began)


def show() -> None:
    """Measure both several times, alternating, and print the medians."""
    found: dict[str, list[float]] = {"COPY": [], "INSERT": []}
    with PostgreSQL() as server:
        engine = sa.create_engine(database_url(make_url(server.url)))
        prepare(engine)
        for _ in range(RUNS):
            found["COPY"].append(measure(engine))
            with mock.patch.object(operations, "_copy", return_value=False):
                found["INSERT"].append(measure(engine))
        engine.dispose()
    print(f"{'adding: tasks per second, one call of add_many':50}{'median':>10}{'min':>10}{'max':>10}")
    for name, rates in found.items():
        print(f"{name:50}{statistics.median(rates):10,.0f}{min(rates):10,.0f}{max(rates):10,.0f}")
