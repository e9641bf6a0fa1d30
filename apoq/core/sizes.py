"""Numbers of bytes as people write them."""

from __future__ import annotations

import re
from typing import Final

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(?:i?b)?|b|bytes)?", re.ASCII | re.IGNORECASE)
_UNITS: Final = ("", "k", "m", "g", "t")


def read_size(text: str) -> int:
    """Read 512M, 512 MB, 1.5 GiB or 2g, whose units are powers of 1,024, or a plain number of bytes.

    ValueError if the text is not a size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a size: write 512M or 2G")
    number, unit = found.groups(default="")
    try:
        return int(float(number) * 1024 ** _UNITS.index(unit.lower()))
    except OverflowError:
        raise ValueError(f"a size of {len(number)} digits is too large") from None
