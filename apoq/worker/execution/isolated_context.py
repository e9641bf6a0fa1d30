"""A context of its own for each task: the next in its slot doesn't find what it has set there."""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from contextvars import copy_context
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class IsolatedContext(Generic[T]):
    """Awaits a coroutine, each of whose steps is taken in a copy of the caller's context.

    As in an asyncio task of its own, but in the caller's.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, T]:
        context = copy_context()
        step = partial(self._coroutine.send, None)
        while True:
            try:
                awaited = context.run(step)
            except StopIteration as end:
                answer: T = end.value
                return answer
            try:
                step = partial(self._coroutine.send, (yield awaited))
            except BaseException as error:  # noqa: BLE001 - a cancellation, for example, is the coroutine's
                step = partial(self._coroutine.throw, error)
