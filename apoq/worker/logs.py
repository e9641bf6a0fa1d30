"""All sentences of the worker's log: those of its events, and those that its parts write."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from apoq.core.outcomes import ParentFailed, TaskExpired, message_of, reason
from apoq.events import (
    Event,
    Events,
    Failing,
    LeaseLost,
    LimitReached,
    OutageBegan,
    OutageEnded,
    OutageLasts,
    Recovered,
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
    ThreadDied,
    WorkerStarted,
    WorkerStopped,
    WorkerStopping,
)
from apoq.monitor.formatting import length, size
from apoq.postgres.connections import is_denied
from apoq.postgres.messages import brief

logger = logging.getLogger("apoq.worker")


LOGGED: Final[tuple[type[Event], ...]] = (
    *(TaskRetried, TaskFailed, TaskLost, TasksRescued),
    *(LeaseLost, OutageBegan, OutageLasts, OutageEnded, Failing, Recovered),
    *(WorkerStarted, LimitReached, WorkerStopping, WorkerStopped, ThreadDied),
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


def write(event: Event) -> None:
    """Log an event."""
    if isinstance(event, TaskEvent):
        _write_task(event)
    else:
        _write_other(event)


# Of the claimer, the listener and the settler:


def task_passed_over(task_id: int, seconds: float, error: BaseException) -> None:
    """Log that the server refuses to claim a task."""
    logger.error(
        "task %d can't be claimed: %s. Other tasks are claimed, and this one is tried again in %.0f s",
        *(task_id, _said(error), seconds),
    )


def place_not_handed_over(kind: str, name: str, error: BaseException) -> None:
    """Log that the server refuses to change a task that should get a free place."""
    logger.error(
        "a free place of the %s %r can't be given to the next task: %s. It is tried again every few seconds",
        *("type" if kind == "pool" else kind, name, _said(error)),
    )


def no_notifications(*, is_news: bool) -> None:
    """Log that the connection that listens gets no notifications."""
    logger.log(
        _warning_if(is_news),
        "the connection that listens receives no notifications, as behind a transaction pooler: the worker "
        "looks for tasks every poll_interval. To start tasks at once, give Worker(…, listen_url=…) a URL "
        "that leads to the same database past the pooler",
    )


def notifications_arrive() -> None:
    """Log that notifications arrive."""
    logger.debug("the connection that listens receives notifications")


def too_many_notifications(pause: float, *, is_news: bool) -> None:
    """Log that there are more notifications than the worker can read."""
    logger.log(
        _warning_if(is_news),
        "notifications arrive faster than this worker can read them: it reads none for %d s, and looks for "
        "tasks every poll_interval. To find who sends them, search pg_stat_activity for NOTIFY and pg_notify",
        pause,
    )


def notifications_read_again() -> None:
    """Log that there are no more notifications than can be read."""
    logger.warning("the worker reads notifications again")


def table_locked(consequence: str) -> None:
    """Log that another session, such as a migration, has locked the table of tasks."""
    logger.info("another session has locked the table apoq_tasks (a migration?): %s", consequence)


def task_unwritable(task_id: int, error: BaseException) -> None:
    """Log that the server refuses to write the result of a task."""
    logger.error("the database refused the result of task %d", task_id, exc_info=error)


def task_given_up(task_id: int) -> None:
    """Log that a task stays running until the worker stops."""
    logger.error("task %d stays running; it is run again after this worker has stopped", task_id)


def session_unreachable(error: BaseException) -> None:
    """Log that tasks could not connect to their database."""
    logger.warning(
        "task.session could not connect: %s. These tasks are pending again and lose no attempt; they are "
        "tried again every second or two until it can",
        error,
    )


def no_child(error: BaseException, seconds: float) -> None:
    """Log that no process can be started for an isolated task."""
    logger.error(
        "no process can be started for an isolated task: %s. The task loses no attempt, and is tried again "
        "in %g s: raise the limit of processes or the memory",
        *(error, seconds),
    )


# Of the other parts:


def rescue_refused(error: BaseException) -> None:
    """Log that the server refuses to rescue a task."""
    logger.warning(
        "a task of a dead worker can't be made pending again: %s. It stays running; other tasks are rescued, "
        "and this one is tried again at each heartbeat",
        _said(error),
    )


def tasks_lost(ids: Iterable[int]) -> None:
    """Log that running tasks are no longer owned."""
    logger.info(
        "this worker no longer owns these tasks, and tells them to stop: %s", ", ".join(map(str, sorted(ids)))
    )


def failure_task_not_added(ids: Iterable[int], error: BaseException) -> None:
    """Log that tasks were marked as failed without the tasks of their `on_failure`."""
    logger.error(
        "the tasks of on_failure could not be added for these failed tasks: %s: %s",
        ", ".join(map(str, sorted(ids))),
        _said(error),
    )


def pruning_refused(error: BaseException) -> None:
    """Log that an ended task can't be deleted."""
    logger.warning("a task that ended long ago can't be deleted, and is kept: %s", _said(error))


