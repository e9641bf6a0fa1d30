"""Which function processes which type of task, said as Pyramid's views are."""

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
from apoq.pyramid.application import Application
from apoq.pyramid.settings import Misconfigured

F = TypeVar("F", bound=Callable[..., Any])

CATEGORY: Final = "apoq tasks"

_NO_COROUTINE: Final = (
    "is a coroutine function, and Pyramid's requests belong to a thread: make it a plain function"
)


def add_apoq_task(
    config: Any,
    function: Callable[..., Any] | str,
    type: str | None = None,
    **options: Unpack[ProcessorOptions],
) -> None:
    """Process tasks of this type with ``function(task, request)``, or what a dotted name leads to.

    The default type is the function's own dotted name. The options are those of `Worker.use`. Two functions
    for one type are a conflict, as two views for one URL are.
    """
    found: Any = config.maybe_dotted(function)
    if isinstance(found, TypedTask):
        raise Misconfigured(f"{found!r} is no function of a task and a request: config.add_apoq_queue(queue)")
    if not callable(found):
        raise Misconfigured(f"add_apoq_task takes a function of a task and a request, not {glimpse(found)}")
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
    """Work a queue of typed tasks, too, or what a dotted name leads to.

    Each is processed with a request that is the current one, `pyramid.threadlocal.get_current_request()`.
    """
    found = config.maybe_dotted(queue)
    if not isinstance(found, Queue):
        raise Misconfigured(f"add_apoq_queue takes a Queue, such as Queue('emails'), not {glimpse(found)}")

    def register() -> None:
        queues = Application.of(config.registry).queues
        if any(queue is found for queue in queues):
            return
        queues.append(found)
        # Only now, for a scan may just have imported them.
        for type_, task in found.tasks.items():
            if task.processor.is_coroutine:
                raise Misconfigured(f"{type_} {_NO_COROUTINE}")
            introspectable = config.introspectable(
                CATEGORY, (found, type_), f"{type_}: {task!r}", "apoq task"
            )
            introspectable.update({"type": type_, "function": task.function, "queue": found})
            config.action(None, introspectables=(introspectable,))

    config.action(None, register)


class apoq_task:  # noqa: N801 - as view_config is
    """Have `config.scan()` find a function of ``(task, request)`` that processes tasks of this type.

    The same as `config.add_apoq_task(function, type, …)`.
    """

    def __init__(self, type: str | None = None, **options: Unpack[ProcessorOptions]) -> None:
        if callable(type):
            raise Misconfigured("write the decorator with parentheses: @apoq_task()")
        self._type = type
        self._options = options

    def __call__(self, function: F) -> F:
        """Note the function, and leave it as it is."""

        def found(context: Any, _name: str, function: F) -> None:
            config = context.config.with_package(info.module)
            if not hasattr(config, "add_apoq_task"):
                raise Misconfigured('config.include("apoq.pyramid") comes before config.scan()')
            config.add_apoq_task(function, self._type, _info=info.codeinfo, **self._options)

        info = venusian.attach(function, found, category="pyramid")
        return function


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{function.__module__}.{name}"


def _processor(function: Callable[..., Any], name: str) -> Callable[[Any], Any]:
    if is_coroutine_function(function):
        raise Misconfigured(f"{name} {_NO_COROUTINE}")
    try:
        inspect.signature(function).bind("task", "request")
    except (TypeError, ValueError):
        raise Misconfigured(
            f"{name} is called with the running task and a request, as a view is with its context and a "
            "request: let it take them, `(task, request)`"
        ) from None

    @wraps(function)
    def process(task: Any) -> Any:
        return function(task, get_current_request())

    return process
