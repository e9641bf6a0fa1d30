"""A task while it runs: what its processor gets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Generic, TypeVar, cast

import psycopg

from apoq.client.queue import Queue
from apoq.core.options import HIGHEST_LIMIT
from apoq.core.outcomes import Unreachable
from apoq.core.registry import Processor, Running
from apoq.core.retry import LONGEST_DELAY, RetryPolicy
from apoq.postgres.connections import is_away
from apoq.postgres.loaders import UnreadableData, read_json, read_time
from apoq.schema.statements.claim import (
    ATTEMPT,
    CLAIM,
    CLAIM_TOKEN,
    CREATED_AT,
    DATA,
    FAIL_COUNT,
    ID,
    LONGEST,
    META,
    PRIORITY,
    PROCESS_AT,
    RETRY_DELAY,
    RETRY_LIMIT,
    TIMEOUT,
    TYPE,
    ClaimedTask,
)
from apoq.worker.execution.task_sessions import AsyncTaskSession, TaskSession, cut_off, is_cut_off
from apoq.worker.liveness.lease import Lease

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
    lease: Lease
    """Of the worker, in the queue's schema."""
    signal: StopSignal
    """Given when these are to stop."""
    fetch: Callable[[AnyRunningTask], Sequence[Sequence[Any]]]
    """Reads the data of one of them that is large, as `read_data` does."""
    number: int = 0
    """Of this worker's claims."""
    is_ahead: bool = False
    """Whether they were more than found a slot at once."""


Claimed = ClaimedTask[Claim]


def longest_data(queue: Queue) -> int:
    """Return how many characters the data of a task of this queue may have, as PostgreSQL writes it.

    It puts spaces where the limit of the queue counts none.
    """
    return min(2 * queue.max_data_size + 1_000, HIGHEST_LIMIT)


def short_data(row: Claimed) -> Any:
    """Read the data of a claimed row that has it; return the error if Python can't."""
    try:
        return read_json(row[DATA] or "")
    except UnreadableData as error:
        return error


class StopSignal:
    """How a worker tells all the tasks that it has claimed that they are to stop."""

    __slots__ = ("is_given",)

    def __init__(self, *, is_given: bool = False) -> None:
        self.is_given = is_given


LOST: Final = StopSignal(is_given=True)
"""What a task has instead, once it is known that it runs in vain."""


