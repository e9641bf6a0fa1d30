"""Values of other libraries' classes, and Python's own for them."""

from __future__ import annotations

import builtins
from numbers import Integral, Rational, Real
from operator import index
from typing import Final


def plain_number(value: object) -> int | float | None:
    """Return a number of any class, such as numpy's, as an int or a float; None if it is not a number.

    A bool is none, nor is a fraction or a Decimal, for which a float is too short.
    """
    if isinstance(value, bool):
        return None
    try:
        if isinstance(value, Integral):
            return int(index(value))
        if isinstance(value, Real) and not isinstance(value, Rational):
            return float(value)
    except TypeError:  # numpy's timedelta64 says that it is a whole number
        pass
    return None


MAPPED: Final = "a mapped object belongs to its session: give its id, and load it when the task runs"


def is_mapped(kind: type) -> bool:
    """Tell whether a class is mapped by SQLAlchemy, whichever way."""
    return hasattr(kind, "__mapper__")


def class_name(value: object) -> str:
    """Name the class of a value in a message; with its module if it is a namesake, such as numpy's `bool`."""
    kind = type(value)
    is_namesake = kind.__module__ != "builtins" and hasattr(builtins, kind.__qualname__)
    return f"{kind.__module__}.{kind.__qualname__}" if is_namesake else kind.__qualname__
