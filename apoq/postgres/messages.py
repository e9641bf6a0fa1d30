"""Messages of database errors."""

from __future__ import annotations


def brief(error: BaseException) -> str:
    """Return the first line of an error's message, without the text that SQLAlchemy adds."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
