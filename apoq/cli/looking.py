"""Read-only transactions for commands that show something."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from typing import Any, Final

import psycopg
import sqlalchemy as sa
import sqlalchemy.exc

from apoq.cli.exits import Failure
from apoq.cli.target import Target
from apoq.migrations import check
from apoq.postgres.loaders import read_anything
from apoq.schema.statements.find import LARGE

READ_TIMEOUT_SECONDS: Final = 15
"""Seconds after which the server cancels a statement, so that it doesn't disturb the workers."""

SETTINGS: Final = f"""
    SET TRANSACTION READ ONLY;
    SET LOCAL statement_timeout = '{READ_TIMEOUT_SECONDS}s';
    SET LOCAL enable_seqscan = off;
    SET LOCAL enable_bitmapscan = off;
    SET LOCAL jit = off
"""
# Indexes only: otherwise, the planner reads a whole table to find a bounded number of rows.
# No JIT: before PostgreSQL 18, it would compile every plan with a disabled scan that can't be avoided.


@contextmanager
def looking(target: Target) -> Iterator[sa.Connection]:
    """Open a read-only transaction that can read any value, also one from another program."""
    with target.begin(prepared=False) as connection:
        read_anything(connection.connection.driver_connection)  # type: ignore[arg-type]
        connection.exec_driver_sql(SETTINGS)
        check(connection, target.schema)
        try:
            yield connection
        except sqlalchemy.exc.OperationalError as error:
            if isinstance(error.orig, psycopg.errors.QueryCanceled):
                raise Failure(
                    f"the query took longer than {READ_TIMEOUT_SECONDS} s and was cancelled: restrict it, "
                    "for example by --queue"
                ) from error
            raise


def task_json(row: sa.RowMapping) -> dict[str, Any]:
    """Return what ``--json`` prints of a task's row, in which the data and the result are text."""
    known = {name: value for name, value in row.items() if name != "now"}
    for name in LARGE:
        if row.get(name) is not None:
            with suppress(ValueError, RecursionError):  # Python can't read it
                known[name] = json.loads(row[name], parse_float=_finite)
    return known


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{text} is beyond Python's floats")
    return number


def missing(task_id: int) -> str:
    """Return a message that there is no such task."""
    return f"there is no task {task_id}: it was never committed, or it was pruned after it had ended"