class _Running(Running, Generic[S]):
    __slots__ = (
        "data",
        "ends_at",
        "open_session",
        "opened",
        "processor",
        "row",
        "signal",
    )

    def __init__(
        self,
        row: Claimed,
        processor: Processor,
        open_session: Callable[[], S],
    ) -> None:
        self.row = row
        self.processor = processor
        self.open_session = open_session
        self.signal = row[CLAIM].signal
        self.ends_at: float | None = None  # by time.monotonic(), once it runs with a limit
        self.opened: S | None = None
        self.data: Any = None

    @property
    def id(self) -> int:
        """The task's id, with which you find its row."""
        return self.row[ID]

    @property
    def type(self) -> str:
        """What kind of work it is."""
        return self.row[TYPE]

    @property
    def from_queue(self) -> Queue:
        """The queue that it came from."""
        return self.row[CLAIM].from_queue

    @property
    def queue(self) -> str:
        """The name of the queue that it came from."""
        return self.from_queue.name

    @property
    def priority(self) -> int:
        """Within a queue, what is higher is claimed first."""
        return self.row[PRIORITY]

    @property
    def created_at(self) -> datetime:
        """When it was added."""
        return read_time(self.row[CREATED_AT])

    @property
    def process_at(self) -> datetime:
        """When it was due."""
        return read_time(self.row[PROCESS_AT])

    @property
    def attempt(self) -> int:
        """Which attempt this is: 1 is the first."""
        return self.row[ATTEMPT]

    @property
    def fail_count(self) -> int:
        """How many attempts have failed."""
        return self.row[FAIL_COUNT]

    @property
    def claim_token(self) -> int:
        """What this worker must show to write to the task: it grows with each claim."""
        return self.row[CLAIM_TOKEN]

    @property
    def lease(self) -> Lease:
        """Until when the task is the worker's own."""
        return self.row[CLAIM].lease

    @property
    def policy(self) -> RetryPolicy:
        """How its failures are retried."""
        delay: float | None = self.row[RETRY_DELAY]
        own = None if delay is None else timedelta(seconds=min(max(delay, 0.0), _LONGEST))
        return self.processor.policy_for(self.row[RETRY_LIMIT], own)

    @property
    def timeout(self) -> float | None:
        """How many seconds an attempt may take; None: as long as it likes."""
        own: float | None = self.row[TIMEOUT]
        # Whatever another program has written into the row, it is a limit.
        return self.processor.timeout if own is None else min(max(own, 0.0), _LONGEST)

    @property
    def meta(self) -> dict[str, Any]:
        """The application's own notes, given to `add`; empty if there are none.

        Empty as well if another program has written what is no JSON object, or larger than 8,000 bytes.
        """
        text: str | None = self.row[META]
        try:
            found = None if text is None else read_json(text)
        except UnreadableData:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def should_stop(self) -> bool:
        """Whether this attempt should come to an end.

        Its worker is stopping, or has lost its lease (so that others may run the task), or the task was
        cancelled, or its own `timeout` is over. A processor that runs for long looks at it now and then. At
        a stop it has what `stop(timeout)` leaves it: save how far it has come and return, or give the task
        back with ``raise Snooze(0)``, which uses up no attempt. Past its own timeout, the attempt has failed
        already, and it just has to return; so it has where the task was cancelled.
        """
        if self.signal.is_given:
            return True
        return self.ends_at is not None and time.monotonic() >= self.ends_at

    @property
    def has_data(self) -> bool:
        """Whether all of its data came with the claim: not if it is large."""
        text: str | None = self.row[DATA]
        return text is not None and len(text) <= LONGEST

    def known_data(self) -> Any:
        """Return its data, as far as it is known: None, if it is large and was not read."""
        return short_data(self.row) if self.data is None and self.has_data else self.data

    def read(self) -> None:
        """Read its data, from the database if it is large; raise `UnreadableData` if Python can't.

        A task that is no longer owned is recalled. Raises `Unreachable` if the database is away.
        """
        text: str | None = self.row[DATA]
        if text is not None and len(text) <= LONGEST:
            self.data = read_json(text)
        else:
            self._fetch()

    def _fetch(self) -> None:
        batch = self.row[CLAIM]
        try:
            found = batch.fetch(cast("AnyRunningTask", self))
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
        self.data = read_json(text)

    @property
    def session(self) -> S:
        """A session in whose transaction the task will be completed: your writes take effect exactly once.

        Opened when it is first asked for, so that a processor that doesn't use it holds no connection. When
        the processor returns, the worker writes the completion in the same transaction and commits both; when
        it raises, or when the task has been taken from this worker meanwhile, neither takes place.
        """
        if self.opened is None:
            self.opened = self.open_session()
        return self.opened

    def recall(self) -> None:
        """Tell it, from another thread, that the task is this worker's no more."""
        self.signal = LOST

    def cut_off(self) -> None:
        """Undo what its session has written so far, from another thread: the worker's lease has ended."""
        if self.opened is not None:
            cut_off(self.opened)

    @property
    def is_cut_off(self) -> bool:
        """Tell whether its session has been cut off."""
        return self.opened is not None and is_cut_off(self.opened)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} id={self.id} type={self.type!r} attempt={self.attempt}>"


class RunningTask(_Running[TaskSession]):
    """What a plain processor gets: the task, and ``task.session``, a SQLAlchemy `Session`."""

    __slots__ = ()

    is_async = False


_IN_VAIN: Final = "the task is this worker's no more"


class AsyncRunningTask(_Running[AsyncTaskSession]):
    """What a coroutine processor gets: the task, and ``task.session``, an `AsyncSession`."""

    __slots__ = ("_awaits", "_is_cancelled")

    is_async = True

    async def call(self) -> None:
        """Await the processor, so that `recall` can cancel it."""
        self._is_cancelled = False
        self._awaits = asyncio.current_task()
        try:
            # Only now, so that whoever recalls it sees one or the other.
            if self.signal is LOST:
                raise asyncio.CancelledError(_IN_VAIN)
            await self.processor.function(self)
        finally:
            awaits, self._awaits = self._awaits, None
            if self._is_cancelled and awaits is not None:
                awaits.uncancel()  # what goes on here isn't meant

    def recall(self) -> None:
        """Tell it, from another thread, that the task is this worker's no more, and cancel it, once."""
        super().recall()
        awaits: asyncio.Task[Any] | None = getattr(self, "_awaits", None)
        if awaits is not None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                awaits.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        # On its own loop: it has ended, or it awaits something.
        if self._awaits is not None and not self._is_cancelled:
            self._is_cancelled = self._awaits.cancel(_IN_VAIN)


AnyRunningTask = RunningTask | AsyncRunningTask

KNOWN = (
    "id",
    "type",
    "data",
    "queue",
    "priority",
    "created_at",
    "process_at",
    "attempt",
    "fail_count",
    "claim_token",
    "meta",
)
"""What a running task knows of its row."""
