"""The events of tasks, made of what the worker knows of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from apoq.core import states
from apoq.core.outcomes import ParentFailed, Settlement, Snooze, Unreachable
from apoq.events import (
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskEnded,
    TaskFailed,
    TaskLost,
    TaskReleased,
    TaskRetried,
    TaskSnoozed,
    TaskStarted,
)
from apoq.schema.statements.claim import ATTEMPT, CLAIM, ID, PROCESS_AT, TYPE
from apoq.worker.execution.attempt import Claimed
from apoq.worker.execution.runner import AttemptResult


def claimed(row: Claimed) -> TaskClaimed:
    """Report that a task was claimed."""
    return TaskClaimed(**_of(row))


def started(row: Claimed) -> TaskStarted:
    """Report that a task begins now."""
    return TaskStarted(**_of(row), lag=time.time() - row[PROCESS_AT])


def completed(row: Claimed, seconds: float | None) -> TaskCompleted:
    """Report that a task is completed."""
    return TaskCompleted(**_of(row), seconds=seconds)


def lost(row: Claimed, *, is_late: bool = False) -> TaskLost:
    """Report that a task was taken from this worker."""
    return TaskLost(**_of(row), is_late=is_late)


def ended(end: AttemptResult) -> TaskEnded:
    """Report what became of a task."""
    known = {**_of(end.attempt.row), "seconds": end.seconds}
    outcome = end.outcome
    match end.settlement:
        case Settlement(state=states.FAILED) as settlement if outcome is not None:
            return TaskFailed(**known, error=outcome, fail_count=settlement.fail_count)
        case Settlement(state=states.CANCELLED) if outcome is not None:
            return TaskCancelled(**known, error=outcome)
        case Settlement(error=dict()) as settlement if outcome is not None:
            delay = settlement.delay or 0.0
            return TaskRetried(**known, error=outcome, fail_count=settlement.fail_count, delay=delay)
        case Settlement() if isinstance(outcome, Snooze):
            return TaskSnoozed(**known, delay=outcome.delay)
        case Settlement():
            return TaskReleased(**known, error=outcome if isinstance(outcome, Unreachable) else None)
        case _:
            return TaskCompleted(**known)


def cancelled_with_parent(schema: str | None, row: Mapping[Any, Any]) -> TaskCancelled:
    """Report that a task was cancelled because one that it waited for has not completed."""
    known = {name: row[name] for name in ("id", "type", "queue", "attempt")}
    return TaskCancelled(**known, schema=schema, seconds=None, error=ParentFailed(row["reason"]))


def _of(row: Claimed) -> dict[str, Any]:
    queue = row[CLAIM].from_queue
    return {
        "id": row[ID],
        "type": row[TYPE],
        "queue": queue.name,
        "schema": queue.schema,
        "attempt": row[ATTEMPT],
    }
