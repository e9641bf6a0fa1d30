"""Reads what other programs may have written into a task's row, and Python has no value for.

An error while a row is read would stop the claim of this row and of those beside it, again and again. So
what can't be read is answered as something else, and at most the task itself fails.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from psycopg import DataError
from psycopg.abc import AdaptContext
from psycopg.types.datetime import TimestamptzBinaryLoader, TimestamptzLoader
from psycopg.types.json import set_json_loads

_decoder = json.JSONDecoder()

_EPOCH = datetime.fromtimestamp(0, UTC)
_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


class UnreadableData(ValueError):
    """A task's data is nested too deep for Python, or has a number of too many digits."""


def read_anything(reader: AdaptContext) -> None:
    """Let a connection, or a cursor, read any row that PostgreSQL can hold."""
    reader.adapters.register_loader("timestamptz", _AnyTime)
    reader.adapters.register_loader("timestamptz", _AnyBinaryTime)
    set_json_loads(_load_json, reader)


def read_json(text: str) -> Any:
    """Read a task's data; raise `UnreadableData` where Python can't."""
    try:
        # jsonb's text has no white space around it, for which `loads` would look.
        return _decoder.raw_decode(text)[0]
    except (ValueError, RecursionError) as error:
        raise UnreadableData(str(error)) from None


def read_time(epoch: float) -> datetime:
    """Read a time that is given in seconds since 1970, UTC."""
    try:
        return _EPOCH + timedelta(seconds=epoch)
    except OverflowError:
        return _FIRST if epoch < 0 else _LAST


def _load_json(text: str | bytes) -> Any:
    try:
        return read_json(text if isinstance(text, str) else text.decode())
    except UnreadableData as error:
        return error


class _AnyTime(TimestamptzLoader):
    """Reads times beyond Python's calendar, such as -infinity, as its first or last."""

    def load(self, data: Any) -> datetime:
        try:
            return super().load(data)
        except DataError:
            text = bytes(data)
            past = text.startswith(b"-") or text.endswith(b"BC")
            return _FIRST if past else _LAST


class _AnyBinaryTime(TimestamptzBinaryLoader):
    """The same, of times that the server sends as a number."""

    def load(self, data: Any) -> datetime:
        try:
            return super().load(data)
        except DataError:
            is_past = bytes(data)[0] & 0x80  # the sign
            return _FIRST if is_past else _LAST
