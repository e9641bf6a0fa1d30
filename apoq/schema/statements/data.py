"""Read the data of a task that is too large to be returned by its claim."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    Text,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    select,
)

from apoq.schema.models import tasks_table
from apoq.schema.statements.settle import held_as

BINARY: Final = 8
"""How many times larger jsonb may be in memory than as text, at most: a digit takes twelve bytes, of two."""

BYTES: Final = 4
"""Bytes of a character, at most."""


@cache
def read_data(schema: str | None) -> Select[Any]:
    """Return the data of the task `task_id`, held under `held_under`, as text; no row, if it isn't held.

    Null, if another program has added much more than `longest_data` characters.
    """
    tasks = tasks_table(schema)
    longest = bindparam("longest_data", type_=BigInteger)
    # The size of what is compressed is only known once it isn't; and to make text of it takes much longer.
    size = func.pg_column_size(func.jsonb_build_array(tasks.c.data), type_=BigInteger)
    text = case((size // _times(BINARY) <= longest, cast(tasks.c.data, Text))).label("text")
    held = held_as(schema, bindparam("task_id", type_=BigInteger), bindparam("held_under", type_=BigInteger))
    # With OFFSET, text is made once. Only then the size of a number is known that has an exponent.
    found = select(text).where(held).offset(literal_column("0")).subquery("found")
    is_short = func.octet_length(found.c.text, type_=BigInteger) // _times(BYTES) <= longest
    return select(case((is_short, found.c.text)).label("data"))


def _times(number: int) -> ColumnElement[int]:
    return literal_column(str(number), BigInteger)
