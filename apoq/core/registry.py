"""The processors of a worker, by the type of task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial, wraps
from typing import Any, ClassVar, TypedDict

from apoq.core.failures import FollowUp, OnFailure, follow_up
from apoq.core.imported import Importable, importable
from apoq.core.limits import Limit, checked_limit
from apoq.core.payload import check_type
from apoq.core.results import ResultEncoder, result_encoder
from apoq.core.retry import DEFAULT_RETRY_LIMIT, RetryDelay, RetryPolicy, exponential_backoff, time_limit
from apoq.errors import InvalidProcessor, InvalidTask, glimpse

Middleware = Callable[[Any], AbstractContextManager[object]]
"""Callable that takes a running task and returns a context manager, in which the processor is called."""


class ProcessorOptions(TypedDict, total=False):
    """Options of a processor; see `Worker.use`."""

    retry_limit: int
    retry_delay: RetryDelay
    timeout: float | timedelta | None
    on_failure: OnFailure | None
    keep_result: bool
    max_result_size: int | None
    limit: Limit | None
    isolated: bool


class Running:
    """Base of the running tasks that processors receive."""

    __slots__ = ()

    data: Any
    is_async: ClassVar[bool]
    """Whether it is for coroutine functions."""


@dataclass(frozen=True, slots=True)
class Processor:
    """The function for a type of task, how its failures are retried, and how long it may take."""

    function: Callable[[Any], Any]
    policy: RetryPolicy
    is_coroutine: bool
    timeout: float | None = None
    """In seconds."""
    limit: Limit | None = None
    """How many of its tasks may run at once."""
    result_encoder: ResultEncoder | None = None
    """None: what the function returns is ignored."""
    on_failure: FollowUp | None = None
    """The task that is added when a task fails for good."""
    importable: Importable | None = None
    """The function that a process of its own imports and calls, if its tasks are isolated."""
    is_plain: bool = field(init=False)
    """Whether it is a plain function that is called in the worker's process."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_plain", not self.is_coroutine and self.importable is None)

    def policy_for(self, retry_limit: int | None, retry_delay: timedelta | None) -> RetryPolicy:
        """Return the policy for a task, which may have a limit or a delay of its own."""
        if retry_limit is None and retry_delay is None:
            return self.policy
        return RetryPolicy(
            # Every value in the row must make a valid policy: an error here would stop the whole claim.
            self.policy.limit if retry_limit is None else max(0, retry_limit),
            self.policy.delay if retry_delay is None else lambda _fail_count: retry_delay,
        )


