"""An attempt: a claimed task, from when a slot takes it until it is settled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Generic, TypeVar, cast

import psycopg

from apoq.client.queue import Queue
from apoq.core.options import HIGHEST_LIMIT
from apoq.core.outcomes import TaskExpired, Unreachable
from apoq.core.progress import Report
from apoq.core.registry import Processor
from apoq.core.retry import LONGEST_DELAY, RetryPolicy
from apoq.postgres.connections import is_away
from apoq.postgres.loaders import UnreadableData, read_json
from apoq.schema.statements.claim import (
    ATTEMPT,
    CLAIM,
    CLAIM_TOKEN,
    DATA,
    EXPIRES_IN,
    FAIL_COUNT,
    ID,
    LONGEST,
    RETRY_DELAY,
    RETRY_LIMIT,
    TIMEOUT,
    TYPE,
    ClaimedTask,
)
from apoq.worker.execution.task_sessions import (
    AsyncTaskSession,
    TaskSession,
    TaskSessions,
    cut_off,
    is_completing,
    is_cut_off,
)
from apoq.worker.lease import Lease

S = TypeVar("S", bound=TaskSession | AsyncTaskSession)

_LONGEST: Final = LONGEST_DELAY.total_seconds()


@dataclass(slots=True, eq=False)
class Claim:
    """Tasks that one statement has claimed."""

    from_queue: Queue
    processors: Mapping[str, Processor]
    """By type, as they were at the claim."""
    claimed_at: float
    """By time.monotonic()."""
    sent_at: float
    """When the statement was sent, by time.monotonic(): not later than the claim's time in the database."""
    lease: Lease
    """Of the worker, in the queue's schema."""
    signal: StopSignal
    """Given when these tasks should stop."""
    fetch: Callable[[AnyAttempt], Sequence[Sequence[Any]]]
    """Reads the data of one of them that is large, as `read_data` does."""
    number: int = 0
    """Of this worker's claims."""
    on_start: Callable[[Claimed], object] | None = None
    """Called when one of them begins, if there is a listener; then its time is measured, too."""
    is_ahead: bool = False
    """Whether they were more than there were free slots."""
    on_progress: Callable[[AnyAttempt, Report], object] | None = None
    """Called with the progress that one of them reports."""
    is_placed: bool = False
    """Whether they may have places."""


Claimed = ClaimedTask[Claim]


def longest_data(queue: Queue) -> int:
    """Return how many characters the data of a task of this queue may have, as PostgreSQL writes it.

    PostgreSQL adds spaces, which the limit of the queue doesn't count.
    """
    return min(2 * queue.max_data_size + 1_000, HIGHEST_LIMIT)


def parameters_of_data(attempt: AnyAttempt) -> dict[str, Any]:
    """Return the parameters of `read_data` for the task of an attempt."""
    return {
        "task_id": attempt.id,
        "held_under": attempt.claim_token,
        "longest_data": longest_data(attempt.from_queue),
    }


def short_data(row: Claimed) -> Any:
    """Read the data of a claimed row that has it; return the error if Python can't."""
    try:
        return read_json(row[DATA] or "")
    except UnreadableData as error:
        return error


class StopSignal:
    """Tells all tasks of a worker in one schema to stop."""

    __slots__ = ("is_given",)

    def __init__(self, *, is_given: bool = False) -> None:
        self.is_given = is_given


LOST: Final = StopSignal(is_given=True)
"""The signal of an attempt whose task the worker no longer owns."""


