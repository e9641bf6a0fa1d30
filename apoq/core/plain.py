"""Recognises values of other libraries' classes, such as numpy's numbers and mapped objects."""

from __future__ import annotations

import builtins
from numbers import Integral, Rational, Real
from operator import index
from typing import Final


def plain_number(value: object) -> int | float | None:
    """Return a number of any class, such as numpy's, as an int or a float; None if it is not a number.

    A bool doesn't count as a number. Neither does a fraction or a Decimal, which a float can't hold exactly.
    """
    if isinstance(value, bool):
        return None
    try:
        if isinstance(value, Integral):
            return int(index(value))
        if isinstance(value, Real) and not isinstance(value, Rational):
            return float(value)
    except TypeError:  # from numpy's timedelta64, which claims to be a whole number
        pass
    return None


MAPPED: Final = "a mapped object belongs to its session: pass its id, and load it when the task runs"


def is_mapped(kind: type) -> bool:
    """Return whether a class is mapped by SQLAlchemy, in any style."""
    return hasattr(kind, "__mapper__")


def class_name(value: object) -> str:
    """Return the name of a value's class for a message; with its module if a builtin has the same name."""
    kind = type(value)
    is_namesake = kind.__module__ != "builtins" and hasattr(builtins, kind.__qualname__)
    return f"{kind.__module__}.{kind.__qualname__}" if is_namesake else kind.__qualname__
