"""Looking at tasks: a transaction that reads, and not for long."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any, Final

import psycopg
import sqlalchemy as sa
import sqlalchemy.exc

from apoq.cli.exits import Failure
from apoq.cli.target import Target
from apoq.migrations import check
from apoq.postgres.loaders import read_anything

READ_TIMEOUT_SECONDS: Final = 15
"""Seconds after which the server ends a statement that only looks: it would keep it from its work."""

SETTINGS: Final = f"""
    SET TRANSACTION READ ONLY;
    SET LOCAL statement_timeout = '{READ_TIMEOUT_SECONDS}s';
    SET LOCAL enable_seqscan = off;
    SET LOCAL enable_bitmapscan = off;
    SET LOCAL jit = off
"""
# By index only: else the planner, for a bounded number of rows, walks through a table to find them.
# Nothing is compiled, as before PostgreSQL 18 is whatever holds a scan that is off and yet unavoidable.


@contextmanager
def looking(target: Target) -> Iterator[sa.Connection]:
    """Open a transaction that reads, whatever other programs may have written into the tables."""
    with target.begin(prepared=False) as connection:
        read_anything(connection.connection.driver_connection)  # type: ignore[arg-type]
        connection.exec_driver_sql(SETTINGS)
        check(connection, target.schema)
        try:
            yield connection
        except sqlalchemy.exc.OperationalError as error:
            if isinstance(error.orig, psycopg.errors.QueryCanceled):
                raise Failure(
                    f"that took longer than {READ_TIMEOUT_SECONDS} s, and was given up: ask for less, "
                    "such as one --queue"
                ) from error
            raise


def task_json(row: sa.RowMapping) -> dict[str, Any]:
    """Make what programs get of a task of its row, in which data is text."""
    known = {name: value for name, value in row.items() if name != "now"}
    try:
        return known | {"data": json.loads(row["data"], parse_float=_finite)}
    except (ValueError, RecursionError):
        return known  # what Python can't read stays text


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{text} is beyond Python's floats")
    return number


def missing(task_id: int) -> str:
    """Say that there is no such task."""
    return f"there is no task {task_id}: it was never added here, or it has ended and was pruned"