def schema_left_out(error: BaseException) -> None:
    """Log that the tables in a schema can't be used."""
    logger.error("%s; until then, this worker leaves out the queues in that schema", error)


def row_left_behind(error: BaseException) -> None:
    """Log that the row of this worker is still there."""
    logger.warning("this worker's row could not be deleted; another worker will delete it: %s", _said(error))


def exit_in_subtask(error: BaseException) -> None:
    """Log that a task of asyncio's, which a processor has created, wanted to end the program."""
    logger.error(
        "an asyncio task of a processor raised %s, which ends no worker: its other coroutines go on",
        type(error).__name__,
    )


def loop_taken() -> None:
    """Log that no coroutine can run, because gevent runs all threads as one."""
    logger.critical(
        "this worker's coroutine functions can't run: gevent makes all threads greenlets of one thread, and "
        "another event loop runs there already. Run only one worker with coroutine functions in this "
        "process, or run the worker in a process without gevent"
    )


# The limits of its process:


def starts_above_limit(used: float, given: float, most: float) -> None:
    """Log that a process has the memory at its start that it may have at most."""
    logger.error(
        "max_memory must be much more than this process starts with, which is %s, got %s (drawn for this "
        "process: %s). It goes on without that limit: raise max_memory",
        *(size(used), size(given), size(most)),
    )


def draining(worker: str, running: int) -> None:
    """Log that a worker that has reached a limit waits for its tasks."""
    logger.info("%s claims no more tasks, and stops when its %d running tasks have ended", worker, running)


# The end of a worker:


def stopped_before_start(worker: object) -> None:
    """Log that a worker was stopped before it had started."""
    logger.info("%r was stopped before it had started", worker)


def tasks_released_at_stop(count: int) -> None:
    """Log that the time to stop is up."""
    logger.warning("the time to stop is up: %d tasks still run, and are released for other workers", count)


def results_locked(count: int) -> None:
    """Log that the results of tasks could not be written at the end, because of a lock."""
    logger.warning(
        "the results of %d tasks could not be written, because another session has locked them, or because "
        "their schema fails: other workers may run them again",
        count,
    )


def results_late() -> None:
    """Log that the results of tasks could not be written in time."""
    logger.warning("some results could not be written in time: other workers will run these tasks again")


def settling_failed(error: BaseException) -> None:
    """Log that results could not be written at the end."""
    logger.warning("some tasks could not be settled, and other workers will run them again: %s", _said(error))


def progress_failed(error: BaseException) -> None:
    """Log that the last progress of tasks could not be written at the end."""
    logger.warning("the last progress of some tasks could not be written: %s", _said(error))


# To debug the worker:


def failed_again(what: str, failures: int, error: BaseException) -> None:
    """Log each failure of something that is repeated."""
    logger.debug("%s has failed %d times", what, failures, exc_info=error)


def failed_elsewhere(what: str, error: BaseException) -> None:
    """Log that a turn failed on another thread."""
    logger.debug("%s failed on another thread", what, exc_info=error)


def failed_at_end(what: str, error: BaseException) -> None:
    """Log that the last turn failed."""
    logger.debug("%s has stopped, and its last turn failed", what, exc_info=error)


def not_stopped(worker: object, error: BaseException) -> None:
    """Log that a worker could not be stopped at the end of the process."""
    logger.debug("%r could not be stopped: %s", worker, error)


def _is_debugging() -> bool:
    return logger.isEnabledFor(logging.DEBUG)


