"""Rejects annotations whose values could never be converted to JSON, before any value is given."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any, Final, get_args, get_type_hints

from apoq.core.conversion import TO_BASE, NotConvertible, is_model, replaced_class
from apoq.core.plain import is_mapped

_SEND_AN_ID: Final = "pass something that identifies it, such as an id"


def check_type(type_: Any) -> None:
    """Raise `NotConvertible` if JSON can't be converted to a type; NameError if a name in it is undefined."""
    import msgspec  # noqa: PLC0415

    _check_constraints(type_)
    for kind in _classes(type_, {}):
        _check_class(kind)
    # A schema includes every part of the type, so an unsupported part raises here.
    try:
        msgspec.json.schema_components([type_], schema_hook=_schema)
    except (NameError, NotConvertible):
        raise
    except Exception as error:  # noqa: BLE001 - any error means that the type can't be converted
        raise NotConvertible(f"{error}: {_advice_after(str(error))}") from None


def _check_constraints(type_: Any) -> None:
    # This skips the fields of pydantic models, because pydantic checks their constraints.
    for constraint in getattr(type_, "__metadata__", ()):
        if type(constraint).__module__.partition(".")[0] in {"pydantic", "annotated_types"}:
            raise NotConvertible(
                f"{constraint!r} is pydantic's, which checks it only in its models: make it a field of a "
                "model, or use msgspec.Meta(…)"
            )
    for argument in get_args(type_):
        _check_constraints(argument)


def _classes(type_: Any, seen: dict[int, Any]) -> Iterator[type]:
    """Yield every class in a type, including the classes of their fields."""
    if id(type_) in seen:
        return
    seen[id(type_)] = type_
    if isinstance(type_, type):
        yield type_
    for inner in (*get_args(type_), *_fields(type_)):
        yield from _classes(inner, seen)


def _fields(kind: Any) -> list[Any]:
    if is_model(kind):
        return [field.annotation for field in kind.model_fields.values()]
    if is_mapped(kind) or not any(hasattr(kind, name) for name in _DECLARES):
        return []
    try:
        return list(get_type_hints(kind).values())
    except Exception:  # noqa: BLE001 - msgspec reads them as well, and its error says what is wrong
        return []


_DECLARES: Final = ("__dataclass_fields__", "__struct_fields__", "__attrs_attrs__", "__total__", "_fields")
"""Attributes that mark a class with declared fields; the last two mark a TypedDict and a NamedTuple."""


def _check_class(kind: type) -> None:
    if is_mapped(kind):
        raise NotConvertible(
            f"{kind.__qualname__} is a mapped class, whose objects belong to their session: pass the id, and "
            "load the object in the function"
        )
    if is_model(kind):
        _check_aliases(kind)
    for field in getattr(kind, "__attrs_attrs__", ()):
        if field.name.startswith("_"):
            raise NotConvertible(
                f"{kind.__qualname__}.{field.name} is private, and msgspec leaves it out: rename the field"
            )


def _check_aliases(model: Any) -> None:
    own = model.__pydantic_decorators__
    if own.model_serializers or own.model_validators:
        return  # a custom serializer or validator may read the written name
    by_name = model.model_config.get("populate_by_name") or model.model_config.get("validate_by_name")
    for name, field in model.model_fields.items():
        written, read = field.serialization_alias or name, field.validation_alias or name
        is_read = written in getattr(read, "choices", [read]) or (by_name and written == name)
        if not is_read and not field.exclude:
            raise NotConvertible(
                f"{model.__qualname__}.{name} is written as {written!r} and read as {read!r}: give it an "
                "`alias=`, which applies to both"
            )


def _schema(type_: type) -> dict[str, Any]:
    if is_model(type_) or type_ is object:
        return {"type": "object"}
    if replaced_class(type_):
        return {"type": "string"}
    raise NotConvertible(f"{type_.__qualname__} can't be converted: {_advice_for(type_)}")


def _advice_for(type_: type) -> str:
    for base in TO_BASE:
        if issubclass(type_, base):
            return f"annotate {base.__name__}, which accepts it as well"
    if issubclass(type_, Real):  # such as numpy's numbers
        return "annotate int or float, which accept it as well"
    if type_.__module__.partition(".")[0] == "pydantic":
        return "make it a field of a pydantic model"
    return _SEND_AN_ID


def _advice_after(error: str) -> str:
    if "Type unions" in error:
        return (
            "annotate one of them, or classes that JSON can distinguish, such as tagged msgspec classes or a "
            "pydantic model with a discriminator"
        )
    if "FieldInfo" in error:  # from a default of `pydantic.Field(…)`
        return "give each field of a pydantic dataclass a plain default, or make it a pydantic model"
    return _SEND_AN_ID
