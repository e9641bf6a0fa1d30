"""Knows whether the caller is a processor, on whichever thread or event loop it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

_IS_PROCESSOR: Final[ContextVar[bool]] = ContextVar("apoq_is_processor", default=False)
# A context variable, because asyncio copies the context to the tasks that a coroutine starts, and
# `asyncio.to_thread` to its thread.


def run_processors() -> None:
    """Note that the current thread or asyncio task does nothing but run processors.

    Once for all of them: to set a context variable for each task would take a fiftieth of a worker's time.
    """
    _IS_PROCESSOR.set(True)


@contextmanager
def running_processor() -> Iterator[None]:
    """Run one processor on the caller's thread."""
    token = _IS_PROCESSOR.set(True)
    try:
        yield
    finally:
        _IS_PROCESSOR.reset(token)


def refuse_in_processor(what: str, instead: str) -> None:
    """Raise RuntimeError if the caller is a processor; the message says what to do instead."""
    if _IS_PROCESSOR.get():
        raise RuntimeError(f"{what} must not be called by a processor: {instead}")
