"""What became of an attempt, and what that makes of the task: decided without a database or a clock."""

from __future__ import annotations

import random
import traceback
from datetime import timedelta
from typing import NamedTuple

from apoq.core.retry import RetryPolicy, seconds
from apoq.core.states import CANCELLED, FAILED, PENDING

MAX_MESSAGE_LENGTH = 4_000
MAX_TRACEBACK_LENGTH = 16_000
"""Characters of an error that are kept on the task: the head and the tail of what is longer."""

MAX_INTEGER = 2**31 - 1
"""The largest number that the task's columns hold."""


class Outcome(Exception):
    """Raised by a processor to choose what becomes of its task; its writes to ``task.session`` are undone."""


class Retry(Outcome):
    """Fail this attempt and try again, after `delay` (seconds or a timedelta) instead of the usual.

    Uses up an attempt: when none is left, the task fails. ``raise Retry(delay=60) from error`` keeps
    the error.
    """

    def __init__(self, reason: str = "", *, delay: float | timedelta | None = None) -> None:
        super().__init__(reason)
        self.delay = None if delay is None else seconds(delay)


class Cancel(Outcome):
    """End the task as `cancelled`, for this reason; it isn't tried again."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)


class Snooze(Outcome):
    """Put the task off for `delay` (seconds or a timedelta); no attempt is used up."""

    def __init__(self, delay: float | timedelta) -> None:
        super().__init__(f"put off for {delay}")
        self.delay = seconds(delay)


class Release(Outcome):
    """Give the task back, due as before and with no attempt used up: it can't run here, or not soon."""


class Unreachable(Outcome):
    """Try the task again soon, with no attempt used up: ``task.session`` could not connect.

    Not at once, for the server may have no connection left, or know another password by now.
    """

    def __init__(self, reason: str = "", *, chance: float | None = None) -> None:
        """`chance` is a number in [0, 1); random where it isn't given."""
        super().__init__(reason)
        if chance is None:
            chance = random.random()  # noqa: S311 - jitter, no secret
        self.delay = 1.0 + chance


class WorkerDied(Exception):
    """The worker that ran the task is gone, and nobody knows how far it came."""


class Settlement(NamedTuple):
    """What is written to a task when its attempt has ended, unless that completed it."""

    state: str
    attempt: int
    fail_count: int
    delay: float | None = None
    """Seconds until it is due again; None leaves `process_at` as it was."""
    error: dict[str, str] | None = None


def settle(outcome: BaseException, *, attempt: int, fail_count: int, policy: RetryPolicy) -> Settlement:
    """Decide what becomes of a task whose attempt number `attempt`, after `fail_count` failures, ended so."""
    match outcome:
        case Cancel():
            return Settlement(CANCELLED, attempt, fail_count, error=report(outcome))
        case Snooze() | Unreachable():
            return Settlement(PENDING, attempt - 1, fail_count, delay=outcome.delay)
        case Release():
            return Settlement(PENDING, attempt - 1, fail_count)
        case WorkerDied():
            # Whoever rescued it has counted the failure and stored the error; this claim just ends it.
            return Settlement(FAILED, attempt - 1, fail_count)
    fail_count = min(fail_count + 1, MAX_INTEGER)  # whatever another program has written there
    # The limit may be the processor's, which only its worker knows: it is kept for people to read.
    error = report(outcome) | {"retry_limit": str(policy.limit)}
    # Attempts and failures differ where another program, such as the Node.js original, works the same table.
    if max(attempt, fail_count) > policy.limit:
        return Settlement(FAILED, attempt, fail_count, error=error)
    chosen = outcome.delay if isinstance(outcome, Retry) else None
    delay = policy.delay_after(fail_count) if chosen is None else chosen
    return Settlement(PENDING, attempt, fail_count, delay=delay, error=error)


def report(error: BaseException) -> dict[str, str]:
    """Describe an error in bounded text that jsonb can hold."""
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
    """Return the error that a processor has raised `Retry` from, if it has."""
    if isinstance(error, Retry) and error.__cause__ is not None:
        return error.__cause__
    return error


def message_of(error: BaseException) -> str:
    """Return an error's message, also if it can't be made."""
    try:
        return str(error)
    except BaseException:  # noqa: BLE001 - an error whose text can't be made is still an error
        return "(its message could not be made)"


def _clean(text: str, limit: int) -> str:
    if len(text) > limit:
        text = f"{text[: limit // 2]}\n… {len(text) - limit} characters left out …\n{text[-limit // 2 :]}"
    # jsonb holds neither U+0000 nor a lone surrogate.
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
