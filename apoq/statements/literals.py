"""What is always the same, as literals.

States are, for only then can the planner be sure that a partial index serves; the others, for each parameter
costs the driver time.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Integer, Text, literal_column
from sqlalchemy.sql.elements import ColumnElement

from apoq import states

PENDING: Final[ColumnElement[str]] = literal_column(f"'{states.PENDING}'", Text)
RUNNING: Final[ColumnElement[str]] = literal_column(f"'{states.RUNNING}'", Text)

EPOCH: Final[ColumnElement[str]] = literal_column("'epoch'", Text)
ZERO: Final[ColumnElement[int]] = literal_column("0", Integer)
ONE: Final[ColumnElement[int]] = literal_column("1", Integer)
LAST_BUT_ONE: Final[ColumnElement[int]] = literal_column(str(2**31 - 2), Integer)
"""To this, an integer, one can be added."""
LOWEST_BUT_ONE: Final[ColumnElement[int]] = literal_column(str(-(2**31) + 1), Integer)
"""From this, one can be taken away."""
LAST_BUT_ONE_BIGINT: Final[ColumnElement[int]] = literal_column(str(2**63 - 2), BigInteger)
