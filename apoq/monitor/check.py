"""What `apoq doctor` finds, and how to mend it."""

from __future__ import annotations

from typing import Final, NamedTuple

OK: Final = "ok"
WARNING: Final = "warning"
"""Worth a look; it works nevertheless."""
BAD: Final = "bad"
"""To be mended."""


class Finding(NamedTuple):
    """One of them."""

    level: str
    subject: str
    text: str
    cure: str = ""
