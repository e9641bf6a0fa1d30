"""The database's clock, in forms that Citus accepts in a statement that writes to a sharded schema.

Citus reads the clock before it sends a statement to the node that has the tables. In UPDATE and DELETE, it
refuses `clock_timestamp()`, which is volatile, and calculations that depend on the session's time zone,
unless they are in a scalar subquery. So these are scalar subqueries. They return the time at which the
statement arrived at the server, even if it has waited for a lock since then.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Double, ScalarSelect, Text, func, literal_column, select

from apoq.schema.statements.literals import EPOCH

_UTC: Final[ColumnElement[str]] = literal_column("'UTC'", Text)


def now() -> ScalarSelect[datetime]:
    """Return the current time."""
    return select(func.statement_timestamp()).scalar_subquery()


def epoch_now() -> ScalarSelect[float]:
    """Return the current time in seconds since 1970."""
    return select(func.date_part(EPOCH, func.statement_timestamp(), type_=Double)).scalar_subquery()


def before_now(length: ColumnElement[Any]) -> ScalarSelect[datetime]:
    """Return the time an interval before now."""
    return select(func.statement_timestamp() - length).scalar_subquery()


def in_utc(time: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return a time without its time zone, from which numbers can be calculated in RETURNING."""
    return func.timezone(_UTC, time)
