"""What a value would lose on its way through JSON: pure functions, for typed tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import cached_property, lru_cache
from numbers import Integral, Real
from types import NoneType
from typing import Any, Final, NamedTuple
from uuid import UUID

from apoq.core.plain import MAPPED, is_mapped
from apoq.errors import glimpse

_SCALARS: Final = {str, int, float, bytes, bytearray, datetime, date, time, timedelta, UUID, Decimal}
"""What may come back for a value of a subclass, such as a Markup or an IntEnum: only the class is lost."""

_NUMBERS: Final[dict[type, tuple[type, ...]]] = {int: (Integral,), float: (Real,)}
"""What may be given for these as well: numpy's numbers, and an int for a float."""

_SIMPLE: Final = {NoneType, bool, int, float, str, UUID}
"""Of these, `==` says whether two of the same type are the same (of NaN, it's asked once more)."""

_RECORDS: Final = ("__dataclass_fields__", "__pydantic_core_schema__", "__struct_fields__", "__attrs_attrs__")
"""What a class has that declares its fields."""

_NOTHING: Final = object()


class Loss(NamedTuple):
    """Where a value would not come back as it was given, and why."""

    path: str
    reason: str


def find_loss(given: Any, back: Any) -> Loss | None:
    """Return the first place where `back` is not what was `given`, or None if they are the same.

    The same is: equal scalars, though not True for 1; datetimes of the same instant; lists and tuples, sets,
    and dicts of the same items; and objects of one class with the same attributes, or that are equal by an
    `__eq__` of their own. docs/typed-tasks.md says so to users.
    """
    kind: type = type(back)
    if given is back or (type(given) is kind and kind in _SIMPLE and given == back):
        return None
    if kind in _SCALARS and _is_kind_of(given, kind):
        return None if _is_same(given, back) else _changed(back)
    if is_mapped(type(given)):
        return Loss("", MAPPED)
    if isinstance(back, Enum) and not isinstance(given, Enum):
        return find_loss(given, back.value)  # a value may be given for its member
    if isinstance(back, (list, tuple, deque)) and _has_items_of(given, kind):
        return _in_items(given, back)
    if isinstance(back, (set, frozenset)) and isinstance(given, (set, frozenset)):
        return _in_set(given, back)
    if isinstance(back, dict) and isinstance(given, dict) and kind in {dict, type(given)}:
        return _in_dict(given, back)
    if _class(given) is not _class(back):
        was, is_ = type(given).__qualname__, kind.__qualname__
        return Loss("", f"it would come back as {is_}, not as {was}: annotate it as {was}, or give {is_}")
    if _is_compared_by_itself(kind):
        return None if _is_equal(given, back) else _changed(back)
    return _in_object(given, back)


def _is_kind_of(given: Any, kind: type) -> bool:
    if isinstance(given, bool):
        return False
    return isinstance(given, (kind, *_NUMBERS.get(kind, ())))


def _is_same(given: Any, back: Any) -> bool:
    match back:
        case float():
            return given == back or (given != given and back != back)  # noqa: PLR0124 - NaN
        case Decimal():
            has_nan = given.is_nan() or back.is_nan()
            return str(given) == str(back) if has_nan else given == back
        case datetime():
            # Not `==`, which is False between zones when the clocks are being put back.
            is_naive = back.utcoffset() is None
            return (given.utcoffset() is None) == is_naive and given - back == timedelta()
        case time():
            return (given.tzinfo is None) == (back.tzinfo is None) and given == back
    return bool(given == back)


def _has_items_of(given: Any, kind: type) -> bool:
    """Tell whether its items may come back in a list, a tuple or another kind of sequence."""
    if kind is list:
        # The names of a NamedTuple would be lost.
        return isinstance(given, (list, tuple, set, frozenset)) and not hasattr(given, "_fields")
    if kind is tuple:
        return isinstance(given, (list, tuple))
    return type(given) is kind


