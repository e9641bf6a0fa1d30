"""A function's arguments as JSON, by their names, and back, by its annotations.

msgspec converts them. It is imported when the first typed task is made, for those who have none.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from inspect import BoundArguments, Parameter, Signature
from typing import Any, Final, get_type_hints
from uuid import UUID

from apoq.errors import InvalidData, InvalidProcessor, InvalidTask, MismatchedData, glimpse
from apoq.registry import Running

_RICH: Final = (bytes, bytearray, datetime, date, time, timedelta, UUID, Decimal)
"""What JSON has no values for, and is compared with the annotations before it becomes text."""


class UnknownAnnotation(InvalidProcessor):
    """An annotation names what isn't there; the module may well define it further down."""


class Arguments:
    """How the arguments of a function travel."""

    follow_task = False
    """Whether the function gets the running task before them."""

    def __init__(self, function: Callable[..., Any], name: str, *, is_coroutine: bool) -> None:
        """Look at a task's function; `InvalidProcessor` where an argument of it couldn't travel."""
        self._name = name
        signature = _signature(function, name)
        parameters = list(signature.parameters.values())
        for parameter in parameters[1:]:
            _check_kind(parameter, name)
        annotations = _annotations(function, name)
        if parameters and _is_running(annotations.get(parameters[0].name)):
            self.follow_task = True
            _check_running(annotations[parameters.pop(0).name], name, is_coroutine=is_coroutine)
        self._types: dict[str, Any] = {}
        self._required: list[str] = []
        self._rest = ""
        self._rest_type: Any = None
        for parameter in parameters:
            _check_kind(parameter, name)
            type_ = annotations.get(parameter.name, Any)
            _check_type(type_, parameter.name, name)
            if parameter.kind is Parameter.VAR_KEYWORD:
                self._rest, self._rest_type = parameter.name, type_
                continue
            self._types[parameter.name] = type_
            if parameter.default is Parameter.empty:
                self._required.append(parameter.name)
        self._signature = Signature([_shown(parameter, annotations) for parameter in parameters])

    def write(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Answer the given arguments of a call as JSON; `InvalidTask` where they don't fit."""
        return self._write_bound(self._signature.bind, args, kwargs)

    def write_some(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Answer some of a call's arguments as JSON, to look for the call by them; raises as `write` does."""
        return self._write_bound(self._signature.bind_partial, (), kwargs)

    def _write_bound(
        self, bind: Callable[..., BoundArguments], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        try:
            given = bind(*args, **kwargs).arguments
        except TypeError as error:
            raise InvalidTask(f"{self._name}() {error}: its parameters are {self._signature}") from None
        given |= given.pop(self._rest, {})
        return {name: self._write(name, value) for name, value in given.items()}

    def read(self, data: Any) -> dict[str, Any]:
        """Answer the arguments that a task's data holds; `MismatchedData` where they don't fit."""
        if not isinstance(data, dict):
            raise MismatchedData(
                f"the data of {self._name!r} is an object of its arguments, such as "
                f"{{'user_id': 7}}, not {glimpse(data)}"
            )
        arguments = {name: self._read(name, value) for name, value in data.items()}
        for name in self._required:
            if name not in arguments:
                raise MismatchedData(
                    f"the argument {name!r} of {self._name!r} is missing in the task's data: where the "
                    "parameter is new, give it a default until tasks of before are done"
                )
        return arguments

    def _write(self, name: str, value: Any) -> Any:
        type_ = self._type(name)
        if type_ is Any:
            if not isinstance(value, _JSON):
                raise InvalidData(
                    f"data[{name!r}]",
                    f"{type(value).__qualname__} is not JSON, and converted only if {self._name!r} annotates "
                    f"its parameter: {glimpse(value)}",
                )
            return value
        try:
            try:
                plain = _plain(value, _RICH)
                # Whether it is what the annotation says, and could be read.
                _convert(plain, type_, _RICH)
            except TypeError:
                # These can't be keys of a JSON object before they are text.
                plain = _plain(value)
                _convert(plain, type_)
            return _plain(plain)
        except (TypeError, ValueError, RecursionError, _Unsupported) as error:
            path, reason = _explain(error)
            raise InvalidData(f"data[{name!r}]{path}", f"{reason}, for {self._name!r}") from error.__cause__

    def _read(self, name: str, value: Any) -> Any:
        type_ = self._type(name)
        if type_ is None:
            raise MismatchedData(
                f"{self._name!r} has no parameter for the argument {name!r} of the task's data: where it is "
                "gone, take it and ignore it until tasks of before are done"
            )
        if type_ is Any:
            return value
        try:
            return _convert(value, type_)
        except (TypeError, ValueError, RecursionError, _Unsupported) as error:
            path, reason = _explain(error)
            at = path and f", at {name}{path}"
            raise MismatchedData(
                f"the argument {name!r} of {self._name!r} doesn't fit: {reason}{at}: where the "
                "parameter has changed, take its old form, too, until tasks of before are done"
            ) from error.__cause__

    def _type(self, name: str) -> Any:
        return self._types.get(name, self._rest_type)


_JSON = (type(None), bool, int, float, str, list, tuple, dict)


class _Unsupported(Exception):
    """A value, or a type, that has no form in JSON."""


def _signature(function: Callable[..., Any], name: str) -> Signature:
    try:
        return inspect.signature(function)
    except NameError as error:  # from Python 3.14 on, which evaluates the annotations here
        raise _unknown(name, error) from None
    except (TypeError, ValueError) as error:
        raise InvalidProcessor(f"the parameters of {name!r} can't be known: {error}") from None


def _annotations(function: Callable[..., Any], name: str) -> Mapping[str, Any]:
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function):
        function = type(function).__call__
    try:
        hints = get_type_hints(function, include_extras=True)
        return {of: Any if type_ is object else type_ for of, type_ in hints.items()}
    except NameError as error:
        raise _unknown(name, error) from None
    except (AttributeError, SyntaxError, TypeError) as error:
        raise InvalidProcessor(f"the annotations of {name!r} can't be read: {error}") from None


def _unknown(name: str, error: NameError) -> UnknownAnnotation:
    return UnknownAnnotation(
        f"the annotations of {name!r}, by which its arguments are converted, can't be read: {error}: "
        "import or define it at the top level of its module, not under TYPE_CHECKING alone"
    )


def _shown(parameter: Parameter, annotations: Mapping[str, Any]) -> Parameter:
    return parameter.replace(annotation=annotations.get(parameter.name, Parameter.empty))


def _check_kind(parameter: Parameter, name: str) -> None:
    match parameter.kind:
        case Parameter.VAR_POSITIONAL:
            raise InvalidProcessor(
                f"{name!r} takes *{parameter.name}, and arguments travel by their names: give it a parameter "
                "for each, or one that is a list"
            )
        case Parameter.POSITIONAL_ONLY:
            raise InvalidProcessor(
                f"the parameter {parameter.name!r} of {name!r} is positional-only, and arguments travel by "
                "their names: leave out the `/`"
            )
    if parameter.name in {"self", "cls"} and parameter.annotation is Parameter.empty:
        raise InvalidProcessor(
            f"{name!r} is a method, whose {parameter.name!r} can't travel: make it a function or a "
            "staticmethod"
        )


def _check_running(type_: type[Running], name: str, *, is_coroutine: bool) -> None:
    if type_.is_async != is_coroutine:
        kind, function = ("AsyncRunningTask", "coroutine") if is_coroutine else ("RunningTask", "plain")
        raise InvalidProcessor(
            f"{name!r} is a {function} function, so the task that it gets is annotated {kind}"
        )


def _check_type(type_: Any, parameter: str, name: str) -> None:
    if _is_running(type_):
        raise InvalidProcessor(f"{name!r} gets the running task as its first parameter, not as {parameter!r}")
    import msgspec  # noqa: PLC0415

    # A schema is made of all that the type consists of.
    try:
        msgspec.json.schema_components([type_], schema_hook=_schema)
    except NameError as error:
        raise _unknown(name, error) from None
    except Exception as error:  # noqa: BLE001 - whatever it is, the type can't be converted
        raise InvalidProcessor(
            f"the parameter {parameter!r} of {name!r} can't travel as JSON: {error}: give what stands for "
            "it, such as an id"
        ) from None


def _schema(type_: type) -> dict[str, Any]:
    if _is_model(type_) or type_ is object:
        return {"type": "object"}
    raise _Unsupported(f"there is no conversion for {type_.__qualname__}")


def _plain(value: Any, kept: tuple[type, ...] = ()) -> Any:
    import msgspec  # noqa: PLC0415

    return msgspec.to_builtins(value, str_keys=True, builtin_types=kept, enc_hook=_encode)


def _convert(value: Any, type_: Any, kept: tuple[type, ...] = ()) -> Any:
    import msgspec  # noqa: PLC0415

    try:
        return msgspec.convert(value, type_, str_keys=True, builtin_types=kept, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ValueError(*error.args) from error.__cause__


def _encode(value: Any) -> Any:
    if _is_model(type(value)):
        return value.model_dump(mode="json", by_alias=True, round_trip=True)
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, such as Markup
    raise _Unsupported(f"{type(value).__qualname__} has no form in JSON: {glimpse(value)}")


def _decode(type_: Any, value: Any) -> Any:
    if type_ is object:
        return value
    if _is_model(type_):
        # From text, as its strict fields want it.
        return type_.model_validate_json(json.dumps(value))
    raise _Unsupported(f"there is no conversion for {type_.__qualname__}")


def _is_model(type_: Any) -> bool:
    """Tell whether it is a pydantic model, without importing pydantic."""
    return isinstance(type_, type) and hasattr(type_, "model_validate_json") and hasattr(type_, "model_dump")


def _is_running(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, Running)


def _explain(error: BaseException) -> tuple[str, str]:
    """Part msgspec's message into the path within the argument, and what is wrong there."""
    if isinstance(error, RecursionError):
        return "", "it contains itself, or is nested too deep for JSON"
    reason, _, path = str(error).rpartition(" - at `$")
    return (path.rstrip("`"), reason) if reason else ("", str(error))
