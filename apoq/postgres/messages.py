"""What an error of the database says."""

from __future__ import annotations


def brief(error: BaseException) -> str:
    """Return the first line of an error's message, without what SQLAlchemy adds to it."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
