"""States as literals.

Not as parameters: only then can the planner be sure that a partial index serves.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Text, literal_column
from sqlalchemy.sql.elements import ColumnElement

from apoq import states

PENDING: Final[ColumnElement[str]] = literal_column(f"'{states.PENDING}'", Text)
RUNNING: Final[ColumnElement[str]] = literal_column(f"'{states.RUNNING}'", Text)
