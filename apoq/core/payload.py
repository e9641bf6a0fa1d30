"""A task's type and data: checked and encoded before any statement is sent."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from apoq.core.plain import MAPPED, class_name, is_mapped, plain_number
from apoq.errors import InvalidData, InvalidTask, glimpse

MAX_DATA_SIZE = 1024 * 1024
"""Bytes of JSON that one task may carry, unless its queue says otherwise."""

MAX_TYPE_LENGTH = 255
LONGEST_SCHEMA = 63

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def check_type(type_: object) -> str:
    """Answer a task's type; `InvalidTask` where it is none."""
    return check_name(type_, "a task's type")


def check_name(name: object, what: str) -> str:
    """Answer a name that fits a text column and an index; `InvalidTask` where it doesn't."""
    if not isinstance(name, str):
        raise InvalidTask(f"{what} is a string, not {glimpse(name)}")
    if not name:
        raise InvalidTask(f"{what} can't be empty")
    if len(name) > MAX_TYPE_LENGTH:
        raise InvalidTask(
            f"{what} has at most {MAX_TYPE_LENGTH} characters, not {len(name):,}: {name[:40]!r}…"
        )
    if fault := _text_fault(name):
        raise InvalidTask(f"{what} can't hold {fault}: {name!r}")
    return name


def check_schema(name: object) -> str | None:
    """Return a schema's name, or None for the connection's own; `InvalidTask` for what can't be one."""
    if name is None:
        return None
    checked = check_name(name, "a schema's name")
    if len(checked.encode()) > LONGEST_SCHEMA:
        # PostgreSQL would cut it off, and not find it afterwards.
        raise InvalidTask(f"a schema's name has at most {LONGEST_SCHEMA} bytes, not {name!r}")
    if set(checked) & {"%", "'"}:
        # Migrations as scripts, and the reflection for `apoq check`, write them wrong.
        raise InvalidTask(f"a schema's name can't hold % or ', not {name!r}")
    if checked.startswith("pg_"):
        raise InvalidTask(f"a schema's name can't begin with pg_, as PostgreSQL's own do: {name!r}")
    return checked


FIRST, LAST = datetime(1, 1, 3, tzinfo=UTC), datetime(9999, 12, 29, tzinfo=UTC)
"""What Python can read back, whatever the session's time zone."""


def check_time(at: object) -> datetime:
    """Answer a time that everybody reads alike; `InvalidTask` where it is none."""
    if not isinstance(at, datetime):
        raise InvalidTask(f"process_at is a datetime, not {glimpse(at)}")
    if not _is_aware(at):
        raise InvalidTask(
            f"process_at={at} has no time zone, so nobody knows when it is: "
            "for example, datetime.now(UTC) has one"
        )
    if not FIRST <= at <= LAST:
        raise InvalidTask(f"process_at={at} is at the end of the calendar: leave it out for now")
    return at


def _is_aware(at: datetime) -> bool:
    try:
        return at.utcoffset() is not None
    except ValueError:  # of pandas' NaT, which says that it is a datetime
        return False


def encode(data: Any, max_size: int = MAX_DATA_SIZE, name: str = "data") -> str:
    """Encode a task's data as the JSON text of a jsonb value; `InvalidData` says what can't be, and where."""
    try:
        text = "".join(_encoder.iterencode(data, _one_shot=True))
        size = len(text.encode())
        # The encoder turns other keys into strings, goes as deep as the stack is, and lets U+0000 pass.
        sound = _is_sound(data) and "\\u0000" not in text
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


def _is_sound(data: Any) -> bool:
    """Tell whether all keys are text and the nesting is bounded, going through it level by level."""
    # add_many asks this of every task: loops, where a generator or a union would take twice as long.
    level = [data] if isinstance(data, _CONTAINERS) else []
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for container in level:
            items: Iterable[Any] = container
            if isinstance(container, dict):
                for key in container:
                    if not isinstance(key, str):
                        return False
                items = container.values()
            inner += [item for item in items if isinstance(item, _CONTAINERS)]
        if not inner:
            return True
        level = inner
    return False


_CONTAINERS = (dict, list, tuple)


def _faults(value: Any, path: str, parents: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Find what jsonb can't hold, with the path that leads there."""
    if not isinstance(value, dict | list | tuple):
        if fault := _fault(value):
            yield path, fault
    elif id(value) in parents:
        yield path, "it contains itself, which JSON can't"
    elif len(parents) >= _DEEPEST:
        yield path, f"it is nested more than {_DEEPEST} levels deep: make it flatter"
    else:
        yield from _faults_inside(value, path, (*parents, id(value)))


_DEEPEST = 200
"""Levels of lists and dicts: Python's parser reads a few hundred more back, on a stack with room for them."""


def _faults_inside(value: Any, path: str, parents: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        for index, item in enumerate(value):
            yield from _faults(item, f"{path}[{index}]", parents)
        return
    for key, item in value.items():
        if not isinstance(key, str):
            yield path, f"a key of a JSON object is a string, not {glimpse(key)}"
        elif fault := _text_fault(key):
            yield path, f"jsonb can't hold {fault}, the key {glimpse(key)}"
        else:
            yield from _faults(item, f"{path}[{glimpse(key)}]", parents)


def _fault(value: Any) -> str | None:
    match value:
        case None | bool():
            return None
        case int():
            try:
                int.__repr__(value)
            except ValueError:  # see sys.set_int_max_str_digits
                return "an int with more digits than Python reads back: give it as text"
            return None
        case float():
            return (
                None if math.isfinite(value) else f"JSON has no {float(value)!r}: give None or text instead"
            )
        case str():
            fault = _text_fault(value)
            return fault and f"jsonb can't hold {fault}"
    if is_mapped(type(value)):
        return f"{class_name(value)} is not JSON: {MAPPED}"
    number = plain_number(value)
    instead = "text, numbers, lists or dicts" if number is None else "a plain number"
    return f"{class_name(value)} is not JSON, so make it {instead}: {glimpse(value)}"


def _text_fault(text: str) -> str | None:
    if "\0" in text:
        return "U+0000 (NUL) in a string"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "a lone surrogate in a string"
    return None
