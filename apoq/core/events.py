"""What a worker tells about its tasks."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, Final

logger = logging.getLogger(__name__)

COMPLETED: Final = "task.completed"
FAILED: Final = "task.failed"
RETRIED: Final = "task.retried"

NAMES: Final = (COMPLETED, FAILED, RETRIED)


class Events:
    """The events of one worker, and who listens to them.

    | event            | the listener gets | when                                             |
    |------------------|-------------------|--------------------------------------------------|
    | `task.completed` | `task`            | the completion has committed                     |
    | `task.failed`    | `task`, `error`   | a final failure has committed                    |
    | `task.retried`   | `task`, `error`   | a failure that will be tried again has committed |

    `task` is a `Task` as it stands in the database, in no session. Listeners run on the worker's
    threads, one after the other: keep them short. One that raises is logged and hurts nothing.
    An event may be missed: a process may die between the commit and the listener, and the server's
    answer to the commit may get lost.
    """

    def __init__(self) -> None:
        self._listeners: dict[str, list[Callable[..., Any]]] = {name: [] for name in NAMES}

    def on(self, name: str, listener: Callable[..., Any]) -> None:
        """Call `listener` at each event of this name, from now on."""
        if name not in self._listeners:
            raise ValueError(f"there is no event {name!r}: it is one of {', '.join(NAMES)}")
        if not callable(listener) or inspect.iscoroutinefunction(listener):
            raise TypeError(f"a listener is a plain function, not {listener!r}")
        # A new list: events are emitted on other threads, and listeners may call this.
        self._listeners[name] = [*self._listeners[name], listener]

    def heard(self, name: str) -> bool:
        """Tell whether anybody listens."""
        return bool(self._listeners[name])

    def emit(self, name: str, *arguments: object) -> None:
        """Call the listeners of this name in the order in which they came."""
        for listener in self._listeners[name]:
            try:
                listener(*arguments)
            except BaseException:  # sys.exit() in a listener would end the worker's thread
                logger.exception("a listener of %s raised; the task is not affected", name)
