"""Values as JSON, and back as their annotations say.

msgspec converts them. It is imported when the first typed task is made, for those who have none.
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
"""What JSON has no values for, and is compared with the annotations before it becomes text."""

_DATES: Final = (datetime, date)
"""The classes themselves: while a test freezes the time, these names may mean others."""


class NoForm(Exception):
    """A value, or a type, that has no form in JSON."""


ERRORS: Final = (TypeError, ValueError, RecursionError, NoForm)
"""What a conversion raises."""


def stood_in(type_: type) -> type | None:
    """Return the class that a type stands in for, as freezegun's FakeDatetime does while the time is frozen.

    So it is if plain values are its instances. msgspec's schemas know only one of the two then.
    """
    for base in _DATES:
        if issubclass(type_, base) and isinstance(base.min, type_):
            return base
    return None


def plain(value: Any, kept: tuple[type, ...] = ()) -> Any:
    """Return a value as lists, dicts, texts and numbers, and objects of the classes that are `kept`."""
    import msgspec  # noqa: PLC0415

    return msgspec.to_builtins(value, str_keys=True, builtin_types=kept, enc_hook=_encode)


def reread(document: Any) -> Any:
    """Return a document as a worker reads it; TypeError, ValueError or `NoForm` if JSON can't hold it."""
    import msgspec  # noqa: PLC0415

    return msgspec.json.decode(msgspec.json.encode(document, enc_hook=_encode))


def convert(value: Any, type_: Any, kept: tuple[type, ...] = ()) -> Any:
    """Return what `plain` has made as a value of this type; raises one of `ERRORS` if it doesn't fit."""
    import msgspec  # noqa: PLC0415

    def decode(of: type, inner: Any) -> Any:
        base = stood_in(of)
        return convert(inner, base, kept) if base else _decode(of, inner)

    try:
        return msgspec.convert(value, type_, str_keys=True, builtin_types=kept, dec_hook=decode)
    except msgspec.ValidationError as error:
        raise ValueError(*error.args) from error.__cause__


def _encode(value: Any) -> Any:
    if is_model(type(value)):
        return value.model_dump(mode="json", by_alias=True, round_trip=True, warnings=False)
    for base in type(value).__mro__:  # of a subclass, such as Markup
        if base in TO_BASE:
            return TO_BASE[base](value)
    number = plain_number(value)
    if number is None:
        raise _no_form(value)
    return number


def _no_form(value: Any) -> NoForm:
    return NoForm(f"{class_name(value)} has no form in JSON: {glimpse(value)}")


def _of_iso_format(base: Any, value: Any) -> Any:
    try:
        return base.fromisoformat(value.isoformat())
    except ValueError:  # of pandas' NaT, which says that it is a datetime
        raise _no_form(value) from None


TO_BASE: Final[dict[type, Callable[[Any], Any]]] = {
    bytes: bytes,
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    Decimal: Decimal,
    UUID: lambda value: UUID(int=value.int),
    # The classes themselves: while a test freezes the time, these names may mean others.
    datetime: partial(_of_iso_format, datetime),
    date: partial(_of_iso_format, date),
    time: partial(_of_iso_format, time),
    timedelta: partial(timedelta.__add__, timedelta()),
}
"""Makes a value of the class itself from one of a subclass."""


def _decode(type_: Any, value: Any) -> Any:
    if type_ is object:
        return value
    if is_model(type_):
        import msgspec  # noqa: PLC0415

        # From text, as its strict fields want it.
        return type_.model_validate_json(msgspec.json.encode(value))
    raise NoForm(f"there is no conversion for {type_.__qualname__}")


def is_model(type_: Any) -> bool:
    """Tell whether it is a pydantic model, without importing pydantic."""
    return isinstance(type_, type) and hasattr(type_, "model_validate_json") and hasattr(type_, "model_dump")


def find_mismatch(value: Any, type_: Any) -> Loss | None:
    """Return where a value is of another type than its annotation, compared before it becomes text."""
    if type_ is Any:
        return None
    try:
        convert(plain(value, _RICH), type_, _RICH)
    except TypeError:  # these can't be keys of a JSON object before they are text
        return None
    except ERRORS as error:
        return explain(error)
    return None


def explain(error: BaseException) -> Loss:
    """Split the message of msgspec, or of pydantic, into the path within the argument and the reason."""
    if isinstance(error, RecursionError):
        return Loss("", "it contains itself, or is nested too deep for JSON")
    reason, _, path = str(error).rpartition(" - at `$")
    path, reason = (path.rstrip("`"), reason) if reason else ("", str(error))
    cause: Any = error.__cause__
    if hasattr(cause, "errors"):  # pydantic's, whose own message has several lines, and the values
        first = cause.errors()[0]
        path += "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"])
        reason = f"{first['msg']}, says {cause.title}"
    return Loss(path, reason)
