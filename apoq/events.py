"""The events that a worker emits, about its tasks and about itself.

``worker.events.on(TaskFailed, listener)`` listens to one kind of event, and ``on(TaskEvent, listener)`` to
all events of tasks.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar, overload

logger = logging.getLogger(__name__)

COMPLETED: Final = "task.completed"
FAILED: Final = "task.failed"
RETRIED: Final = "task.retried"

NAMES: Final = (COMPLETED, FAILED, RETRIED)


@dataclass(frozen=True)
class Event:
    """The base class of a worker's events."""


@dataclass(frozen=True)
class TaskEvent(Event):
    """The base class of events of one task."""

    id: int
    """The task's id."""
    type: str
    """The task's type."""
    queue: str
    """The name of the task's queue."""
    schema: str | None
    """The schema of the task's queue, or None for the connection's own."""
    attempt: int
    """The number of this attempt: 1 is the first, and 0 stands for a task that never began."""


@dataclass(frozen=True)
class TaskClaimed(TaskEvent):
    """The worker has claimed the task, and will start it as soon as a slot is free."""


@dataclass(frozen=True)
class TaskStarted(TaskEvent):
    """The task's processor is about to be called."""

    lag: float
    """Seconds between the time when the task was due, by the database's clock, and now, by this machine's."""


@dataclass(frozen=True)
class TaskEnded(TaskEvent):
    """The base class of events of an attempt that has ended and whose result is committed."""

    seconds: float | None
    """Duration of the attempt in seconds. None if it never started, or if there was no listener when the task
    was claimed."""


@dataclass(frozen=True)
class TaskCompleted(TaskEnded):
    """The task is completed."""


@dataclass(frozen=True)
class TaskRetried(TaskEnded):
    """The attempt failed, and the task will be retried."""

    error: BaseException
    """The exception that the processor raised, or a `TimeoutError`."""
    fail_count: int
    """The number of failed attempts, including this one."""
    delay: float
    """Seconds until the task is due again."""


@dataclass(frozen=True)
class TaskFailed(TaskEnded):
    """The task has failed, and will not be retried."""

    error: BaseException
    """The exception that the processor raised, or a `TimeoutError`."""
    fail_count: int
    """The number of failed attempts, including this one."""


@dataclass(frozen=True)
class TaskCancelled(TaskEnded):
    """The task is cancelled by its processor, or by the worker, because it must not run any more.

    Not if a caller cancels it, which no worker knows. Then the tasks that wait for it are cancelled by the
    caller as well.
    """

    error: BaseException
    """The `Cancel` that the processor raised; or `TaskExpired` or `ParentFailed` of `apoq.core.outcomes`."""


@dataclass(frozen=True)
class TaskSnoozed(TaskEnded):
    """The task's processor has postponed it by raising `Snooze`. This does not count as an attempt."""

    delay: float
    """Seconds until the task is due again."""


@dataclass(frozen=True)
class TaskReleased(TaskEnded):
    """The worker has released the task, because it can't run here now. This does not count as an attempt."""

    error: BaseException | None = None
    """The reason, if there was an error."""


@dataclass(frozen=True)
class TaskLost(TaskEvent):
    """The task was taken from this worker before the attempt ended, so its result was not written."""

    is_late: bool = False
    """Whether it was taken because its timeout expired."""


@dataclass(frozen=True)
class TasksRescued(Event):
    """Running tasks that no live worker owned are pending again."""

    count: int
    """The number of tasks."""
    schema: str | None
    """The schema of their queues, or None for the connection's own."""
    is_noted: bool = True
    """Whether a worker that has died owned them. If not, no worker had recorded that it claimed them."""


@dataclass(frozen=True)
class WorkerEvent(Event):
    """The base class of events of the worker itself."""

    worker: str
    """The worker's repr."""


@dataclass(frozen=True)
class WorkerStarted(WorkerEvent):
    """The worker has started."""


@dataclass(frozen=True)
class WorkerStopping(WorkerEvent):
    """The worker claims no more tasks, and waits for the running ones."""


@dataclass(frozen=True)
class WorkerStopped(WorkerEvent):
    """The worker has stopped."""


@dataclass(frozen=True)
class LimitReached(WorkerEvent):
    """The worker has reached one of its limits, so its process should be replaced. Emitted once for each.

    `Worker.run` and ``apoq worker`` stop the worker then. A worker that `Worker.start` has started goes on,
    because only the application can replace the process.
    """

    limit: str
    """The limit: "max_tasks", "max_memory" or "max_age"."""
    used: float
    """The number of attempts, bytes or seconds."""
    at_most: float
    """The limit of this process, which is up to 20 % lower or higher than the one that was given."""


@dataclass(frozen=True)
class ThreadDied(Event):
    """One of the worker's threads has died unexpectedly. The worker must be restarted."""

    thread: str
    """The thread's name."""
    error: BaseException
    """The exception that ended it."""


