"""Knows whether the caller is a processor, on whichever thread or event loop it runs."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

CURRENT_TYPE: Final[ContextVar[str | None]] = ContextVar("apoq_current_type", default=None)
"""The type of the task that runs in this context; None outside of processors.

asyncio copies the context to the tasks that a coroutine starts, and `asyncio.to_thread` to its thread.
"""


def refuse_in_processor(what: str, instead: str) -> None:
    """Raise RuntimeError if the caller is a processor; the message says what to do instead."""
    type_ = CURRENT_TYPE.get()
    if type_ is not None:
        raise RuntimeError(f"{what} must not be called by a processor, here that of {type_!r}: {instead}")
