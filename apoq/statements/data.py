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
    """Return the data of the task `task_id`, held under `held_under`, as text; no row, if it isn't held.

    If another program has added more than `longest_data` characters: null, or what is one character longer.
    """
    tasks = tasks_table(schema)
    longest = bindparam("longest_data", type_=Integer)
    # The size of what is compressed is only known once it isn't; and to make text of it takes much longer.
    size = func.pg_column_size(func.jsonb_build_array(tasks.c.data), type_=BigInteger)
    # And that of a number with an exponent, only once it is text.
    text = func.left(cast(tasks.c.data, Text), longest + literal_column("1", Integer), type_=Text)
    held = held_as(schema, bindparam("task_id", type_=BigInteger), bindparam("held_under", type_=BigInteger))
    return select(
        case((size // literal_column(str(_BINARY), BigInteger) > longest, null()), else_=text).label("data")
    ).where(held)
