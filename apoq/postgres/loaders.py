"""Loads values that other programs may have written into a task's row and that Python can't represent.

An error while a row is read would stop the claim of this row and of the others in the batch, again and again.
So such a value is loaded as a substitute, and at most the task itself fails.
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
"""PostgreSQL's binary interval: microseconds, days and months."""


class UnreadableData(ValueError):
    """A task's data is nested too deeply for Python, or has a number with too many digits."""


def read_anything(reader: AdaptContext) -> None:
    """Make a connection or a cursor able to read any row that PostgreSQL can hold."""
    adapters = reader.adapters
    for type_, loaders in _LOADERS.items():
        for loader in loaders:
            adapters.register_loader(type_, loader)
    set_json_loads(_load_json, reader)


def read_json(text: str) -> Any:
    """Return a task's data; raise `UnreadableData` if Python can't read it."""
    try:
        # Unlike `loads`, this doesn't look for surrounding white space, which jsonb's text doesn't have.
        return _decoder.raw_decode(text)[0]
    except (ValueError, RecursionError) as error:
        raise UnreadableData(str(error)) from None


def read_time(epoch: float | Decimal) -> datetime:
    """Return a time from seconds since 1970, UTC; Python's first or last time if it is out of range."""
    try:
        return _EPOCH + _length(epoch)
    except OverflowError:
        return _FIRST if epoch < 0 else _LAST


def read_microseconds(epoch: int) -> datetime:
    """Return a time from microseconds since 1970, UTC; Python's first or last time if it is out of range."""
    try:
        return _EPOCH + timedelta(microseconds=epoch)
    except OverflowError:
        return _FIRST if epoch < 0 else _LAST


def read_length(seconds: Decimal) -> timedelta:
    """Return a duration from seconds; Python's longest if it is out of range."""
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
    """Loads times outside of Python's calendar, such as -infinity, as its first or last time."""

    def load(self, data: Any) -> datetime:
        try:
            return super().load(data)
        except DataError:
            text = bytes(data)
            past = text.startswith(b"-") or text.endswith(b"BC")
            return _FIRST if past else _LAST


class _AnyBinaryTime(TimestamptzBinaryLoader):
    """The same for times in binary format."""

    def load(self, data: Any) -> datetime:
        try:
            return super().load(data)
        except DataError:
            is_past = bytes(data)[0] & 0x80  # the sign
            return _FIRST if is_past else _LAST


class _AnyInterval(IntervalLoader):
    """Loads intervals that are too long for Python, such as infinity, as its longest."""

    def load(self, data: Any) -> timedelta:
        text = bytes(data)
        try:
            if b"infinity" not in text:
                return super().load(data)
        except DataError:
            pass
        return timedelta.min if text.startswith(b"-") else timedelta.max


class _AnyBinaryInterval(IntervalBinaryLoader):
    """The same for intervals in binary format."""

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
