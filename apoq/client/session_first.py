"""The check that the first argument of a method is a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from apoq.client.session_adapters import SESSION_CLASSES
from apoq.client.unsupported_sessions import forgotten, is_mistaken, refusal, shown_arguments
from apoq.errors import UnsupportedSession

F = TypeVar("F", bound=Callable[..., Any])


def session_first(method: F) -> F:
    """Decorate a method of a queue, so that a call without a session raises an error that says so."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("session")
        if not isinstance(first, SESSION_CLASSES):
            is_given = "session" in kwargs or (
                args and (is_mistaken(first) or not isinstance(first, str | int))
            )
            if is_given:
                raise UnsupportedSession(refusal(first))
            arguments = shown_arguments(args, kwargs)
            raise UnsupportedSession(
                forgotten(f"queue.{method.__name__}({', '.join(filter(None, ['session', arguments]))})")
            )
        return method(self, *args, **kwargs)

    return cast("F", call)


def call_session_first(method: F) -> F:
    """Decorate a method of a typed task in the same way; the message has an example with its arguments."""

    @wraps(method)
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], SESSION_CLASSES):
            if args and is_mistaken(args[0]):
                raise UnsupportedSession(refusal(args[0]))
            example = self._example(shown_arguments(args, kwargs), method.__name__)
            raise UnsupportedSession(forgotten(example))
        return method(self, *args, **kwargs)

    return cast("F", call)
