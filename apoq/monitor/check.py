"""The findings of `apoq doctor`."""

from __future__ import annotations

from typing import Final, NamedTuple

OK: Final = "ok"
WARNING: Final = "warning"
"""A warning: apoq works, but something is not as it should be."""
BAD: Final = "bad"
"""An error: something doesn't work."""


class Finding(NamedTuple):
    """The result of a check, with the steps to take (`cure`)."""

    level: str
    subject: str
    text: str
    cure: str = ""
