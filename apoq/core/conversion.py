"""Converts values to JSON, and back by their annotations.

msgspec does the conversion. It is imported when the first typed task is made, so that applications without
typed tasks don't pay for it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, Final
from uuid import UUID

from apoq.core.losses import Loss
from apoq.core.plain import class_name, plain_number
from apoq.errors import glimpse

_RICH: Final = (bytes, bytearray, datetime, date, time, timedelta, UUID, Decimal)
"""Types without JSON values; they are compared with the annotations before they become text."""

_DATES: Final = (datetime, date)
"""The real classes: while a test freezes the time, these names may refer to other classes."""


class NotConvertible(Exception):
    """A value or a type that can't be converted to JSON."""


ERRORS: Final = (TypeError, ValueError, RecursionError, NotConvertible)
"""Exceptions that a conversion raises."""


def replaced_class(type_: type) -> type | None:
    """Return the class that a type replaces, as freezegun's FakeDatetime does while the time is frozen.

    A type replaces `datetime` or `date` if real values count as its instances. msgspec's schemas know only
    one of the two classes then.
    """
    for base in _DATES:
        if issubclass(type_, base) and isinstance(base.min, type_):
            return base
    return None


def plain(value: Any, kept: tuple[type, ...] = ()) -> Any:
    """Return a value as lists, dicts, strings and numbers; objects of the `kept` classes stay as they are."""
    import msgspec  # noqa: PLC0415

    return msgspec.to_builtins(value, str_keys=True, builtin_types=kept, enc_hook=_encode)


def reread(document: Any) -> Any:
    """Return a document as a worker reads it; raises one of `ERRORS` if JSON can't hold it."""
    import msgspec  # noqa: PLC0415

    return msgspec.json.decode(msgspec.json.encode(document, enc_hook=_encode))


def convert(value: Any, type_: Any, kept: tuple[type, ...] = ()) -> Any:
    """Convert a result of `plain` to a value of this type; raises one of `ERRORS` if it doesn't fit."""
    import msgspec  # noqa: PLC0415

    def decode(of: type, inner: Any) -> Any:
        base = replaced_class(of)
        return convert(inner, base, kept) if base else _decode(of, inner)

    try:
        return msgspec.convert(value, type_, str_keys=True, builtin_types=kept, dec_hook=decode)
    except msgspec.ValidationError as error:
        raise ValueError(*error.args) from error.__cause__


def _encode(value: Any) -> Any:
    if is_model(type(value)):
        return value.model_dump(mode="json", by_alias=True, round_trip=True, warnings=False)
    for base in type(value).__mro__:  # the value may be of a subclass, such as Markup
        if base in TO_BASE:
            return TO_BASE[base](value)
    number = plain_number(value)
    if number is None:
        raise _not_convertible(value)
    return number


def _not_convertible(value: Any) -> NotConvertible:
    return NotConvertible(f"{class_name(value)} can't be converted to JSON: {glimpse(value)}")


def _of_iso_format(base: Any, value: Any) -> Any:
    try:
        return base.fromisoformat(value.isoformat())
    except ValueError:  # from pandas' NaT, which claims to be a datetime
        raise _not_convertible(value) from None


TO_BASE: Final[dict[type, Callable[[Any], Any]]] = {
    bytes: bytes,
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    Decimal: Decimal,
    UUID: lambda value: UUID(int=value.int),
    # The real classes, because the names may refer to others while a test freezes the time.
    datetime: partial(_of_iso_format, datetime),
    date: partial(_of_iso_format, date),
    time: partial(_of_iso_format, time),
    timedelta: partial(timedelta.__add__, timedelta()),
}
"""Functions that turn a value of a subclass into one of the base class."""


def _decode(type_: Any, value: Any) -> Any:
    if type_ is object:
        return value
    if is_model(type_):
        import msgspec  # noqa: PLC0415

        # From JSON text, because strict fields accept a date or a UUID as text only when they read JSON.
        return type_.model_validate_json(msgspec.json.encode(value))
    raise NotConvertible(f"{type_.__qualname__} can't be converted")


def is_model(type_: Any) -> bool:
    """Return whether it is a pydantic model, without importing pydantic."""
    return isinstance(type_, type) and hasattr(type_, "model_validate_json") and hasattr(type_, "model_dump")


def find_mismatch(value: Any, type_: Any) -> Loss | None:
    """Return where a value's type differs from its annotation, compared before the value becomes text."""
    if type_ is Any:
        return None
    try:
        convert(plain(value, _RICH), type_, _RICH)
    except TypeError:  # values of `_RICH` can't be keys of a JSON object before they are text
        return None
    except ERRORS as error:
        return explain(error)
    return None


def explain(error: BaseException) -> Loss:
    """Split an error message of msgspec or pydantic into the path within the argument and the reason."""
    if isinstance(error, RecursionError):
        return Loss("", "it contains itself, or is nested too deeply for JSON")
    reason, _, path = str(error).rpartition(" - at `$")
    path, reason = (path.rstrip("`"), reason) if reason else ("", str(error))
    cause: Any = error.__cause__
    if hasattr(cause, "errors"):  # a pydantic error, whose own message has several lines and shows the values
        first = cause.errors()[0]
        path += "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"])
        reason = f"{first['msg']}, says {cause.title}"
    return Loss(path, reason)
