"""Which processor works which type of task."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, wraps
from typing import Any

from apoq.errors import InvalidProcessor, InvalidTask
from apoq.payload import check_type
from apoq.retry import DEFAULT_RETRY_LIMIT, RetryDelay, RetryPolicy, exponential_backoff, time_limit

Around = Callable[[Any], AbstractContextManager[object]]
"""Answers, for a running task, a context manager in which its processor is called."""


@dataclass(frozen=True, slots=True)
class Processor:
    """A function that works a type of task, how its failures are retried, and how long it may take."""

    function: Callable[[Any], Any]
    policy: RetryPolicy
    is_coroutine: bool
    timeout: float | None = None
    """In seconds."""

    def policy_for(self, retry_limit: int | None, retry_delay: timedelta | None) -> RetryPolicy:
        """Answer the policy for a task, which may have a limit or a delay of its own."""
        if retry_limit is None and retry_delay is None:
            return self.policy
        return RetryPolicy(
            # Whatever a row says makes a policy: one that raised here would stop the whole claim.
            self.policy.limit if retry_limit is None else max(0, retry_limit),
            self.policy.delay if retry_delay is None else lambda _fail_count: retry_delay,
        )


class Registry:
    """The processors of one worker."""

    def __init__(self, around: Around | None = None) -> None:
        if around is not None and not callable(around):
            raise TypeError(f"around answers a context manager for a running task, not {around!r}")
        self._around = around
        self._processors: dict[str, Processor] = {}

    def use(
        self,
        type_: str,
        function: Callable[[Any], Any],
        *,
        retry_limit: int = DEFAULT_RETRY_LIMIT,
        retry_delay: RetryDelay = exponential_backoff,
        timeout: float | timedelta | None = None,
    ) -> None:
        """Configure the processor of a type; `InvalidProcessor` where it can't be, or has one already."""
        try:
            check_type(type_)
        except InvalidTask as error:
            raise InvalidProcessor(str(error)) from None
        if not callable(function):
            raise InvalidProcessor(f"the processor of {type_!r} is a function of the task, not {function!r}")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise InvalidProcessor(
                f"the processor of {type_!r} is a generator function, of which a call runs nothing: "
                "leave out its `yield`"
            )
        if type_ in self._processors:
            raise InvalidProcessor(
                f"the type {type_!r} has a processor already, {self._processors[type_].function!r}: "
                "call `use` once for each type"
            )
        policy = RetryPolicy(retry_limit, retry_delay)
        try:
            limit = None if timeout is None else time_limit(timeout).total_seconds()
        except (TypeError, ValueError) as error:
            raise InvalidProcessor(f"timeout: {error}") from None
        is_coroutine = _is_coroutine(function)
        if self._around is not None:
            function = _within(self._around, function, is_coroutine=is_coroutine)
        processor = Processor(function, policy, is_coroutine, limit)
        # A new dict: the claimer reads it on another thread.
        self._processors = {**self._processors, type_: processor}

    def __getitem__(self, type_: str) -> Processor:
        return self._processors[type_]

    @property
    def types(self) -> list[str]:
        """The configured types."""
        return list(self._processors)


def _within(around: Around, function: Callable[[Any], Any], *, is_coroutine: bool) -> Callable[[Any], Any]:
    @wraps(function)
    def call(task: Any) -> Any:
        with around(task):
            return function(task)

    @wraps(function)
    async def call_coroutine(task: Any) -> Any:
        with around(task):
            return await function(task)

    return call_coroutine if is_coroutine else call


def _is_coroutine(function: Callable[[Any], Any]) -> bool:
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object whose __call__ is a coroutine function
    )
