"""Registration of processors, in the way of Pyramid's views."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Final, TypeVar, Unpack

import venusian
from pyramid.threadlocal import get_current_request

from apoq.client.queue import Queue
from apoq.client.typed_task import TypedTask
from apoq.core.registry import ProcessorOptions, is_coroutine_function, make_processor
from apoq.errors import InvalidProcessor, glimpse
from apoq.pyramid.application import NO_COROUTINE, Application
from apoq.pyramid.settings import Misconfigured

F = TypeVar("F", bound=Callable[..., Any])

CATEGORY: Final = "apoq tasks"


def add_apoq_task(
    config: Any,
    function: Callable[..., Any] | str,
    type: str | None = None,
    **options: Unpack[ProcessorOptions],
) -> None:
    """Process tasks of this type with ``function(task, request)``.

    Two functions for the same type are a configuration conflict, like two views for the same URL.

    Args:
        config: The configurator; omit it when you call ``config.add_apoq_task``.
        function: The function, or its dotted name. It takes the running task and a request.
        type: The type of the tasks. By default the function's dotted name.
        **options: The options of `Worker.use`: `retry_limit`, `retry_delay`, `timeout`, `keep_result`,
                `max_result_size`, `on_failure` and `limit`.

    Raises:
        Misconfigured: If the function or an option is invalid.
    """
    found: Any = config.maybe_dotted(function)
    if isinstance(found, TypedTask):
        raise Misconfigured(
            f"function must take a task and a request, got {found!r}: for typed tasks, call "
            "config.add_apoq_queue(queue)"
        )
    if not callable(found):
        raise Misconfigured(f"function must be one that takes a task and a request, got {glimpse(found)}")
    name = _name_of(found)
    type = type or name
    try:
        make_processor(type, found, **options)
    except InvalidProcessor as error:
        raise Misconfigured(str(error)) from None
    processor = _processor(found, name)
    introspectable = config.introspectable(CATEGORY, type, f"{type}: {name}", "apoq task")
    introspectable.update({"type": type, "function": found, **options})

    def register() -> None:
        Application.of(config.registry).processors[type] = (processor, options)

    config.action((CATEGORY, type), register, introspectables=(introspectable,))


def add_apoq_queue(config: Any, queue: Queue | str) -> None:
    """Also run the typed tasks of this queue in the application's workers.

    Each runs with a new request, which `pyramid.threadlocal.get_current_request` returns.

    Args:
        config: The configurator; omit it when you call ``config.add_apoq_queue``.
        queue: The queue, or its dotted name.

    Raises:
        Misconfigured: If it is not a `Queue`, or if one of its typed tasks is a coroutine function.
    """
    found = config.maybe_dotted(queue)
    if not isinstance(found, Queue):
        raise Misconfigured(f"queue must be a Queue, such as Queue('emails'), got {glimpse(found)}")

    def register() -> None:
        queues = Application.of(config.registry).queues
        if any(queue is found for queue in queues):
            return
        queues.append(found)
        # Not earlier, because a scan may have imported the tasks after this call.
        for type_, task in found.tasks.items():
            if task.processor.is_coroutine:
                raise Misconfigured(f"{type_} {NO_COROUTINE}")
            introspectable = config.introspectable(
                CATEGORY, (found, type_), f"{type_}: {task!r}", "apoq task"
            )
            introspectable.update({"type": type_, "function": task.function, "queue": found})
            config.action(None, introspectables=(introspectable,))

    config.action(None, register)


class apoq_task:  # noqa: N801 - as view_config is
    """Decorator that registers a function as the processor of a type at ``config.scan()``.

    It does the same as ``config.add_apoq_task(function, type, …)``. The function is not changed.
    """

    def __init__(self, type: str | None = None, **options: Unpack[ProcessorOptions]) -> None:
        """Create the decorator.

        Args:
            type: The type of the tasks. By default the function's dotted name.
            **options: The options of `Worker.use`: `retry_limit`, `retry_delay`, `timeout`, `keep_result`,
                `max_result_size`, `on_failure` and `limit`.

        Raises:
            Misconfigured: If it is used without parentheses.
        """
        if callable(type):
            raise Misconfigured("@apoq_task must be used with parentheses: @apoq_task()")
        self._type = type
        self._options = options

    def __call__(self, function: F) -> F:
        """Attach the registration to the function, and return the function unchanged."""

        def found(context: Any, _name: str, function: F) -> None:
            config = context.config.with_package(info.module)
            if not hasattr(config, "add_apoq_task"):
                raise Misconfigured('config.include("apoq.pyramid") must be called before config.scan()')
            config.add_apoq_task(function, self._type, _info=info.codeinfo, **self._options)

        info = venusian.attach(function, found, category="pyramid")
        return function


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{function.__module__}.{name}"


def _processor(function: Callable[..., Any], name: str) -> Callable[[Any], Any]:
    if is_coroutine_function(function):
        raise Misconfigured(f"{name} {NO_COROUTINE}")
    try:
        inspect.signature(function).bind("task", "request")
    except (TypeError, ValueError):
        raise Misconfigured(
            f"{name} must take two arguments, the running task and a request: give it the parameters "
            "`(task, request)`"
        ) from None

    @wraps(function)
    def process(task: Any) -> Any:
        return function(task, get_current_request())

    return process