class _Attempt(Generic[S]):
    __slots__ = (
        "data",
        "ends_at",
        "has_parts",
        "open_session",
        "opened",
        "processor",
        "row",
        "signal",
        "was_fetched",
    )

    def __init__(self, row: Claimed, processor: Processor, open_session: Callable[[], S]) -> None:
        self.row = row
        self.processor = processor
        self.open_session = open_session
        self.signal = row[CLAIM].signal
        self.ends_at: float | None = None  # by time.monotonic(), once it runs with a limit
        self.opened: S | None = None
        self.has_parts = False  # whether it is known that the task is marked so
        self.data: Any = None
        self.was_fetched = False  # whether the data was read by a statement of its own, because it is large

    @property
    def id(self) -> int:
        """The task's id."""
        return self.row[ID]

    @property
    def type(self) -> str:
        """The task's type."""
        return self.row[TYPE]

    @property
    def from_queue(self) -> Queue:
        """The queue from which it was claimed."""
        return self.row[CLAIM].from_queue

    @property
    def number(self) -> int:
        """Which of the task's attempts this is: 1 is the first."""
        return self.row[ATTEMPT]

    @property
    def fail_count(self) -> int:
        """How many attempts have failed before."""
        return self.row[FAIL_COUNT]

    @property
    def claim_token(self) -> int:
        """The token without which nothing can be written to the task."""
        return self.row[CLAIM_TOKEN]

    @property
    def lease(self) -> Lease:
        """The lease until whose end the worker owns the task."""
        return self.row[CLAIM].lease

    @property
    def policy(self) -> RetryPolicy:
        """How its failures are retried."""
        delay = self.row[RETRY_DELAY]
        own = None if delay is None else timedelta(seconds=min(max(delay, 0.0), _LONGEST))
        return self.processor.policy_for(self.row[RETRY_LIMIT], own)

    @property
    def timeout(self) -> float | None:
        """How many seconds it may take; None: no limit."""
        own = self.row[TIMEOUT]
        # Another program may have written any value into the row.
        return self.processor.timeout if own is None else min(max(own, 0.0), _LONGEST)

    @property
    def should_stop(self) -> bool:
        """Whether the processor should end; see `RunningTask.should_stop`."""
        if self.signal.is_given:
            return True
        return self.ends_at is not None and time.monotonic() >= self.ends_at

    @property
    def may_report(self) -> bool:
        """Whether its progress is that of the task: not if the task is lost, or the timeout has ended it."""
        return self.signal is not LOST and (self.ends_at is None or time.monotonic() < self.ends_at)

    @property
    def has_data(self) -> bool:
        """Whether all of the task's data came with the claim: not if it is large."""
        text = self.row[DATA]
        return text is not None and len(text) <= LONGEST

    def known_data(self) -> Any:
        """Return the task's data, as far as it is known: None, if it is large and was not read."""
        return short_data(self.row) if self.data is None and self.has_data else self.data

    def read(self) -> None:
        """Read the task's data, from the database if it is large; raise `UnreadableData` if Python can't.

        If the task is no longer owned, the attempt is recalled. Raises `Unreachable` if the database is away,
        and `TaskExpired` if the task must not start any more.
        """
        row = self.row
        if row[EXPIRES_IN] is not None:
            self._check_expiry()
        text = row[DATA]
        if text is not None and len(text) <= LONGEST:
            self.data = read_json(text)
        else:
            self._fetch()
            self._check_expiry()

    def _check_expiry(self) -> None:
        expires_in = self.row[EXPIRES_IN]
        if expires_in is not None and time.monotonic() >= self.row[CLAIM].sent_at + expires_in:
            raise TaskExpired(TaskExpired.__doc__)

    def _fetch(self) -> None:
        try:
            found = self.row[CLAIM].fetch(cast("AnyAttempt", self))
        except psycopg.Error as error:
            if is_away(error):
                raise Unreachable(str(error)) from error
            raise UnreadableData(str(error)) from error
        if not found:
            self.recall()
            return
        ((text,),) = found
        if text is None or len(text) > longest_data(self.from_queue):
            raise UnreadableData(
                f"the data is larger than the queue's max_data_size, {self.from_queue.max_data_size:,} "
                "bytes: another program has added this task. Or give the worker a queue with a higher limit"
            )
        self.data, self.was_fetched = read_json(text), True

    def session(self) -> S:
        """Return the session in whose transaction the task is completed; open it the first time."""
        if self.opened is None:
            self.opened = self.open_session()
        return self.opened

    def recall(self) -> None:
        """Tell it, from another thread, that the worker no longer owns the task."""
        self.signal = LOST

    def cut_off(self) -> None:
        """Roll back its session, from another thread, because the worker's lease has ended."""
        if self.opened is not None:
            cut_off(self.opened)

    @property
    def is_completing(self) -> bool:
        """Whether its session commits the task's completion, or has committed it."""
        return self.opened is not None and is_completing(self.opened)

    @property
    def is_cut_off(self) -> bool:
        """Whether its session has been cut off."""
        return self.opened is not None and is_cut_off(self.opened)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.number} of task {self.id} ({self.type})>"


