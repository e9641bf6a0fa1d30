"""Constants as literals.

States are literals because only then can the planner prove that a partial index applies. The others are
literals because each parameter costs the driver time.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import BigInteger, Double, Integer, Text, case, func, literal_column
from sqlalchemy.sql.elements import ColumnElement

from apoq.core import states

PENDING: Final[ColumnElement[str]] = literal_column(f"'{states.PENDING}'", Text)
RUNNING: Final[ColumnElement[str]] = literal_column(f"'{states.RUNNING}'", Text)

EPOCH: Final[ColumnElement[str]] = literal_column("'epoch'", Text)
ZERO: Final[ColumnElement[int]] = literal_column("0", Integer)
ONE: Final[ColumnElement[int]] = literal_column("1", Integer)
MAX_INTEGER_MINUS_ONE: Final[ColumnElement[int]] = literal_column(str(2**31 - 2), Integer)
"""The highest integer to which one can be added."""
MIN_INTEGER_PLUS_ONE: Final[ColumnElement[int]] = literal_column(str(-(2**31) + 1), Integer)
"""The lowest integer from which one can be subtracted."""
MAX_BIGINT_MINUS_ONE: Final[ColumnElement[int]] = literal_column(str(2**63 - 2), BigInteger)


def seconds_between(earlier: ColumnElement[Any], later: ColumnElement[Any]) -> ColumnElement[float | None]:
    """Return the seconds from one time to another, limited to a finite number.

    Before PostgreSQL 17, infinite times can't be subtracted, and JSON has no infinity.
    """
    first, last = (func.date_part(EPOCH, time, type_=Double) for time in (earlier, later))
    most = literal_column("1e12", Double)
    return case((first.is_not(None), func.least(func.greatest(last - first, -most), most)))
