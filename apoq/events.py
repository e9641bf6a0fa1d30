"""What a worker reports: what happens to its tasks, and to itself.

Listen by ``worker.events.on(TaskFailed, listener)``, or to all of a kind by ``on(TaskEvent, listener)``.
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
    """Something that a worker reports."""


@dataclass(frozen=True)
class TaskEvent(Event):
    """Something has happened to a task."""

    id: int
    type: str
    queue: str
    """The queue's name."""
    schema: str | None
    """The queue's schema."""
    attempt: int
    """Which attempt this is: 1 is the first."""


@dataclass(frozen=True)
class TaskClaimed(TaskEvent):
    """The worker has claimed it: it begins when a slot is free."""


@dataclass(frozen=True)
class TaskStarted(TaskEvent):
    """Its processor is about to be called."""

    lag: float
    """Seconds since it was due: the difference of two clocks, the database's and this machine's."""


@dataclass(frozen=True)
class TaskEnded(TaskEvent):
    """An attempt has ended, and what became of the task has committed."""

    seconds: float | None
    """How long the attempt took; None if it never began, or nobody listened when the task was claimed."""


@dataclass(frozen=True)
class TaskCompleted(TaskEnded):
    """It is completed."""


@dataclass(frozen=True)
class TaskRetried(TaskEnded):
    """The attempt failed, and there will be another one."""

    error: BaseException
    fail_count: int
    """How many attempts have failed, with this one."""
    delay: float
    """Seconds until the task is due again."""


@dataclass(frozen=True)
class TaskFailed(TaskEnded):
    """It has failed for good."""

    error: BaseException
    fail_count: int
    """How many attempts have failed, with this one."""


@dataclass(frozen=True)
class TaskCancelled(TaskEnded):
    """Its processor has cancelled it, by raising `Cancel`."""

    error: BaseException


@dataclass(frozen=True)
class TaskSnoozed(TaskEnded):
    """Its processor has put it off, by raising `Snooze`; no attempt is used up."""

    delay: float
    """Seconds until it is due again."""


@dataclass(frozen=True)
class TaskReleased(TaskEnded):
    """It is given back with no attempt used up, because it can't run here now, or can't go on."""

    error: BaseException | None = None
    """Why, if something went wrong."""


@dataclass(frozen=True)
class TaskLost(TaskEvent):
    """It was taken from this worker before the attempt ended, and nothing was written to it."""

    is_late: bool = False
    """Whether it was taken because its timeout was over."""


@dataclass(frozen=True)
class TasksRescued(Event):
    """Running tasks that no live worker had are pending again."""

    count: int
    schema: str | None
    is_noted: bool = True
    """Whether their workers have died; if not, no claim had noted them."""


@dataclass(frozen=True)
class WorkerEvent(Event):
    """Something has happened to the worker itself."""

    worker: str
    """Which one, for people to read."""


@dataclass(frozen=True)
class WorkerStarted(WorkerEvent):
    """It works from now on."""


@dataclass(frozen=True)
class WorkerStopping(WorkerEvent):
    """It claims no more, and waits for the tasks that run."""


@dataclass(frozen=True)
class WorkerStopped(WorkerEvent):
    """It has stopped."""


@dataclass(frozen=True)
class ThreadDied(Event):
    """One of the worker's threads has ended although it should not have; restart the worker."""

    thread: str
    error: BaseException


@dataclass(frozen=True)
class Failing(Event):
    """Something that the worker repeats until it succeeds fails; reported again at growing intervals."""

    what: str
    """What fails, such as "the claim from Queue('emails')"."""
    error: BaseException
    failures: int
    """How often in a row it has failed."""
    seconds: float
    """For how long it has failed."""


@dataclass(frozen=True)
class Recovered(Event):
    """What was failing has succeeded again."""

    what: str
    failures: int
    """How often in a row it had failed."""


@dataclass(frozen=True)
class LeaseLost(Event):
    """The worker could not reach the database for so long that other workers may take its tasks."""

    schemas: tuple[str | None, ...]
    is_everywhere: bool
    """Whether these are all the schemas that it works in."""


@dataclass(frozen=True)
class OutageBegan(Event):
    """The database is away."""

    error: str


@dataclass(frozen=True)
class OutageLasts(Event):
    """The database is still away; reported at growing intervals."""

    seconds: float
    what: str
    """What tries to reach it."""
    error: str


@dataclass(frozen=True)
class OutageEnded(Event):
    """The database is back."""

    seconds: float


E = TypeVar("E", bound=Event)
Listener = Callable[..., Any]


def _always() -> bool:
    return True


class Events:
    """The events of one worker, and who listens to them.

    Listen to a class, as in ``on(TaskStarted, listener)``, and the listener gets the event. Listen to a
    name, and it gets the `Task` as it stands in the database, in no session:

    | event            | the listener gets | when                                             |
    |------------------|-------------------|--------------------------------------------------|
    | `task.completed` | `task`            | the completion has committed                     |
    | `task.failed`    | `task`, `error`   | a final failure has committed                    |
    | `task.retried`   | `task`, `error`   | a failure that will be tried again has committed |

    Listeners run on the worker's threads, one after the other: keep them short. One that raises is logged
    and hurts nothing. An event may be missed: a process may die between the commit and the listener, and the
    server's answer to the commit may get lost.
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
        """Call `listener` at each event of this name or class, from now on.

        `when` is asked each time, and the listener is called only if it returns true. Raises ValueError if
        there is no such event, and TypeError if the listener is no plain function.
        """
        if isinstance(event, type) and issubclass(event, Event):
            names: list[object] = list(_with_subclasses(event))
        elif event in NAMES:
            names = [event]
        else:
            raise ValueError(
                f"there is no event {event!r}: it is one of {', '.join(NAMES)}, or a class of apoq.events"
            )
        if not callable(listener) or inspect.iscoroutinefunction(listener):
            raise TypeError(f"a listener is a plain function, not {listener!r}")
        for name in names:
            # A new list: events are emitted on other threads, and listeners may call this.
            self._listeners[name] = [*self._listeners[name], (listener, when)]

    def heard(self, event: str | type[Event]) -> bool:
        """Return whether anybody listens."""
        listeners = self._listeners[event]
        return bool(listeners) and any(when() for _, when in listeners)

    def emit(self, name: str, *arguments: object) -> None:
        """Call the listeners of this name in the order in which they came."""
        self._call(name, *arguments)

    def report(self, event: Event) -> None:
        """Call the listeners of this event's class in the order in which they came."""
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
    """Return a class of events and all its subclasses."""
    yield event
    for subclass in event.__subclasses__():
        yield from _with_subclasses(subclass)
