"""Which function processes which type of task, said as Pyramid's views are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any, Final, TypedDict, TypeVar, Unpack

import venusian
from pyramid.threadlocal import get_current_request

from apoq.errors import InvalidProcessor
from apoq.pyramid.application import Application
from apoq.pyramid.settings import Misconfigured
from apoq.registry import Registry
from apoq.retry import RetryDelay

F = TypeVar("F", bound=Callable[..., Any])

CATEGORY: Final = "apoq tasks"


class TaskOptions(TypedDict, total=False):
    """What may be said of a type of task, as to `Worker.use`."""

    retry_limit: int
    retry_delay: RetryDelay
    timeout: float | timedelta | None


def add_apoq_task(
    config: Any, function: Callable[..., Any] | str, type: str | None = None, **options: Unpack[TaskOptions]
) -> None:
    """Process tasks of this type with ``function(task, request)``, or what a dotted name leads to.

    The default type is the function's own dotted name. The options are those of `Worker.use`. Two functions
    for one type are a conflict, as two views for one URL are.
    """
    found: Callable[..., Any] = config.maybe_dotted(function)
    name = f"{found.__module__}.{found.__qualname__}"
    type = type or name
    processor = _processor(found, name)
    try:
        Registry().use(type, found, **options)
    except InvalidProcessor as error:
        raise Misconfigured(str(error)) from None
    introspectable = config.introspectable(CATEGORY, type, f"{type}: {name}", "apoq task")
    introspectable.update({"type": type, "function": found, **options})

    def register() -> None:
        Application.of(config.registry).processors[type] = (processor, dict(options))

    config.action((CATEGORY, type), register, introspectables=(introspectable,))


class apoq_task:  # noqa: N801 - as view_config is
    """Have `config.scan()` find a function of ``(task, request)`` that processes tasks of this type.

    The same as `config.add_apoq_task(function, type, …)`.
    """

    def __init__(self, type: str | None = None, **options: Unpack[TaskOptions]) -> None:
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


def _processor(function: Callable[..., Any], name: str) -> Callable[[Any], Any]:
    if inspect.iscoroutinefunction(function):
        raise Misconfigured(
            f"{name} is a coroutine function, and Pyramid's requests belong to a thread: make it a plain one"
        )
    try:
        inspect.signature(function).bind("task", "request")
    except TypeError:
        raise Misconfigured(
            f"{name} is called with the running task and a request, as a view is with its context and a "
            f"request: `def {function.__name__}(task, request)`"
        ) from None

    @wraps(function)
    def process(task: Any) -> Any:
        return function(task, get_current_request())

    return process
