"""Large arrays of numbers as bound parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import BigInteger, Cast, Text, bindparam, cast
from sqlalchemy.dialects.postgresql import ARRAY


def bigints(name: str) -> Cast[Any]:
    """Return a bound array of whole numbers, whose value must be given as `array_text`.

    With a list, the driver looks at each element to find its type, which takes twenty times as long.
    """
    return cast(bindparam(name, type_=Text), ARRAY(BigInteger))


def array_text(numbers: Iterable[float]) -> str:
    """Return numbers as the text of a PostgreSQL array."""
    return f"{{{','.join(map(repr, numbers))}}}"
