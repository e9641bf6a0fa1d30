"""What a processor gets: the task that it is to process."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, TypeVar, cast

from apoq.client.queue import Queue
from apoq.core.registry import Running
from apoq.postgres.loaders import UnreadableData, read_json, read_time
from apoq.schema.statements.claim import CREATED_AT, META, PRIORITY, PROCESS_AT
from apoq.worker.execution.attempt import AnyAttempt
from apoq.worker.execution.task_sessions import AsyncTaskSession, TaskSession

S = TypeVar("S", bound=TaskSession | AsyncTaskSession)


class _Running(Running, Generic[S]):
    __slots__ = ("_attempt", "data")

    def __init__(self, attempt: AnyAttempt) -> None:
        self._attempt = attempt
        self.data: Any = attempt.data

    @property
    def id(self) -> int:
        """The task's id, with which you find its row."""
        return self._attempt.id

    @property
    def type(self) -> str:
        """What kind of work it is."""
        return self._attempt.type

    @property
    def from_queue(self) -> Queue:
        """The queue that it came from."""
        return self._attempt.from_queue

    @property
    def queue(self) -> str:
        """The name of the queue that it came from."""
        return self._attempt.from_queue.name

    @property
    def priority(self) -> int:
        """Within a queue, what is higher is claimed first."""
        return self._attempt.row[PRIORITY]

    @property
    def created_at(self) -> datetime:
        """When it was added."""
        return read_time(self._attempt.row[CREATED_AT])

    @property
    def process_at(self) -> datetime:
        """When it was due."""
        return read_time(self._attempt.row[PROCESS_AT])

    @property
    def attempt(self) -> int:
        """Which attempt this is: 1 is the first."""
        return self._attempt.number

    @property
    def fail_count(self) -> int:
        """How many attempts have failed."""
        return self._attempt.fail_count

    @property
    def claim_token(self) -> int:
        """What this worker must show to write to the task: it grows with each claim."""
        return self._attempt.claim_token

    @property
    def meta(self) -> dict[str, Any]:
        """The application's own notes, given to `add`; empty if there are none.

        Empty as well if another program has written what is no JSON object, or larger than 8,000 bytes.
        """
        text = self._attempt.row[META]
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
        return self._attempt.should_stop

    @property
    def session(self) -> S:
        """A session in whose transaction the task will be completed: your writes take effect exactly once.

        Opened when it is first asked for, so that a processor that doesn't use it holds no connection. When
        the processor returns, the worker writes the completion in the same transaction and commits both; when
        it raises, or when the task has been taken from this worker meanwhile, neither takes place.
        """
        return cast("S", self._attempt.session())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} id={self.id} type={self.type!r} attempt={self.attempt}>"


class RunningTask(_Running[TaskSession]):
    """What a plain processor gets: the task, and ``task.session``, a SQLAlchemy `Session`."""

    __slots__ = ()

    is_async = False


class AsyncRunningTask(_Running[AsyncTaskSession]):
    """What a coroutine processor gets: the task, and ``task.session``, an `AsyncSession`."""

    __slots__ = ()

    is_async = True


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
