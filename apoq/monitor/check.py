"""What `apoq doctor` finds, and what to do about it."""

from __future__ import annotations

from typing import Final, NamedTuple

OK: Final = "ok"
WARNING: Final = "warning"
"""A warning: apoq works, but something is not as it should be."""
BAD: Final = "bad"
"""An error: something doesn't work."""


class Finding(NamedTuple):
    """What a check found, with what to do about it (`cure`)."""

    level: str
    subject: str
    text: str
    cure: str = ""
