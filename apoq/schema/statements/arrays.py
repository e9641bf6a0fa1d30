"""Arrays of numbers as bound parameters, by the hundred."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import BigInteger, Cast, Text, bindparam, cast
from sqlalchemy.dialects.postgresql import ARRAY


def bigints(name: str) -> Cast[Any]:
    """Bind an array of whole numbers, which is given as `array_text` of them.

    The driver looks at each element of a list to find its type, which takes twenty times as long.
    """
    return cast(bindparam(name, type_=Text), ARRAY(BigInteger))


def array_text(numbers: Iterable[float]) -> str:
    """Write numbers as PostgreSQL does an array."""
    return f"{{{','.join(map(repr, numbers))}}}"