class Attempt(_Attempt[TaskSession]):
    """An attempt of a plain function."""

    __slots__ = ()


def _nothing() -> None:
    pass


class IsolatedAttempt(Attempt):
    """An attempt of a plain function in a child process, which also has its session."""

    __slots__ = ("_is_completing", "_is_cut_off", "kill")

    def __init__(self, row: Claimed, processor: Processor, open_session: Callable[[], TaskSession]) -> None:
        super().__init__(row, processor, open_session)
        self.kill: Callable[[], object] = _nothing
        """Kills the child while it runs the attempt, and otherwise does nothing."""
        self._is_completing = self._is_cut_off = False

    def let_complete(self) -> bool:
        """Let the child complete the task if it is still owned; return whether it may."""
        self._is_completing = self.lease.is_held and self.signal is not LOST and not self._is_cut_off
        return self._is_completing

    def cut_off(self) -> None:
        """Kill the child, from another thread, because other workers may begin the task."""
        self._is_cut_off = True
        self.kill()

    @property
    def is_completing(self) -> bool:
        """Whether the child commits the task's completion, or has committed it."""
        return self._is_completing

    @property
    def is_cut_off(self) -> bool:
        """Whether the child was killed by `cut_off`."""
        return self._is_cut_off


_LOST_MESSAGE: Final = "the worker no longer owns the task"


class AsyncAttempt(_Attempt[AsyncTaskSession]):
    """An attempt of a coroutine function."""

    __slots__ = ("_awaits", "_is_cancelled")

    async def call(self, task: object) -> Any:
        """Await the processor of this running task, and return its result; `recall` can cancel it."""
        self._is_cancelled = False
        self._awaits = asyncio.current_task()
        try:
            # After `_awaits` is set, so that `recall` either sets the signal before this, or cancels.
            if self.signal is LOST:
                raise asyncio.CancelledError(_LOST_MESSAGE)
            return await self.processor.function(task)
        finally:
            awaits, self._awaits = self._awaits, None
            if self._is_cancelled and awaits is not None:
                awaits.uncancel()  # the cancellation was meant for the processor only

    def recall(self) -> None:
        """Tell it, from another thread, that the worker no longer owns the task, and cancel it once."""
        super().recall()
        awaits: asyncio.Task[Any] | None = getattr(self, "_awaits", None)
        if awaits is not None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                awaits.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        # On its own event loop: the processor has ended, or it awaits something.
        if self._awaits is not None and not self._is_cancelled:
            self._is_cancelled = self._awaits.cancel(_LOST_MESSAGE)


AnyAttempt = Attempt | AsyncAttempt


def attempt_of(row: Claimed, sessions: TaskSessions) -> AnyAttempt:
    """Return an attempt of a claimed task, of the kind that its processor needs."""
    processor = row[CLAIM].processors[row[TYPE]]
    if processor.is_plain:
        return Attempt(row, processor, sessions.open)
    if processor.is_coroutine:
        return AsyncAttempt(row, processor, sessions.open_async)
    return IsolatedAttempt(row, processor, sessions.open)
