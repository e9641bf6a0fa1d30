"""Reads what other programs may have written into a task's row, and Python has no value for.

An error while a row is read would stop the claim of this row and of those beside it, again and again. So
what can't be read is answered as something else, and at most the task itself fails.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from psycopg import Connection, DataError
from psycopg.types.datetime import TimestamptzLoader
from psycopg.types.json import set_json_loads


class UnreadableData(ValueError):
    """A task's data is nested too deep for Python, or has a number of too many digits."""


def read_anything(connection: Connection[Any]) -> None:
    """Let a connection read any row that PostgreSQL can hold."""
    connection.adapters.register_loader("timestamptz", _AnyTime)
    set_json_loads(_load_json, connection)


def _load_json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return UnreadableData(str(error))


class _AnyTime(TimestamptzLoader):
    """Reads times beyond Python's calendar, such as -infinity, as its first or last."""

    def load(self, data: Any) -> datetime:
        try:
            return super().load(data)
        except DataError:
            text = bytes(data)
            past = text.startswith(b"-") or text.endswith(b"BC")
            return datetime.min.replace(tzinfo=UTC) if past else datetime.max.replace(tzinfo=UTC)
