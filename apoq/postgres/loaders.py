"""Reads what other programs may have written into a task's row, and Python has no value for.

An error while a row is read would stop the claim of this row and of those beside it, again and again. So
what can't be read is answered as something else, and at most the task itself fails.
"""

from __future__ import annotations

import json
import struct
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from psycopg import DataError
from psycopg.abc import AdaptContext
from psycopg.types.datetime import (
    IntervalBinaryLoader,
    IntervalLoader,
    TimestamptzBinaryLoader,
    TimestamptzLoader,
)
from psycopg.types.json import set_json_loads

_decoder = json.JSONDecoder()

_EPOCH = datetime.fromtimestamp(0, UTC)
_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
_INTERVAL: Final = struct.Struct("!qii")
"""PostgreSQL's microseconds, days and months."""


class UnreadableData(ValueError):
    """A task's data is nested too deep for Python, or has a number of too many digits."""


def read_anything(reader: AdaptContext) -> None:
    """Let a connection, or a cursor, read any row that PostgreSQL can hold."""
    adapters = reader.adapters
    for type_, loaders in _LOADERS.items():
        for loader in loaders:
            adapters.register_loader(type_, loader)
    set_json_loads(_load_json, reader)


def read_json(text: str) -> Any:
    """Read a task's data; raise `UnreadableData` where Python can't."""
    try:
        # jsonb's text has no white space around it, for which `loads` would look.
        return _decoder.raw_decode(text)[0]
    except (ValueError, RecursionError) as error:
        raise UnreadableData(str(error)) from None


def read_time(epoch: float | Decimal) -> datetime:
    """Read a time that is given in seconds since 1970, UTC."""
    try:
        return _EPOCH + _length(epoch)
    except OverflowError:
        return _FIRST if epoch < 0 else _LAST


def read_microseconds(epoch: int) -> datetime:
    """Read a time that is given in microseconds since 1970, UTC."""
    try:
        return _EPOCH + timedelta(microseconds=epoch)
    except OverflowError:
        return _FIRST if epoch < 0 else _LAST


def read_length(seconds: Decimal) -> timedelta:
    """Read a length of time; one that is longer than Python's as its longest."""
    try:
        return _length(seconds)
    except OverflowError:
        return timedelta.min if seconds < 0 else timedelta.max


def _length(seconds: float | Decimal) -> timedelta:
    if isinstance(seconds, Decimal):
        return timedelta(microseconds=int(seconds * 1_000_000))
    return timedelta(seconds=seconds)


def _load_json(text: str | bytes) -> Any:
    try:
        return read_json(text if isinstance(text, str) else text.decode(errors="replace"))
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


class _AnyInterval(IntervalLoader):
    """Reads intervals that are longer than Python's, such as infinity, as its longest."""

    def load(self, data: Any) -> timedelta:
        text = bytes(data)
        try:
            if b"infinity" not in text:
                return super().load(data)
        except DataError:
            pass
        return timedelta.min if text.startswith(b"-") else timedelta.max


class _AnyBinaryInterval(IntervalBinaryLoader):
    """The same, of intervals that the server sends as numbers."""

    def load(self, data: Any) -> timedelta:
        try:
            return super().load(data)
        except DataError:
            microseconds, days, months = _INTERVAL.unpack(data)
            is_negative = months * 30 + days + microseconds / 86_400_000_000 < 0
            return timedelta.min if is_negative else timedelta.max


_LOADERS: Final[dict[str, tuple[type[Any], type[Any]]]] = {
    "timestamptz": (_AnyTime, _AnyBinaryTime),
    "interval": (_AnyInterval, _AnyBinaryInterval),
}
