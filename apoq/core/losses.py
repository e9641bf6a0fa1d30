"""Finds information that a value would lose on its way through JSON: pure functions, for typed tasks."""

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
"""A value of a subclass, such as Markup or IntEnum, may come back as one of these: only the class is lost."""

_NUMBERS: Final[dict[type, tuple[type, ...]]] = {int: (Integral,), float: (Real,)}
"""Other types that may be given for these: numpy's numbers, and an int for a float."""

_SIMPLE: Final = {NoneType, bool, int, float, str, UUID}
"""Types whose values are the same if they are equal. NaN isn't, so `_is_same` compares it once more."""

_RECORDS: Final = ("__dataclass_fields__", "__pydantic_core_schema__", "__struct_fields__", "__attrs_attrs__")
"""Attributes that mark a class with declared fields."""

_NOT_FOUND: Final = object()


class Loss(NamedTuple):
    """A place where a value would not come back as it was given, and the reason."""

    path: str
    reason: str


def find_loss(given: Any, back: Any) -> Loss | None:
    """Return the first place where `back` differs from `given`, or None if they are the same.

    These count as the same: equal scalars, but not True and 1; datetimes of the same instant; lists and
    tuples, sets, and dicts with the same items; and objects of one class with the same attributes, or that
    are equal by an `__eq__` of their own. docs/typed-tasks.md describes this to users.
    """
    kind: type = type(back)
    if given is back or (type(given) is kind and kind in _SIMPLE and given == back):
        return None
    if kind in _SCALARS and _is_kind_of(given, kind):
        return None if _is_same(given, back) else _changed(back)
    if is_mapped(type(given)):
        return Loss("", MAPPED)
    if isinstance(back, Enum) and not isinstance(given, Enum):
        return find_loss(given, back.value)  # an enum's value may be given for its member
    if isinstance(back, (list, tuple, deque)) and _has_items_of(given, kind):
        return _in_items(given, back)
    if isinstance(back, (set, frozenset)) and isinstance(given, (set, frozenset)):
        return _in_set(given, back)
    if isinstance(back, dict) and isinstance(given, dict) and kind in {dict, type(given)}:
        return _in_dict(given, back)
    if _class(given) is not _class(back):
        was, is_ = type(given).__qualname__, kind.__qualname__
        return Loss("", f"it would come back as {is_}, not as {was}: annotate it as {was}, or pass {is_}")
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
            # Not `==`, which is False between different zones in the hour that occurs twice.
            is_naive = back.utcoffset() is None
            return (given.utcoffset() is None) == is_naive and given - back == timedelta()
        case time():
            return (given.tzinfo is None) == (back.tzinfo is None) and given == back
    return bool(given == back)


def _has_items_of(given: Any, kind: type) -> bool:
    """Return whether the items of `given` may come back in a sequence of this kind."""
    if kind is list:
        # A NamedTuple would lose its names.
        return isinstance(given, (list, tuple, set, frozenset)) and not hasattr(given, "_fields")
    if kind is tuple:
        return isinstance(given, (list, tuple))
    return type(given) is kind


def _in_items(given: Any, back: Any) -> Loss | None:
    if len(given) != len(back):
        return _changed(back)
    kinds = [*map(type, given)]
    if _SIMPLE.issuperset(kinds) and kinds == [*map(type, back)] and [*given] == [*back]:
        return None  # same result as the loop below, but faster
    for index, (item, other) in enumerate(zip(given, back, strict=True)):
        if loss := find_loss(item, other):
            names = getattr(back, "_fields", None)
            return _inside(f".{names[index]}" if names else f"[{index}]", loss)
    return None


def _in_set(given: AbstractSet[Any], back: AbstractSet[Any]) -> Loss | None:
    others = {other: other for other in back}
    if len(given) != len(back) or any(_find_same(item, others) is _NOT_FOUND for item in given):
        return _changed(back)
    return None


def _in_dict(given: Mapping[Any, Any], back: Mapping[Any, Any]) -> Loss | None:
    others = {other: other for other in back}
    for key, value in given.items():
        other = _find_same(key, others)
        if loss := _MISSING if other is _NOT_FOUND else find_loss(value, back[other]):
            return _inside(f"[{glimpse(key)}]", loss)
        del others[other]
    return next((_inside(f"[{glimpse(key)}]", _added(back[key])) for key in others), None)


def _find_same(item: Any, others: Mapping[Any, Any]) -> Any:
    """Return the item of `others` that is the same, or `_NOT_FOUND`."""
    other = others.get(item, _NOT_FOUND)
    if other is not _NOT_FOUND and find_loss(item, other) is None:
        return other
    return next((other for other in others if find_loss(item, other) is None), _NOT_FOUND)


def _in_object(given: Any, back: Any) -> Loss | None:
    attributes, others = _attributes(given), _attributes(back)
    if not attributes and not others and callable(given):
        return _changed(back)
    for name, value in attributes.items():
        loss = find_loss(value, others[name]) if name in others else _MISSING
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
    """Return whether an attribute is computed from the others."""
    return name == "_attrs_cached_hash" or isinstance(getattr(type(value), name, None), cached_property)


@lru_cache
def _is_compared_by_itself(kind: Any) -> bool:
    # The `__eq__` of a class with declared fields may ignore some of them.
    has_own = kind.__eq__ is not object.__eq__ and not any(hasattr(kind, name) for name in _RECORDS)
    return has_own or issubclass(kind, Enum)


def _class(value: Any) -> type:
    # mypy accepts a `Page(…)` as a `Page[int]`, and pydantic's `==` treats them as equal.
    generic = getattr(type(value), "__pydantic_generic_metadata__", None)
    return (generic and generic["origin"]) or type(value)


def _is_equal(given: Any, back: Any) -> bool:
    try:
        return bool(given == back)
    except Exception:  # noqa: BLE001 - such as from an array, which has no single truth value
        return False


_MISSING: Final = Loss("", "it would not come back: leave it out, or annotate a type that has it")


def _changed(back: Any) -> Loss:
    # The given value is not shown: the class may drop it on purpose because it is a secret.
    return Loss("", f"it would come back as another value, {glimpse(back)}")


def _added(back: Any) -> Loss:
    return Loss("", f"it was not given, but would come back as {glimpse(back)}")


def _inside(where: str, loss: Loss) -> Loss:
    return Loss(where + loss.path, loss.reason)
