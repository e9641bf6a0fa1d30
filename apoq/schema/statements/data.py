"""Reads the data of a task if it is too large to be returned by the claim."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    Text,
    any_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    select,
)

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.claim import short_text
from apoq.schema.statements.settle import held_as

BINARY: Final = 8
"""Maximum ratio of jsonb's size in memory to its size as text: a digit in an array takes 12 bytes, not 2."""

BYTES: Final = 4
"""Maximum number of bytes of a character."""


@cache
def read_short_data(schema: str | None) -> Select[Any]:
    """Return the ids, the data and the metadata of the tasks `ids`, as `claim` returns them."""
    tasks = tasks_table(schema)
    columns = tasks.c.id, short_text(tasks.c.data), short_text(tasks.c.meta)
    return select(*columns).where(tasks.c.id == any_(bigints("ids")))


@cache
def read_data(schema: str | None) -> Select[Any]:
    """Return the data of the task `task_id`, claimed with the token `held_under`, as text; no row if lost.

    The data is NULL if another program has stored much more than `longest_data` characters.
    """
    tasks = tasks_table(schema)
    longest = bindparam("longest_data", type_=BigInteger)
    # In an array, because the size of a compressed value is known only after decompression. Converting the
    # value to text would take much longer.
    size = func.pg_column_size(func.jsonb_build_array(tasks.c.data), type_=BigInteger)
    text = case((size // _times(BINARY) <= longest, cast(tasks.c.data, Text))).label("text")
    held = held_as(schema, bindparam("task_id", type_=BigInteger), bindparam("held_under", type_=BigInteger))
    # OFFSET makes the server convert to text only once. The size of a number with an exponent is known only
    # after that.
    found = select(text).where(held).offset(literal_column("0")).subquery("found")
    is_short = func.octet_length(found.c.text, type_=BigInteger) // _times(BYTES) <= longest
    return select(case((is_short, found.c.text)).label("data"))


def _times(number: int) -> ColumnElement[int]:
    return literal_column(str(number), BigInteger)
