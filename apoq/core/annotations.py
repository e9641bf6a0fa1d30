"""Finds what of an annotation could never travel as JSON, before a value is given."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any, Final, get_args, get_type_hints

from apoq.core.conversion import TO_BASE, NoForm, is_model, stood_in
from apoq.core.plain import is_mapped

_SUCH_AS_AN_ID: Final = "give what stands for it, such as an id"


def check_type(type_: Any) -> None:
    """Raise `NoForm` for a type that values can't be converted to; NameError if its annotations name none."""
    import msgspec  # noqa: PLC0415

    _check_constraints(type_)
    for kind in _classes(type_, {}):
        _check_class(kind)
    # A schema is made of all that the type consists of.
    try:
        msgspec.json.schema_components([type_], schema_hook=_schema)
    except (NameError, NoForm):
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the type can't be converted
        raise NoForm(f"{error}: {_instead_after(str(error))}") from None


def _check_constraints(type_: Any) -> None:
    # Not those of a model's fields, which are checked when it is made.
    for constraint in getattr(type_, "__metadata__", ()):
        if type(constraint).__module__.partition(".")[0] in {"pydantic", "annotated_types"}:
            raise NoForm(
                f"{constraint!r} is pydantic's, and checked in its models only: make it a field of a model, "
                "or write msgspec.Meta(…)"
            )
    for argument in get_args(type_):
        _check_constraints(argument)


def _classes(type_: Any, seen: dict[int, Any]) -> Iterator[type]:
    """Walk through the classes that a type consists of, and those of their fields."""
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
    except Exception:  # noqa: BLE001 - msgspec reads them, too, and says what is wrong
        return []


_DECLARES: Final = ("__dataclass_fields__", "__struct_fields__", "__attrs_attrs__", "__total__", "_fields")
"""What a class has that declares its fields; the last two are of a TypedDict and of a NamedTuple."""


def _check_class(kind: type) -> None:
    if is_mapped(kind):
        raise NoForm(
            f"{kind.__qualname__} is a mapped class, whose objects belong to their session: give the id, and "
            "load the object in the function"
        )
    if is_model(kind):
        _check_aliases(kind)
    for field in getattr(kind, "__attrs_attrs__", ()):
        if field.name.startswith("_"):
            raise NoForm(
                f"{kind.__qualname__}.{field.name} is private, and msgspec leaves it out: rename the field"
            )


def _check_aliases(model: Any) -> None:
    own = model.__pydantic_decorators__
    if own.model_serializers or own.model_validators:
        return  # which may read what is written
    by_name = model.model_config.get("populate_by_name") or model.model_config.get("validate_by_name")
    for name, field in model.model_fields.items():
        written, read = field.serialization_alias or name, field.validation_alias or name
        is_read = written in getattr(read, "choices", [read]) or (by_name and written == name)
        if not is_read and not field.exclude:
            raise NoForm(
                f"{model.__qualname__}.{name} is written as {written!r} and read as {read!r}: give it an "
                "`alias=`, which is for both"
            )


def _schema(type_: type) -> dict[str, Any]:
    if is_model(type_) or type_ is object:
        return {"type": "object"}
    if stood_in(type_):
        return {"type": "string"}
    raise NoForm(f"there is no conversion for {type_.__qualname__}: {_instead_of(type_)}")


def _instead_of(type_: type) -> str:
    for base in TO_BASE:
        if issubclass(type_, base):
            return f"annotate {base.__name__}, for which one may be given"
    if issubclass(type_, Real):  # such as numpy's numbers
        return "annotate int or float, for which one may be given"
    if type_.__module__.partition(".")[0] == "pydantic":
        return "make it a field of a pydantic model"
    return _SUCH_AS_AN_ID


def _instead_after(error: str) -> str:
    if "Type unions" in error:
        return (
            "annotate one of them, or a class that says which it is, such as tagged msgspec classes or a "
            "pydantic model with a discriminator"
        )
    if "FieldInfo" in error:  # a default that is `pydantic.Field(…)`
        return "give each field of a pydantic dataclass a plain default, or make it a pydantic model"
    return _SUCH_AS_AN_ID
