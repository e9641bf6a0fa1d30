"""The check that the first argument of a queue's method is a session."""

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
