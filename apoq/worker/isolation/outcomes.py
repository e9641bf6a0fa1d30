"""The outcomes of attempts, as messages."""

from __future__ import annotations

from typing import Final

from apoq.core.outcomes import (
    REPORT,
    Cancel,
    Fail,
    Outcome,
    Release,
    Retry,
    Snooze,
    Unreachable,
    reason,
    report,
)
from apoq.worker.execution.runner import AttemptResult
from apoq.worker.isolation.messages import Ended, Raised

ERROR: Final = "error"
_OUTCOMES: Final[tuple[type[Outcome], ...]] = (Retry, Fail, Cancel, Snooze, Release, Unreachable)


class RemoteError(Exception):
    """The base class of errors that were raised in a child process.

    Each is of a class with the name of the original's, because the original may need more than its message to
    be made again.
    """


def result_message(end: AttemptResult) -> Ended:
    """Return the message about an attempt that has ended in a child."""
    if end.outcome is not None:
        return failure_message(end.outcome)
    row = end.row
    is_followed = row is not None and bool(row.get("is_followed"))
    return Ended(result=end.result, is_committed=row is not None, is_followed=is_followed)


def failure_message(error: BaseException) -> Ended:
    """Return the message about an attempt that has ended with this error or outcome."""
    known = next((kind for kind in _OUTCOMES if isinstance(error, kind)), None)
    return Ended(
        outcome=ERROR if known is None else known.__name__,
        delay=None if known is None else getattr(error, "delay", None),
        error=raised(error),
        is_caused=reason(error) is not error,
    )


def raised(error: BaseException) -> Raised:
    """Return an error, or the one from which an outcome was raised, for a message."""
    return Raised(report(error), type(reason(error)).__module__)


def outcome_of(ended: Ended) -> BaseException | None:
    """Return the outcome in a message, as the child's processor would have raised it here."""
    if ended.error is None:
        return None
    message, error = ended.error.report["message"], error_of(ended.error)
    outcome: BaseException
    match ended.outcome:
        case Retry.__name__:
            outcome = Retry(message, delay=ended.delay)
        case Fail.__name__:
            outcome = Fail(message)
        case Cancel.__name__:
            outcome = Cancel(message)
        case Snooze.__name__:
            outcome = Snooze(ended.delay or 0.0)
        case Release.__name__:
            outcome = Release(message)
        case Unreachable.__name__:
            outcome = Unreachable(message)
        case _:
            outcome = error
    if ended.is_caused:
        outcome.__cause__ = error
    setattr(outcome, REPORT, ended.error.report)
    return outcome


def error_of(raised: Raised) -> RemoteError:
    """Return an error for this process."""
    name = raised.report["class"]
    kind = type(name.rpartition(".")[2], (RemoteError,), {"__module__": raised.module, "__qualname__": name})
    error: RemoteError = kind(raised.report["message"])
    if trace := raised.report["traceback"]:
        error.add_note(f"In the process of the task:\n{trace}")
    return error
