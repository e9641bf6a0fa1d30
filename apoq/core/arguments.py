"""Converts a function's arguments to JSON, by name, and back, by the function's annotations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from inspect import BoundArguments, Parameter, Signature
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from apoq.core.annotations import check_type
from apoq.core.conversion import ERRORS, NotConvertible, convert, explain
from apoq.core.payload import encode
from apoq.core.registry import Running
from apoq.core.typed_values import to_json
from apoq.errors import InvalidArguments, InvalidData, InvalidProcessor, InvalidTask, glimpse


class UnknownAnnotation(InvalidProcessor):
    """An annotation uses a name that isn't defined (yet: the module may define it further down)."""


class Arguments:
    """Converts the arguments of one function to JSON and back."""

    follow_task = False
    """Whether the function takes the running task as its first parameter, before these arguments."""

    def __init__(self, function: Callable[..., Any], name: str, *, is_coroutine: bool) -> None:
        """Inspect a task's function; `InvalidProcessor` if one of its arguments can't be sent as JSON."""
        self._name = name
        signature = _signature(function, name)
        parameters = list(signature.parameters.values())
        for parameter in parameters[1:]:
            _check_kind(parameter, name)
        annotations = annotations_of(function, name)
        if parameters and _is_running(annotations.get(parameters[0].name)):
            self.follow_task = True
            _check_running(annotations[parameters.pop(0).name], name, is_coroutine=is_coroutine)
        self._types: dict[str, Any] = {}
        self._required: list[str] = []
        self._var_keyword = ""
        self._var_keyword_type: Any = None
        self._json_types: dict[str, frozenset[type]] = {}
        self._var_keyword_json_types: frozenset[type] = frozenset()
        for parameter in parameters:
            _check_kind(parameter, name)
            type_ = annotations.get(parameter.name, Any)
            _check_type(type_, parameter.name, name)
            if parameter.kind is Parameter.VAR_KEYWORD:
                self._var_keyword, self._var_keyword_type = parameter.name, type_
                self._var_keyword_json_types = _json_types(type_)
                continue
            self._types[parameter.name], self._json_types[parameter.name] = type_, _json_types(type_)
            if parameter.default is Parameter.empty:
                self._required.append(parameter.name)
        self.signature = Signature([_with_annotation(parameter, annotations) for parameter in parameters])

    def write(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the given arguments of a call as JSON; `InvalidTask` if they don't fit or would change."""
        return self._write_bound(self.signature.bind, args, kwargs)

    def write_some(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return some of a call's arguments as JSON, to find the call by them; raises what `write` raises."""
        return self._write_bound(self.signature.bind_partial, (), kwargs)

    def without_defaults(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON of a call's arguments without those that are equal to their defaults."""
        return {name: value for name, value in data.items() if not self._is_default(name, value)}

    def with_defaults(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments in a task's data as the function gets them, with defaults."""
        defaults = {
            name: parameter.default
            for name, parameter in self.signature.parameters.items()
            if parameter.default is not Parameter.empty
        }
        return {**defaults, **self.read(data)}

    def _is_default(self, name: str, value: Any) -> bool:
        parameter = self.signature.parameters.get(name)
        if parameter is None or parameter.default is Parameter.empty:
            return False
        try:
            return encode(self._write(name, parameter.default)) == encode(value)
        except InvalidData:
            return False  # not one that can be sent

    def _write_bound(
        self, bind: Callable[..., BoundArguments], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        try:
            given = bind(*args, **kwargs).arguments
        except TypeError as error:
            raise InvalidTask(f"{self._name}() {error}: its parameters are {self.signature}") from None
        given |= given.pop(self._var_keyword, {})
        return {name: self._write(name, value) for name, value in given.items()}

    def read(self, data: Any) -> dict[str, Any]:
        """Return the arguments in a task's data; `InvalidArguments` if they don't fit the function."""
        if not isinstance(data, dict):
            raise InvalidArguments(
                f"the data of {self._name!r} must be an object of its arguments, such as "
                f"{{'user_id': 7}}, got {glimpse(data)}"
            )
        arguments = {name: self._read(name, value) for name, value in data.items()}
        for name in self._required:
            if name not in arguments:
                raise InvalidArguments(
                    f"the argument {name!r} of {self._name!r} is missing in the task's data: if the "
                    "parameter is new, give it a default until the tasks added before it are done"
                )
        return arguments

    def _write(self, name: str, value: Any) -> Any:
        if type(value) in self._json_types.get(name, self._var_keyword_json_types):
            return value
        return to_json(
            value,
            self._type(name),
            f"data[{name!r}]",
            used_by=f", for {self._name!r}",
            unconverted=f"and is converted only if {self._name!r} annotates its parameter",
            none=": an id is None until its object is flushed",
        )

    def _read(self, name: str, value: Any) -> Any:
        type_ = self._type(name)
        if type_ is None:
            raise InvalidArguments(
                f"{self._name!r} has no parameter for the argument {name!r} of the task's data: if you "
                "removed it, accept and ignore it until the tasks added before are done"
            )
        if type_ is Any:
            return value
        try:
            return convert(value, type_)
        except ERRORS as error:
            path, reason = explain(error)
            at = path and f", at {name}{path}"
            raise InvalidArguments(
                f"the argument {name!r} of {self._name!r} doesn't fit: {reason}{at}: if the parameter has "
                "changed, accept its old form as well until the tasks added before are done"
            ) from error.__cause__

    def _type(self, name: str) -> Any:
        return self._types.get(name, self._var_keyword_type)


_JSON_SCALARS: Final = frozenset({NoneType, bool, int, float, str})
"""Types whose values are the same in JSON."""


def _json_types(type_: Any) -> frozenset[type]:
    """Return the types whose values need no conversion if the parameter has this annotation."""
    if type_ is Any:
        return _JSON_SCALARS
    members = get_args(type_) if get_origin(type_) in {Union, UnionType} else (type_,)
    return _JSON_SCALARS.intersection(member for member in members if isinstance(member, type))


def _signature(function: Callable[..., Any], name: str) -> Signature:
    try:
        return inspect.signature(function)
    except NameError as error:  # Python 3.14 and later evaluate the annotations here
        raise unknown_annotation(name, error) from None
    except (TypeError, ValueError) as error:
        raise InvalidProcessor(f"the parameters of {name!r} can't be read: {error}") from None


def annotations_of(function: Callable[..., Any], name: str) -> Mapping[str, Any]:
    """Return the annotations of a function; `UnknownAnnotation` if one of them can't be read yet."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function):
        function = type(function).__call__
    try:
        hints = get_type_hints(function, include_extras=True)
        return {of: Any if type_ is object else type_ for of, type_ in hints.items()}
    except NameError as error:
        raise unknown_annotation(name, error) from None
    except (AttributeError, SyntaxError, TypeError) as error:
        raise InvalidProcessor(f"the annotations of {name!r} can't be read: {error}") from None


def unknown_annotation(name: str, error: NameError) -> UnknownAnnotation:
    """Return the error for an annotation with a name that isn't defined."""
    return UnknownAnnotation(
        f"the annotations of {name!r}, by which its arguments are converted, can't be read: {error}: "
        "import or define it at the top level of its module, not under TYPE_CHECKING alone"
    )


def _with_annotation(parameter: Parameter, annotations: Mapping[str, Any]) -> Parameter:
    return parameter.replace(annotation=annotations.get(parameter.name, Parameter.empty))


def _check_kind(parameter: Parameter, name: str) -> None:
    match parameter.kind:
        case Parameter.VAR_POSITIONAL:
            raise InvalidProcessor(
                f"{name!r} takes *{parameter.name}, but arguments are sent by name: give it a parameter "
                "for each, or one that is a list"
            )
        case Parameter.POSITIONAL_ONLY:
            raise InvalidProcessor(
                f"the parameter {parameter.name!r} of {name!r} is positional-only, but arguments are sent by "
                "name: leave out the `/`"
            )
    if parameter.name in {"self", "cls"} and parameter.annotation is Parameter.empty:
        raise InvalidProcessor(
            f"{name!r} is a method, whose {parameter.name!r} can't be sent as JSON: make it a function or a "
            "staticmethod"
        )


def _check_running(type_: type[Running], name: str, *, is_coroutine: bool) -> None:
    if type_.is_async != is_coroutine:
        kind, function = ("AsyncRunningTask", "coroutine") if is_coroutine else ("RunningTask", "plain")
        raise InvalidProcessor(
            f"{name!r} is a {function} function, so its running task must be annotated {kind}"
        )


def _check_type(type_: Any, parameter: str, name: str) -> None:
    if _is_running(type_):
        raise InvalidProcessor(
            f"{name!r} must take the running task as its first parameter, not as {parameter!r}"
        )
    try:
        check_type(type_)
    except NameError as error:
        raise unknown_annotation(name, error) from None
    except NotConvertible as error:
        raise InvalidProcessor(
            f"the parameter {parameter!r} of {name!r} can't be sent as JSON: {error}"
        ) from None


def _is_running(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, Running)
