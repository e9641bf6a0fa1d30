"""Runs a processor once, and decides what becomes of its task."""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from contextvars import copy_context
from typing import Any, Final, NamedTuple

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from apoq.core.outcomes import Release, Settlement, Unreachable, settle
from apoq.errors import InvalidProcessor, SessionMisused
from apoq.postgres.messages import brief
from apoq.schema.statements.claim import CLAIM
from apoq.worker.execution.attempt import LOST, AnyAttempt, AsyncAttempt, Attempt
from apoq.worker.execution.completion import Completion
from apoq.worker.execution.deadlines import Deadlines
from apoq.worker.execution.event_loop import CANCELLATION_SECONDS
from apoq.worker.execution.isolated_context import IsolatedContext
from apoq.worker.execution.running_task import AsyncRunningTask, RunningTask
from apoq.worker.execution.task_sessions import TaskSession, could_not_connect


class TaskLost(Exception):
    """The worker no longer owns the task; nothing is written to it."""


SERIALIZATION_FAILURE: Final = "40001"

MAX_CONFLICTS: Final = 100
"""Claims without an attempt after which a conflict uses up an attempt: it may happen each time."""


class AttemptResult(NamedTuple):
    """The result of an attempt, as the settler writes it."""

    attempt: AnyAttempt
    outcome: BaseException | None
    settlement: Settlement | None
    """None: the task is completed."""
    row: Mapping[Any, Any] | None = None
    """If the completion was committed with ``task.session``: the task's row, or only its id."""
    seconds: float | None = None
    """How long it took, if there is a listener."""
    result: str | None = None
    """The result of a completed task's processor as JSON, if it is kept."""


def ended(
    attempt: AnyAttempt,
    outcome: BaseException | None,
    row: Mapping[Any, Any] | None = None,
    seconds: float | None = None,
    result: str | None = None,
) -> AttemptResult:
    """Return the result of an attempt that ended with this outcome."""
    if outcome is None:
        return AttemptResult(attempt, None, None, row, seconds, result)
    settlement = settle(outcome, attempt=attempt.number, fail_count=attempt.fail_count, policy=attempt.policy)
    return AttemptResult(attempt, outcome, settlement, row, seconds)


def is_late(end: AttemptResult) -> bool:
    """Return whether the timeout had ended the attempt before."""
    return isinstance(end.outcome, TaskLost) and end.attempt.signal is not LOST


def run(attempt: Attempt, completion: Completion, deadlines: Deadlines) -> AttemptResult:
    """Run a plain processor on this thread."""
    return copy_context().run(run_here, attempt, completion, deadlines)


async def run_coroutine(attempt: AsyncAttempt, completion: Completion, deadlines: Deadlines) -> AttemptResult:
    """Run a coroutine processor on this event loop."""
    return await IsolatedContext(run_coroutine_here(attempt, completion, deadlines))


def run_here(attempt: Attempt, completion: Completion, deadlines: Deadlines) -> AttemptResult:
    """Run a plain processor on this thread, in the caller's context."""
    row = outcome = began_at = result = None
    try:
        attempt.read()
        if attempt.signal is LOST:
            raise TaskLost  # noqa: TRY301 - after it left the line
        if attempt.row[CLAIM].on_start is not None:
            began_at = _begin(attempt)
        limit = attempt.timeout
        returned = (
            attempt.processor.function(RunningTask(attempt))
            if limit is None
            else _run_within(limit, attempt, deadlines)
        )
        if returned is not None:
            _refuse_awaitable(attempt, returned)
        if (encoder := attempt.processor.result_encoder) is not None:
            result = encoder.encode(returned)
        if attempt.opened is not None:
            row = _complete_in(attempt.opened, attempt, completion, result)
    except BaseException as error:  # noqa: BLE001 - even SystemExit is one task's failure, not the worker's
        outcome = _outcome(attempt, error)
    seconds = None if began_at is None else time.monotonic() - began_at
    if attempt.opened is not None:
        _close(attempt.opened)
    return ended(attempt, outcome, row, seconds, result)


async def run_coroutine_here(
    attempt: AsyncAttempt, completion: Completion, deadlines: Deadlines
) -> AttemptResult:
    """Run a coroutine processor on this event loop, in the caller's context."""
    row = outcome = began_at = result = None
    try:
        if attempt.has_data:
            attempt.read()
        else:
            await asyncio.to_thread(attempt.read)
        if attempt.row[CLAIM].on_start is not None:
            began_at = _begin(attempt)
        limit = attempt.timeout
        returned = await (
            attempt.call(AsyncRunningTask(attempt))
            if limit is None
            else _await_within(limit, attempt, deadlines)
        )
        if (encoder := attempt.processor.result_encoder) is not None:
            result = encoder.encode(returned)
        if attempt.opened is not None:
            row = await attempt.opened.run_sync(_complete_in_async, attempt, completion, result)
    except BaseException as error:  # noqa: BLE001
        outcome = _outcome(attempt, error)
    seconds = None if began_at is None else time.monotonic() - began_at
    if attempt.opened is not None:
        try:
            await attempt.opened.run_sync(_close)
        except BaseException as error:  # noqa: BLE001 - cancelled once more, while it was closed
            outcome = outcome or (None if row is not None else error)
    return ended(attempt, outcome, row, seconds, result)


