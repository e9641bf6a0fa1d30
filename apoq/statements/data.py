"""Read the data of a task that is too large to be returned by its claim."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Integer,
    Select,
    Text,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    null,
    select,
)

from apoq.model import tasks_table
from apoq.statements.settle import held_as

_BINARY: int = 8
"""How many times larger jsonb may be in memory than as text, at most: a digit takes twelve bytes, of two."""


@cache
def read_data(schema: str | None) -> Select[Any]:
    """Return the data of the task `task_id`, held under `held_under`, as text; null if it is too long.

    That is longer than `longest_data` characters, which another program may have added. No row, if it isn't
    held.
    """
    tasks = tasks_table(schema)
    longest = bindparam("longest_data", type_=BigInteger)
    # The size of what is compressed is only known once it isn't; and to make text of it takes much longer.
    size = func.pg_column_size(func.jsonb_build_array(tasks.c.data), type_=BigInteger)
    text = cast(tasks.c.data, Text)
    held = held_as(schema, bindparam("task_id", type_=BigInteger), bindparam("held_under", type_=BigInteger))
    return select(
        case((size > longest * literal_column(str(_BINARY), Integer), null()), else_=text).label("data")
    ).where(held)