@dataclass(frozen=True)
class Failing(Event):
    """An operation of the worker fails, and is repeated until it succeeds. Emitted at growing intervals."""

    what: str
    """The operation, such as "the claim from Queue('emails')"."""
    error: BaseException
    """The last exception."""
    failures: int
    """Number of failures in a row."""
    seconds: float
    """Seconds since the first of these failures."""


@dataclass(frozen=True)
class Recovered(Event):
    """An operation that had failed has succeeded again."""

    what: str
    """The operation, such as "the claim from Queue('emails')"."""
    failures: int
    """Number of failures in a row, before the success."""


@dataclass(frozen=True)
class LeaseLost(Event):
    """The worker could not reach the database for so long that other workers may take its tasks."""

    schemas: tuple[str | None, ...]
    """The schemas in which the lease was lost."""
    is_everywhere: bool
    """Whether these are all schemas of the worker's queues."""


@dataclass(frozen=True)
class OutageBegan(Event):
    """The database can't be reached."""

    error: str
    """The message of the error."""


@dataclass(frozen=True)
class OutageLasts(Event):
    """The database still can't be reached. Emitted at growing intervals."""

    seconds: float
    """Seconds since the outage began."""
    what: str
    """The part of the worker that tried to reach the database."""
    error: str
    """The message of the error."""


@dataclass(frozen=True)
class OutageEnded(Event):
    """The database can be reached again."""

    seconds: float
    """Seconds that the outage lasted."""


E = TypeVar("E", bound=Event)
Listener = Callable[..., Any]


def _always() -> bool:
    return True


class Events:
    """The listeners of one worker.

    A listener of a class, as in ``on(TaskStarted, listener)``, is called with the event. A listener of a name
    is called with the `Task` as it is in the database, which is in no session:

    | event            | arguments       | when                                     |
    |------------------|-----------------|------------------------------------------|
    | `task.completed` | `task`          | the completion is committed              |
    | `task.failed`    | `task`, `error` | the final failure is committed           |
    | `task.retried`   | `task`, `error` | a failure that is retried is committed   |

    Note:
        Listeners are called on the worker's threads, one after the other, so they must be quick. An exception
        from a listener is logged and changes nothing else. Each event is delivered at most once: it is lost
        if the process dies, or the connection is lost, at the moment of the commit. If something must happen
        after a task, add another task.
    """

    def __init__(self) -> None:
        self._listeners: dict[object, list[tuple[Listener, Callable[[], bool]]]] = {
            name: [] for name in (*NAMES, *_with_subclasses(Event))
        }

    @overload
    def on(self, event: str, listener: Listener) -> None: ...

    @overload
    def on(self, event: type[E], listener: Callable[[E], Any], *, when: Callable[[], bool] = ...) -> None: ...

    def on(self, event: Any, listener: Listener, *, when: Callable[[], bool] = _always) -> None:
        """Call `listener` at each event of this name or class from now on.

        Args:
            event: A class of `apoq.events`, which includes its subclasses, or one of the names
                `task.completed`, `task.failed` and `task.retried`.
            listener: A plain function. It is called with the event, or with the arguments of the name.
            when: A function that is called before each event; the listener is skipped if it returns False.

        Raises:
            ValueError: If there is no such event.
            TypeError: If the listener is not callable, or is a coroutine function.
        """
        if isinstance(event, type) and issubclass(event, Event):
            names: list[object] = list(_with_subclasses(event))
        elif event in NAMES:
            names = [event]
        else:
            raise ValueError(
                f"event must be one of {', '.join(NAMES)}, or a class of apoq.events, got {event!r}"
            )
        if not callable(listener) or inspect.iscoroutinefunction(listener):
            raise TypeError(f"a listener must be a plain function, got {listener!r}")
        for name in names:
            # A new list, because other threads iterate over the old one, and listeners may call this method.
            self._listeners[name] = [*self._listeners[name], (listener, when)]

    def has_listeners(self, event: str | type[Event]) -> bool:
        """Return whether the event has a listener that would be called now."""
        listeners = self._listeners[event]
        return bool(listeners) and any(when() for _, when in listeners)

    def emit(self, name: str, *arguments: object) -> None:
        """Call the listeners of a name, in the order in which they were added."""
        self._call(name, *arguments)

    def report(self, event: Event) -> None:
        """Call the listeners of an event's class, in the order in which they were added."""
        self._call(type(event), event)

    def _call(self, name: str | type[Event], *arguments: object) -> None:
        for listener, when in self._listeners[name]:
            try:
                if when():
                    listener(*arguments)
            except BaseException:  # sys.exit() in a listener would end the worker's thread
                logger.exception(
                    "a listener of %s raised; the task is not affected",
                    name if isinstance(name, str) else name.__name__,
                )


def _with_subclasses(event: type[Event]) -> Iterator[type[Event]]:
    yield event
    for subclass in event.__subclasses__():
        yield from _with_subclasses(subclass)