def _in_items(given: Any, back: Any) -> Loss | None:
    if len(given) != len(back):
        return _changed(back)
    kinds = [*map(type, given)]
    if _SIMPLE.issuperset(kinds) and kinds == [*map(type, back)] and [*given] == [*back]:
        return None  # the same, but faster
    for index, (item, other) in enumerate(zip(given, back, strict=True)):
        if loss := find_loss(item, other):
            names = getattr(back, "_fields", None)
            return _inside(f".{names[index]}" if names else f"[{index}]", loss)
    return None


def _in_set(given: AbstractSet[Any], back: AbstractSet[Any]) -> Loss | None:
    others = {other: other for other in back}
    if len(given) != len(back) or any(_partner(item, others) is _NOTHING for item in given):
        return _changed(back)
    return None


def _in_dict(given: Mapping[Any, Any], back: Mapping[Any, Any]) -> Loss | None:
    others = {other: other for other in back}
    for key, value in given.items():
        other = _partner(key, others)
        if loss := _GONE if other is _NOTHING else find_loss(value, back[other]):
            return _inside(f"[{glimpse(key)}]", loss)
        del others[other]
    return next((_inside(f"[{glimpse(key)}]", _added(back[key])) for key in others), None)


def _partner(item: Any, others: Mapping[Any, Any]) -> Any:
    """Return the one of the others that is the same, or `_NOTHING`."""
    other = others.get(item, _NOTHING)
    if other is not _NOTHING and find_loss(item, other) is None:
        return other
    return next((other for other in others if find_loss(item, other) is None), _NOTHING)


def _in_object(given: Any, back: Any) -> Loss | None:
    attributes, others = _attributes(given), _attributes(back)
    if not attributes and not others and callable(given):
        return _changed(back)
    for name, value in attributes.items():
        loss = find_loss(value, others[name]) if name in others else _GONE
        if loss and not _is_derived(given, name):
            return _inside(f".{name}", loss)
    added = (name for name in others if name not in attributes and not _is_derived(back, name))
    return next((_inside(f".{name}", _added(others[name])) for name in added), None)


def _attributes(value: Any) -> Mapping[str, Any]:
    state: Any = object.__getstate__(value)
    if not isinstance(state, tuple):
        return state or {}
    attributes = {**(state[0] or {}), **state[1]}
    attributes.pop("__pydantic_fields_set__", None)
    for name in ("__pydantic_extra__", "__pydantic_private__"):
        attributes.update(attributes.pop(name, None) or {})
    return attributes


def _is_derived(value: Any, name: str) -> bool:
    """Tell whether an attribute is computed from the others."""
    return name == "_attrs_cached_hash" or isinstance(getattr(type(value), name, None), cached_property)


@lru_cache
def _is_compared_by_itself(kind: Any) -> bool:
    # The `__eq__` of a class that declares its fields may leave some of them out.
    has_own = kind.__eq__ is not object.__eq__ and not any(hasattr(kind, name) for name in _RECORDS)
    return has_own or issubclass(kind, Enum)


def _class(value: Any) -> type:
    # mypy takes a `Page(…)` for a `Page[int]`, and so does pydantic's `==`.
    generic = getattr(type(value), "__pydantic_generic_metadata__", None)
    return (generic and generic["origin"]) or type(value)


def _is_equal(given: Any, back: Any) -> bool:
    try:
        return bool(given == back)
    except Exception:  # noqa: BLE001 - as that of an array, which is neither true nor false
        return False


_GONE: Final = Loss("", "it would not come back: leave it out, or annotate a type that has it")


def _changed(back: Any) -> Loss:
    # What was given is not shown: it may be a secret, which is why it isn't kept.
    return Loss("", f"it would come back as another value, {glimpse(back)}")


def _added(back: Any) -> Loss:
    return Loss("", f"it was not given, but would come back as {glimpse(back)}")


def _inside(where: str, loss: Loss) -> Loss:
    return Loss(where + loss.path, loss.reason)
