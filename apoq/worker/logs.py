"""What the log says of the events of a worker."""

from __future__ import annotations

import logging
from typing import Final

from apoq.core.outcomes import message_of, reason
from apoq.events import (
    Event,
    Events,
    LeaseLost,
    OutageBegan,
    OutageEnded,
    OutageLasts,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskEvent,
    TaskFailed,
    TaskLost,
    TaskReleased,
    TaskRetried,
    TaskSnoozed,
    TasksRescued,
    TaskStarted,
    WorkerStarted,
    WorkerStopped,
    WorkerStopping,
)

logger = logging.getLogger("apoq.worker")


LOGGED: Final[tuple[type[Event], ...]] = (
    *(TaskRetried, TaskFailed, TaskLost, TasksRescued),
    *(LeaseLost, OutageBegan, OutageLasts, OutageEnded),
    *(WorkerStarted, WorkerStopping, WorkerStopped),
)
DEBUGGED: Final[tuple[type[Event], ...]] = (
    *(TaskClaimed, TaskStarted, TaskCompleted),
    *(TaskCancelled, TaskSnoozed, TaskReleased),
)


def listen(events: Events) -> None:
    """Log these events from now on; each task's start and end only while the level is DEBUG."""
    for event in LOGGED:
        events.on(event, write)
    for event in DEBUGGED:
        events.on(event, write, when=_is_debugging)


def _is_debugging() -> bool:
    return logger.isEnabledFor(logging.DEBUG)


def write(event: Event) -> None:
    """Log an event."""
    if isinstance(event, TaskEvent):
        _write_task(event)
    else:
        _write_other(event)


def _write_task(event: TaskEvent) -> None:
    id_, type_ = event.id, event.type
    match event:
        case TaskFailed(error=error, fail_count=count):
            logger.error("task %d (%s) failed for good, with failure %d", id_, type_, count, exc_info=error)
        case TaskRetried(error=error, fail_count=count, delay=delay):
            logger.warning(
                "task %d (%s) failed (failure %d), and is tried again in %g s: %s",
                *(id_, type_, count, delay, _describe(error)),
            )
        case TaskLost(is_late=True):
            logger.info(
                "task %d (%s) has returned after its timeout, which had ended its attempt; "
                "nothing more was written to it",
                *(id_, type_),
            )
        case TaskLost():
            logger.info(
                "task %d (%s) was taken from this worker before it ended here; nothing was written to it",
                *(id_, type_),
            )
        case _:
            _write_progress(event)


def _write_progress(event: TaskEvent) -> None:
    id_, type_ = event.id, event.type
    match event:
        case TaskClaimed():
            logger.debug("task %d (%s) is claimed, for attempt %d", id_, type_, event.attempt)
        case TaskStarted(lag=lag):
            logger.debug(
                "task %d (%s) starts, attempt %d, %.3f s after it was due", id_, type_, event.attempt, lag
            )
        case TaskCompleted(seconds=None):
            logger.debug("task %d (%s) is completed", id_, type_)
        case TaskCompleted(seconds=seconds):
            logger.debug("task %d (%s) is completed, after %.3f s", id_, type_, seconds)
        case TaskCancelled(error=error):
            logger.debug("task %d (%s) is cancelled by its processor: %s", id_, type_, message_of(error))
        case TaskSnoozed(delay=delay):
            logger.debug("task %d (%s) is put off for %g s by its processor", id_, type_, delay)
        case TaskReleased():
            logger.debug("task %d (%s) is given back, with no attempt used up", id_, type_)


def _write_other(event: Event) -> None:
    match event:
        case TasksRescued(count=count, is_noted=True):
            logger.warning("%d tasks of workers that died are pending again", count)
        case TasksRescued(count=count):
            logger.warning("running tasks that no worker had are pending again: %d", count)
        case LeaseLost(schemas=schemas, is_everywhere=is_everywhere):
            logger.warning(
                "the lease%s could not be renewed in time: tasks that have not begun are given back, and "
                "what running ones have written in task.session is undone, because other workers may run "
                "them now",
                "" if is_everywhere else f" in {', '.join(map(repr, schemas))}",
            )
        case OutageBegan(error=error):
            logger.warning("the database is away; the worker tries until it is back: %s", error)
        case OutageLasts(seconds=seconds, what=what, error=error):
            logger.warning(
                "the database has been away for %.0f s, and %s tries again: %s", seconds, what, error
            )
        case OutageEnded(seconds=seconds):
            logger.warning("the database is back, after %.1f s", seconds)
        case WorkerStarted(worker=worker):
            logger.info("%s has started", worker)
        case WorkerStopping(worker=worker):
            logger.info("%s is stopping", worker)
        case WorkerStopped(worker=worker):
            logger.info("%s has stopped", worker)


def _describe(error: BaseException) -> str:
    error = reason(error)
    return f"{type(error).__qualname__}: {message_of(error)}"
