"""Decides the next state of a task from the outcome of an attempt, without a database or a clock."""

from __future__ import annotations

import random
import traceback
from datetime import timedelta
from typing import Final, NamedTuple

from apoq.core.retry import RetryPolicy, seconds
from apoq.core.states import CANCELLED, FAILED, PENDING

MAX_MESSAGE_LENGTH = 4_000
MAX_TRACEBACK_LENGTH = 16_000
"""Characters of an error that are stored with the task; of a longer text, the beginning and the end."""

MAX_INTEGER = 2**31 - 1
"""The largest number that the integer columns of a task can hold."""


REPORT: Final = "_apoq_report"
"""The attribute with the report of an error that was raised in another process."""


class Outcome(Exception):
    """Base of the exceptions by which a processor chooses the outcome of its task.

    The processor's writes to ``task.session`` are rolled back.
    """


class Retry(Outcome):
    """Fail this attempt and try the task again, after a delay of your choice.

    It uses up an attempt: if none is left, the task is marked `failed`. ``raise Retry(delay=60) from error``
    stores that error with the task.

    Args:
        reason: The message that is stored with the task, unless `Retry` is raised from another error.
        delay: The wait before the next attempt, as seconds or a timedelta; by default, the processor's
            `retry_delay` decides.
    """

    def __init__(self, reason: str = "", *, delay: float | timedelta | None = None) -> None:
        super().__init__(reason)
        self.delay = None if delay is None else seconds(delay)


class Fail(Outcome):
    """Fail the task permanently, even if it has attempts left.

    ``raise Fail("the card was rejected") from error`` stores that error with the task.

    Args:
        reason: The message that is stored with the task, unless `Fail` is raised from another error.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)


class Cancel(Outcome):
    """Cancel the task; it isn't tried again.

    Args:
        reason: The message that is stored with the task.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)


class Snooze(Outcome):
    """Postpone the task without using up an attempt.

    Args:
        delay: The time until the task is due again, as seconds or a timedelta.
    """

    def __init__(self, delay: float | timedelta) -> None:
        super().__init__(f"postponed by {delay}")
        self.delay = seconds(delay)


class Release(Outcome):
    """Release the task, due as before and without using up an attempt: it can't run here, or not soon."""


class Unreachable(Outcome):
    """Try the task again soon, without using up an attempt: ``task.session`` could not connect.

    Not at once, because the server may have no connections left, or a new password.
    """

    def __init__(self, reason: str = "", *, chance: float | None = None) -> None:
        """`chance` is a number in [0, 1), random by default."""
        super().__init__(reason)
        if chance is None:
            chance = random.random()  # noqa: S311 - jitter, no secret
        self.delay = 1.0 + chance


class WorkerDied(Exception):
    """The worker that ran the task died, and how much of the task it finished is unknown."""


class ProcessDied(Exception):
    """The process in which an isolated task ran has died, and how much of the task it finished is unknown."""


class TaskExpired(Outcome):
    """The task had not started at its time to expire (expires_at), and doesn't start any more."""


class ParentFailed(Outcome):
    """A task that this one waited for has failed, was cancelled or was deleted, so this one is cancelled."""


class Settlement(NamedTuple):
    """The values that are written to a task when an attempt ends without completing it."""

    state: str
    attempt: int
    fail_count: int
    delay: float | None = None
    """Seconds until it is due again; None leaves `process_at` as it was."""
    error: dict[str, str] | None = None


def settle(outcome: BaseException, *, attempt: int, fail_count: int, policy: RetryPolicy) -> Settlement:
    """Decide the next state of a task from its outcome, the attempt's number and the failures before it."""
    match outcome:
        case Cancel():
            return Settlement(CANCELLED, attempt, fail_count, error=report(outcome))
        case Snooze() | Unreachable():
            return Settlement(PENDING, attempt - 1, fail_count, delay=outcome.delay)
        case Release():
            return Settlement(PENDING, attempt - 1, fail_count)
        case WorkerDied():
            # The worker that rescued it has counted the failure and stored the error: only end the task.
            return Settlement(FAILED, attempt - 1, fail_count)
        case TaskExpired():
            return Settlement(CANCELLED, attempt - 1, fail_count, error=EXPIRED)
    fail_count = min(fail_count + 1, MAX_INTEGER)  # another program may have written any number there
    # The limit may be the processor's, which only its worker knows: it is stored for people to read.
    error = report(outcome) | {"retry_limit": str(policy.limit)}
    # Attempts and failures differ if another program, such as the Node.js original, works on the same table.
    if isinstance(outcome, Fail) or max(attempt, fail_count) > policy.limit:
        return Settlement(FAILED, attempt, fail_count, error=error)
    chosen = outcome.delay if isinstance(outcome, Retry) else None
    delay = policy.delay_after(fail_count) if chosen is None else chosen
    return Settlement(PENDING, attempt, fail_count, delay=delay, error=error)


def report(error: BaseException) -> dict[str, str]:
    """Describe an error in bounded text that jsonb can hold."""
    known: dict[str, str] | None = getattr(error, REPORT, None)
    if known is not None:
        return known
    error = reason(error)
    try:
        trace = "".join(traceback.format_exception(error))
    except BaseException:  # noqa: BLE001
        trace = ""
    return {
        "class": _clean(type(error).__qualname__, MAX_MESSAGE_LENGTH),
        "message": _clean(message_of(error), MAX_MESSAGE_LENGTH),
        "traceback": _clean(trace, MAX_TRACEBACK_LENGTH),
    }


def reason(error: BaseException) -> BaseException:
    """Return the error from which `Retry` or `Fail` was raised, or else the error itself."""
    if isinstance(error, Retry | Fail) and error.__cause__ is not None:
        return error.__cause__
    return error


def message_of(error: BaseException) -> str:
    """Return an error's message, or a replacement if its `str()` raises."""
    try:
        return str(error)
    except BaseException:  # noqa: BLE001 - an error without a message is still an error
        return "(the message is not available: str() of the error raised)"


def _clean(text: str, limit: int) -> str:
    if len(text) > limit:
        text = f"{text[: limit // 2]}\n… {len(text) - limit} characters left out …\n{text[-limit // 2 :]}"
    # jsonb can hold neither U+0000 nor a lone surrogate.
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")


EXPIRED: Final = report(TaskExpired(TaskExpired.__doc__))
"""The error of a task that has expired."""
