"""Checks a task's type and encodes its data, before any statement is sent."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from apoq.core.plain import MAPPED, class_name, is_mapped, plain_number
from apoq.errors import InvalidData, InvalidTask, glimpse

MAX_DATA_SIZE = 1024 * 1024
"""Maximum size of a task's data in bytes of JSON, unless its queue has another limit."""

MAX_TYPE_LENGTH = 255
LONGEST_SCHEMA = 63

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def check_type(type_: object) -> str:
    """Return a task's type; `InvalidTask` if it can't be one."""
    return check_name(type_, "a task's type")


def check_name(name: object, what: str) -> str:
    """Return a name that fits into a text column and an index; `InvalidTask` if it doesn't."""
    if not isinstance(name, str):
        raise InvalidTask(f"{what} must be a string, got {glimpse(name)}")
    if not name:
        raise InvalidTask(f"{what} must not be empty")
    if len(name) > MAX_TYPE_LENGTH:
        raise InvalidTask(
            f"{what} must have at most {MAX_TYPE_LENGTH} characters, got {len(name):,}: {name[:40]!r}…"
        )
    if fault := text_fault(name):
        raise InvalidTask(f"{what} can't hold {fault}: {name!r}")
    return name


def check_schema(name: object) -> str | None:
    """Return a schema's name, or None for the connection's default; `InvalidTask` if it can't be one."""
    if name is None:
        return None
    checked = check_name(name, "a schema's name")
    if len(checked.encode()) > LONGEST_SCHEMA:
        # PostgreSQL would truncate it, and not find the schema afterwards.
        raise InvalidTask(f"a schema's name must have at most {LONGEST_SCHEMA} bytes, got {name!r}")
    if set(checked) & {"%", "'"}:
        # Migrations as scripts, and the reflection for `apoq check`, quote them wrongly.
        raise InvalidTask(f"a schema's name must not contain % or ', got {name!r}")
    if checked.startswith("pg_"):
        raise InvalidTask(
            f"a schema's name must not begin with pg_, which PostgreSQL reserves for its own, got {name!r}"
        )
    return checked


FIRST, LAST = datetime(1, 1, 3, tzinfo=UTC), datetime(9999, 12, 29, tzinfo=UTC)
"""The times that Python can read back in every session, in any time zone."""


def check_time(at: object, name: str = "process_at") -> datetime:
    """Return a time that means the same everywhere; `InvalidTask` if it is not one."""
    if not isinstance(at, datetime):
        raise InvalidTask(f"{name} must be a datetime, got {glimpse(at)}")
    if not _is_aware(at):
        raise InvalidTask(f"{name} must have a time zone, as datetime.now(UTC) has, got {at}")
    if not FIRST <= at <= LAST:
        hint = "; omit it to run the task now" if name == "process_at" else ""
        raise InvalidTask(f"{name} must be between {FIRST.date()} and {LAST.date()}, got {at}{hint}")
    return at


def _is_aware(at: datetime) -> bool:
    try:
        return at.utcoffset() is not None
    except ValueError:  # from pandas' NaT, which claims to be a datetime
        return False


def encode(data: Any, max_size: int = MAX_DATA_SIZE, name: str = "data") -> str:
    """Encode a task's data as JSON text for jsonb; `InvalidData` names the part that can't be encoded."""
    try:
        text = "".join(_encoder.iterencode(data, _one_shot=True))
        size = len(text.encode())
        # The encoder turns other keys into strings, nests as deep as the stack allows, and accepts U+0000.
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
            f"{size:,} bytes of JSON exceed the limit of {max_size:,}: store large values elsewhere and "
            "pass their key, or raise Queue(max_data_size=…)",
        )
    return text


def canonical(data: Any) -> str:
    """Encode data that can be stored as JSON text, the same for equal data."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _is_sound(data: Any) -> bool:
    """Return whether all keys are strings and the nesting is bounded, checking one level after the other."""
    # add_many calls this for every task, so it uses loops: a generator or a union would take twice as long.
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
    """Yield the path of each value that jsonb can't hold, and the reason."""
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
"""Levels of lists and dicts; Python's parser can read a few hundred more if the stack has room for them."""


def _faults_inside(value: Any, path: str, parents: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        for index, item in enumerate(value):
            yield from _faults(item, f"{path}[{index}]", parents)
        return
    for key, item in value.items():
        if not isinstance(key, str):
            yield path, f"a key of a JSON object must be a string, got {glimpse(key)}"
        elif fault := text_fault(key):
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
                return "an int with more digits than Python can read back: pass it as text"
            return None
        case float():
            return (
                None if math.isfinite(value) else f"JSON has no {float(value)!r}: pass None or text instead"
            )
        case str():
            fault = text_fault(value)
            return fault and f"jsonb can't hold {fault}"
    if is_mapped(type(value)):
        return f"{class_name(value)} is not JSON: {MAPPED}"
    number = plain_number(value)
    instead = "text, numbers, lists or dicts" if number is None else "a plain number"
    return f"{class_name(value)} is not JSON, so make it {instead}: {glimpse(value)}"


def text_fault(text: str) -> str | None:
    """Return what PostgreSQL can't hold in a text; None if it can hold all of it."""
    if "\0" in text:
        return "U+0000 (NUL) in a string"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "a lone surrogate in a string"
    return None
