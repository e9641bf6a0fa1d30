"""Converts the result of a typed task to JSON and back, by the function's return annotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apoq.core.annotations import check_type
from apoq.core.arguments import annotations_of, unknown_annotation
from apoq.core.conversion import ERRORS, NotConvertible, convert, explain
from apoq.core.results import NAME
from apoq.core.typed_values import to_json
from apoq.errors import InvalidProcessor, NoResult


class ReturnValue:
    """Converts what one function returns."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        """Inspect a function; `InvalidProcessor` if its return annotation can't be represented in JSON."""
        self._name = name
        self._type = annotations_of(function, name).get("return", Any)
        try:
            check_type(self._type)
        except NameError as error:
            raise unknown_annotation(name, error) from None
        except NotConvertible as error:
            raise InvalidProcessor(
                f"the return annotation of {name!r}, which keeps its results, can't be sent as JSON: {error}"
            ) from None

    def write(self, value: Any) -> Any:
        """Return a result as JSON; `InvalidData` if it doesn't fit the annotation or would change."""
        return to_json(
            value,
            self._type,
            NAME,
            used_by=f", returned by {self._name!r}",
            unconverted=f"and is converted only if {self._name!r} has a return annotation",
        )

    def read(self, document: Any) -> Any:
        """Return a stored result as the function has returned it; `NoResult` if it no longer fits."""
        if self._type is Any:
            return document
        try:
            return convert(document, self._type)
        except ERRORS as error:
            path, reason = explain(error)
            raise NoResult(
                f"the stored result of {self._name!r} doesn't fit its return annotation: {reason}"
                f"{path and f', at {NAME}{path}'}: if the annotation has changed, accept the old form as "
                "well, or read it with queue.result, which converts nothing"
            ) from error.__cause__