def make_processor(
    type_: str,
    function: Callable[..., Any],
    *,
    retry_limit: int = DEFAULT_RETRY_LIMIT,
    retry_delay: RetryDelay = exponential_backoff,
    timeout: float | timedelta | None = None,
    on_failure: OnFailure | None = None,
    keep_result: bool = False,
    max_result_size: int | None = None,
    limit: Limit | None = None,
    isolated: bool = False,
) -> Processor:
    """Make the processor for a type; `InvalidProcessor` or `InvalidLimit` if an argument is invalid."""
    check_processed(type_)
    if not callable(function):
        raise InvalidProcessor(
            f"the processor for {type_!r} must be a function that takes the task, got {function!r}"
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise InvalidProcessor(
            f"the processor for {type_!r} must not be a generator function, because calling it runs nothing: "
            "remove its `yield`"
        )
    policy = RetryPolicy(retry_limit, retry_delay)
    try:
        seconds = None if timeout is None else time_limit(timeout).total_seconds()
    except (TypeError, ValueError) as error:
        raise InvalidProcessor(str(error)) from None
    encoder = result_encoder(keep_result, max_result_size)
    its = follow_up(on_failure, type_)
    return Processor(
        function,
        policy,
        is_coroutine_function(function),
        seconds,
        checked_limit(limit),
        encoder,
        its,
        _isolated(type_, function, isolated),
    )


def _isolated(type_: str, function: Callable[..., Any], isolated: object) -> Importable | None:
    if not isinstance(isolated, bool):
        raise InvalidProcessor(f"isolated must be True or False, got {glimpse(isolated)}")
    if not isolated:
        return None
    if is_coroutine_function(function):
        raise InvalidProcessor(
            f"the isolated processor for {type_!r} must be a plain function, got the coroutine function "
            f"{glimpse(function)}: call `asyncio.run` in a plain function, or remove isolated=True"
        )
    return importable(function, f"the isolated processor for {type_!r}")


def check_processed(type_: str) -> None:
    """Raise `InvalidProcessor` if no task can have this type."""
    try:
        check_type(type_)
    except InvalidTask as error:
        raise InvalidProcessor(str(error)) from None


class Registry:
    """The processors of one worker, by type: for all of its queues, or for one of them."""

    def __init__(
        self, middleware: Middleware | Iterable[Middleware] = (), *, keeps_completed: bool = True
    ) -> None:
        """`keeps_completed`: whether completed tasks, and so their results, are kept for some time."""
        self._keeps_completed = keeps_completed
        self._middleware = (middleware,) if callable(middleware) else tuple(middleware)
        for each in self._middleware:
            if not callable(each):
                raise TypeError(
                    "middleware must be a function that takes a running task and returns a context manager, "
                    f"or a list of such functions, got {each!r}"
                )
        self._everywhere: dict[str, Processor] = {}
        self._by_queue: dict[Hashable, dict[str, Processor]] = {}
        self.version = 0
        """Increased when a processor is registered."""

    def importable_middleware(self) -> list[Importable]:
        """Return the middleware as functions to import; `InvalidProcessor` if one can't be imported."""
        return [
            importable(each, "the middleware of a worker with isolated tasks") for each in self._middleware
        ]

    def of(self, queue: Hashable) -> Mapping[str, Processor]:
        """Return the processors for a queue, by type."""
        return self._by_queue.get(queue, self._everywhere)

    def use(self, type_: str, processor: Processor) -> None:
        """Register a processor for all queues; `InvalidProcessor` if one of them has one for this type."""
        self.check_results(type_, processor)
        for queue in (None, *self._by_queue):
            self.check_free(queue, type_)
        processor = self._within_middleware(processor)
        # New dicts: the claimer reads them on another thread.
        self._everywhere = {**self._everywhere, type_: processor}
        self._by_queue = {
            queue: {**processors, type_: processor} for queue, processors in self._by_queue.items()
        }
        self.version += 1

    def put(self, queue: Hashable, type_: str, processor: Processor, *, replaces: bool = False) -> None:
        """Register a processor for one queue; `InvalidProcessor` if it has one, unless that is replaced."""
        self.check_results(type_, processor)
        if not replaces:
            self.check_free(queue, type_)
        processors = {**self.of(queue), type_: self._within_middleware(processor)}
        self._by_queue = {**self._by_queue, queue: processors}
        self.version += 1

    def check_free(self, queue: Hashable, type_: str) -> None:
        """Raise `InvalidProcessor` if the type has a processor in this queue."""
        if found := self.of(queue).get(type_):
            raise InvalidProcessor(
                f"the type {type_!r} has a processor already, {found.function!r}: register only one, "
                "by `use` or `@queue.task`"
            )

    def check_results(self, type_: str, processor: Processor) -> None:
        """Raise `InvalidProcessor` if the processor keeps its results, and the worker no completed tasks."""
        if processor.result_encoder is not None and not self._keeps_completed:
            raise InvalidProcessor(
                f"the processor for {type_!r} has keep_result=True, but its worker has keep_completed=0, "
                "which deletes each task when it completes, with its result: raise keep_completed, or remove "
                "keep_result"
            )

    def _within_middleware(self, processor: Processor) -> Processor:
        if processor.importable is not None:
            self.importable_middleware()
        function = processor.function
        for middleware in reversed(self._middleware):
            function = _within(middleware, function, is_coroutine=processor.is_coroutine)
        return replace(processor, function=function)


def _within(
    middleware: Middleware, function: Callable[[Any], Any], *, is_coroutine: bool
) -> Callable[[Any], Any]:
    @wraps(function)
    def call(task: Any) -> Any:
        with middleware(task):
            return function(task)

    @wraps(function)
    async def call_coroutine(task: Any) -> Any:
        with middleware(task):
            return await function(task)

    return call_coroutine if is_coroutine else call


def is_coroutine_function(function: Callable[..., Any]) -> bool:
    """Return whether calling the function returns a coroutine."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object whose __call__ is a coroutine function
    )