def _warning_if(is_news: bool) -> int:
    return logging.WARNING if is_news else logging.DEBUG


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
                "task %d (%s) returned after its timeout, which had ended the attempt: its result is ignored",
                *(id_, type_),
            )
        case TaskLost():
            logger.info(
                "task %d (%s) no longer belonged to this worker when it ended: its result is ignored",
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
        case TaskCancelled(error=TaskExpired()):
            logger.debug("task %d (%s) has expired, and is cancelled", id_, type_)
        case TaskCancelled(error=ParentFailed() as error):
            logger.debug("task %d (%s) is cancelled with its parent: %s", id_, type_, error)
        case TaskCancelled(error=error):
            logger.debug("task %d (%s) is cancelled by its processor: %s", id_, type_, message_of(error))
        case TaskSnoozed(delay=delay):
            logger.debug("task %d (%s) is put off for %g s by its processor", id_, type_, delay)
        case TaskReleased():
            logger.debug("task %d (%s) is released, with no attempt used up", id_, type_)


def _write_other(event: Event) -> None:
    match event:
        case TasksRescued(count=count, is_noted=True):
            logger.warning("%d tasks of dead workers are pending again", count)
        case TasksRescued(count=count):
            logger.warning("%d running tasks that no worker owned are pending again", count)
        case LeaseLost(schemas=schemas, is_everywhere=is_everywhere):
            logger.warning(
                "the lease%s could not be renewed in time, so other workers may now run this worker's tasks: "
                "it releases those that have not started, and rolls back the task.session of running ones",
                "" if is_everywhere else f" in {', '.join(map(repr, schemas))}",
            )
        case _:
            _write_outage(event)


def _write_outage(event: Event) -> None:
    match event:
        case OutageBegan(error=error):
            logger.warning("the database is away; the worker tries again until it is back: %s", error)
        case OutageLasts(seconds=seconds, what=what, error=error):
            logger.warning(
                "the database has been away for %.0f s, and %s tries again: %s", seconds, what, error
            )
        case OutageEnded(seconds=seconds):
            logger.warning("the database is back, after %.1f s", seconds)
        case Failing(what=what, error=error, seconds=0.0):
            logger.warning(
                "%s failed, and is tried again until it succeeds: %s%s", what, error, _grant(error)
            )
        case Failing(what=what, error=error, failures=failures, seconds=seconds):
            logger.warning(
                "%s has failed for %.0f s, %d times, and is tried again: %s",
                *(what, seconds, failures, _said(error)),
            )
        case Recovered(what=what, failures=failures):
            logger.warning("%s works again, after %d failures", what, failures)
        case _:
            _write_life(event)


def _write_life(event: Event) -> None:
    match event:
        case WorkerStarted(worker=worker):
            logger.info("%s has started", worker)
        case LimitReached(limit="max_tasks", worker=worker, used=used):
            logger.info("%s has reached its max_tasks: %d attempts have ended", worker, used)
        case LimitReached(limit="max_memory", worker=worker, used=used, at_most=most):
            logger.info("%s has reached its max_memory: %s of %s", worker, size(used), size(most))
        case LimitReached(worker=worker, limit=limit, used=used):
            logger.info("%s has reached its %s: it has run for %s", worker, limit, length(used))
        case WorkerStopping(worker=worker):
            logger.info("%s is stopping", worker)
        case WorkerStopped(worker=worker):
            logger.info("%s has stopped", worker)
        case ThreadDied(thread=thread, error=error):
            logger.critical(
                "the worker's thread %s died unexpectedly: restart the worker", thread, exc_info=error
            )


# Of the ticker:


def schedule_passed_over(queue: str, name: str, seconds: float, error: BaseException) -> None:
    """Log that a schedule can't be ticked."""
    logger.error(
        "the schedule %r of the queue %r can't be ticked: %s. Other schedules are ticked, and this one is "
        "tried again every %.0f s: correct it by queue.schedule, or remove it",
        *(name, queue, _said(error), seconds),
    )


def ticks_missed(count: int, names: Iterable[str]) -> None:
    """Log that schedules have ticks that became no tasks."""
    logger.warning(
        "ticks were missed, while no worker was running or while their schedules were paused, and become no "
        "tasks because of catch_up or not_before: %s, such as %s",
        *("1 schedule" if count == 1 else f"{count:,} schedules", ", ".join(map(repr, names))),
    )


def schedule_kept(queue: str, name: str) -> None:
    """Log that a newer release has declared a schedule."""
    logger.warning(
        "the schedule %r of the queue %r was declared by a later release than this worker's, which leaves it "
        "as it is",
        *(name, queue),
    )


def limit_kept(queue: str, type_: str) -> None:
    """Log that a newer release has declared a limit."""
    of = f"the type {type_!r} of the queue {queue!r}" if type_ else f"the queue {queue!r}"
    logger.warning(
        "the limit of %s was declared by a later release than this worker's, which leaves it as it is", of
    )


def schedule_not_declared(queue: str, name: str, problem: object) -> None:
    """Log that a schedule that the code declares can't be written."""
    logger.error("the schedule %r of the queue %r is not used: %s", name, queue, problem)


def _describe(error: BaseException) -> str:
    error = reason(error)
    return f"{type(error).__qualname__}: {message_of(error)}"


def _said(error: BaseException) -> str:
    return f"{brief(error)}{_grant(error)}"


def _grant(error: BaseException) -> str:
    """Return what to do about a missing right on an object of apoq's; nothing for another error."""
    is_ours = is_denied(error) and " apoq_" in brief(error)
    return ": grant what `apoq grants --worker ROLE` prints" if is_ours else ""