def _begin(attempt: AnyAttempt) -> float:
    """Report that the processor is about to be called; return when that was."""
    if (on_start := attempt.row[CLAIM].on_start) is not None:
        on_start(attempt.row)
    return time.monotonic()


def _outcome(attempt: AnyAttempt, error: BaseException) -> BaseException:
    # If the worker has cut off the session, that caused the error.
    if isinstance(error, TaskLost):
        return error
    if attempt.is_cut_off or _is_conflict(attempt, error):
        return Release()
    return Unreachable(brief(error)) if could_not_connect(error) else error


def _is_conflict(attempt: AnyAttempt, error: BaseException) -> bool:
    """Return whether `task.session` could not be serialized, which running the task again solves.

    At SERIALIZABLE that happens even to tasks that have nothing to do with each other, because the rows that
    their completions write lie on the same pages of an index.
    """
    return (
        attempt.opened is not None
        and isinstance(error, DBAPIError)
        and getattr(error.orig, "sqlstate", None) == SERIALIZATION_FAILURE
        and attempt.claim_token - attempt.number < MAX_CONFLICTS
    )


def overdue(limit: float, thread_id: int = 0) -> TimeoutError:
    """Return the error of an attempt that took longer than `limit` seconds, and still runs on this thread."""
    error = TimeoutError(f"ran longer than its timeout of {limit:.10g} s")
    frame = sys._current_frames().get(thread_id)  # noqa: SLF001 - public in spite of its name
    if frame is not None:
        error.add_note(f"At that time it was here:\n{''.join(traceback.format_stack(frame))}")
    return error


def _run_within(limit: float, attempt: Attempt, deadlines: Deadlines) -> Any:
    """Run the function, which can't be stopped; raise `TaskLost` if the timeout has ended its attempt."""
    deadlines.watch(attempt, limit)
    try:
        returned = attempt.processor.function(RunningTask(attempt))
    except KeyboardInterrupt:
        deadlines.forget(attempt)
        raise  # it is meant for the program
    except BaseException as error:
        if deadlines.forget(attempt):
            raise
        raise TaskLost from error
    if not deadlines.forget(attempt):
        raise TaskLost
    return returned


async def _await_within(limit: float, attempt: AsyncAttempt, deadlines: Deadlines) -> Any:
    """Await the function, and cancel it at the limit; raise `TaskLost` if it ignored that for too long."""
    returned: Any = None
    error: BaseException | None = None
    deadlines.watch(attempt, limit, CANCELLATION_SECONDS)
    try:
        async with asyncio.timeout(limit) as scope:
            returned = await attempt.call(AsyncRunningTask(attempt))
    except BaseException as raised:  # noqa: BLE001
        error = raised
    if not deadlines.forget(attempt):
        raise TaskLost from error
    if scope.expired():
        # Even if it caught the cancellation.
        raise overdue(limit) from error
    if error is not None:
        raise error
    return returned


def _complete_in(
    session: TaskSession, attempt: AnyAttempt, completion: Completion, result: str | None
) -> Mapping[Any, Any]:
    """Commit the processor's writes and the task's completion, or neither."""
    session.flush()
    row = completion.write(session.connection(), attempt, result)
    if row is None:
        session.rollback()
        # Settled like any failure. If the worker has lost the task, the usual cause, nothing is written.
        raise SessionMisused(
            "task.session must not change the running task itself: its transaction was rolled back. To end "
            "the task in another way, raise Cancel, Fail, Retry or Snooze"
        )
    session.commit_completion()
    return row


def _complete_in_async(
    session: Session, attempt: AnyAttempt, completion: Completion, result: str | None
) -> Mapping[Any, Any]:
    assert isinstance(session, TaskSession)
    return _complete_in(session, attempt, completion, result)


def _close(session: Session) -> None:
    try:
        session.close()
    except Exception:  # noqa: BLE001 - the connection is broken, and so its transaction is rolled back
        with suppress(Exception):  # a thread that the processor has left behind may be using it
            session.invalidate()


def _refuse_awaitable(attempt: AnyAttempt, value: Any) -> None:
    if inspect.isawaitable(value):
        if inspect.iscoroutine(value):
            value.close()
        raise InvalidProcessor(
            f"the processor of {attempt.type!r} is a plain function, but returned an awaitable, which is not "
            "awaited: make it `async def`"
        )
