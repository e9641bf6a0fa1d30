"""A task's type and data: checked and encoded before any statement is sent."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from apoq.errors import InvalidData, InvalidTask

MAX_DATA_SIZE = 1024 * 1024
"""Bytes of JSON that one task may carry, unless its queue says otherwise."""

MAX_TYPE_LENGTH = 255

_dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def check_type(type_: object) -> str:
    """Answer a task's type; `InvalidTask` where it is none."""
    return check_name(type_, "a task's type")


def check_name(name: object, what: str) -> str:
    """Answer a name that fits a text column and an index; `InvalidTask` where it doesn't."""
    if not isinstance(name, str):
        raise InvalidTask(f"{what} is a string, not {name!r}")
    if not name:
        raise InvalidTask(f"{what} can't be empty")
    if len(name) > MAX_TYPE_LENGTH:
        raise InvalidTask(
            f"{what} has at most {MAX_TYPE_LENGTH} characters, not {len(name):,}: {name[:40]!r}…"
        )
    if fault := _text_fault(name):
        raise InvalidTask(f"{what} can't hold {fault}: {name!r}")
    return name


def encode(data: Any, max_size: int = MAX_DATA_SIZE, name: str = "data") -> str:
    """Encode a task's data as the JSON text of a jsonb value; `InvalidData` says what can't be, and where."""
    try:
        text = _dumps(data)
        size = len(text.encode())
        # The encoder turns other keys into strings, and lets U+0000 pass.
        sound = _keys_are_text(data) and "\\u0000" not in text
    except (TypeError, ValueError, RecursionError) as error:
        for path, reason in _faults(data, name, ()):
            raise InvalidData(path, reason) from None
        raise InvalidData(name, str(error)) from error
    if not sound:
        for path, reason in _faults(data, name, ()):
            raise InvalidData(path, reason)
    if size > max_size:
        raise InvalidData(
            name,
            f"{size:,} bytes of JSON are over the limit of {max_size:,}: keep what is large elsewhere and "
            "put its key here, or raise Queue(max_data_size=…)",
        )
    return text


def _keys_are_text(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_keys_are_text, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_keys_are_text, value))
    return True


def _faults(value: Any, path: str, parents: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Find what jsonb can't hold, with the path that leads there."""
    match value:
        case None | bool() | int():
            return
        case str():
            if fault := _text_fault(value):
                yield path, f"jsonb can't hold {fault}"
        case float():
            if not math.isfinite(value):
                yield path, f"JSON has no {value!r}"
        case dict() | list() | tuple():
            if id(value) in parents:
                yield path, "it contains itself"
                return
            if len(parents) >= _DEEPEST:
                yield path, f"it is nested more than {_DEEPEST} levels deep"
                return
            yield from _faults_inside(value, path, (*parents, id(value)))
        case _:
            yield path, f"{type(value).__qualname__} is not JSON: {_glimpse(value)}"


_DEEPEST = 200
_GLIMPSE = 80


def _faults_inside(value: Any, path: str, parents: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        for index, item in enumerate(value):
            yield from _faults(item, f"{path}[{index}]", parents)
        return
    for key, item in value.items():
        if not isinstance(key, str):
            yield path, f"a key of a JSON object is a string, not {key!r}"
        elif fault := _text_fault(key):
            yield path, f"jsonb can't hold {fault} in the key {key!r}"
        else:
            yield from _faults(item, f"{path}[{key!r}]", parents)


def _text_fault(text: str) -> str | None:
    if "\0" in text:
        return "U+0000 (NUL) in a string"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "a lone surrogate in a string"
    return None


def _glimpse(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _GLIMPSE else f"{text[:_GLIMPSE]}…"
