"""The running task, which a processor takes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from typing import Any, Generic, TypeVar, cast

from apoq.client.groups import TaskGroup
from apoq.client.parents import ParentCounts, count_parents, read_results, read_results_async
from apoq.client.queue import Queue
from apoq.core.progress import report
from apoq.core.registry import Running
from apoq.postgres.loaders import UnreadableData, read_json, read_time
from apoq.schema.statements.claim import CLAIM, CREATED_AT, META, PRIORITY, PROCESS_AT, TICK_AT
from apoq.tracing import KEYS as TRACE_KEYS
from apoq.worker.execution.attempt import AnyAttempt
from apoq.worker.execution.task_sessions import AsyncTaskSession, TaskSession

S = TypeVar("S", bound=TaskSession | AsyncTaskSession)


class _Running(Running, Generic[S]):
    __slots__ = ("_attempt", "data")

    data: Any
    """The task's data."""

    def __init__(self, attempt: AnyAttempt) -> None:
        self._attempt = attempt
        self.data = attempt.data

    @property
    def id(self) -> int:
        """The task's id."""
        return self._attempt.id

    @property
    def type(self) -> str:
        """The task's type."""
        return self._attempt.type

    @property
    def from_queue(self) -> Queue:
        """The task's queue, as a `Queue`."""
        return self._attempt.from_queue

    @property
    def queue(self) -> str:
        """The name of the task's queue."""
        return self._attempt.from_queue.name

    @property
    def priority(self) -> int:
        """The task's priority: higher ones are claimed first."""
        return self._attempt.row[PRIORITY]

    @property
    def created_at(self) -> datetime:
        """Time when the task was added, by the database's clock."""
        return read_time(self._attempt.row[CREATED_AT])

    @property
    def process_at(self) -> datetime:
        """Time when the task was due."""
        return read_time(self._attempt.row[PROCESS_AT])

    @property
    def tick_at(self) -> datetime | None:
        """The time of the schedule for which the task was added; None if no schedule has added it."""
        seconds = self._attempt.row[TICK_AT]
        return None if seconds is None else read_time(seconds)

    @property
    def attempt(self) -> int:
        """The number of this attempt: 1 is the first."""
        return self._attempt.number

    @property
    def fail_count(self) -> int:
        """The number of attempts that have failed before this one."""
        return self._attempt.fail_count

    @property
    def claim_token(self) -> int:
        """The fencing token of this claim, which grows with each claim of the task.

        Pass it to other systems that must reject writes of a worker that has lost the task.
        """
        return self._attempt.claim_token

    @property
    def meta(self) -> dict[str, Any]:
        """The `meta` that was given to `add`; empty if there was none.

        Also empty if another program has stored a value that is not a JSON object, or is larger than 8,000
        bytes.
        """
        found = read_meta(self._attempt)
        for key in TRACE_KEYS:
            found.pop(key, None)
        return found

    @property
    def should_stop(self) -> bool:
        """Whether the processor should stop; a long-running processor should check this regularly.

        It becomes True when

        - the worker is stopping: save the progress and return, or ``raise Snooze(0)`` to run the task again
          without using up an attempt. The time for that is the `timeout` of `Worker.stop`;
        - the worker has lost its lease, so that another worker may run the task: return;
        - the task was cancelled: return;
        - the attempt's timeout has expired, so that it has already failed: return.
        """
        return self._attempt.should_stop

    @property
    def session(self) -> S:
        """The session in whose transaction the task is completed.

        Its writes take effect exactly once. When the processor returns, the worker writes the completion in
        this transaction and commits it. If the processor raises an exception, or this worker no longer owns
        the task, the transaction is rolled back.

        The session is opened when it is first used. A processor that doesn't use it needs no connection.
        """
        return cast("S", self._attempt.session())

    @property
    def group(self) -> TaskGroup:
        """The group of the task, to which it can add tasks by ``task.group.add`` and ``add_many``.

        They are added in the transaction of ``task.session``, and so take effect if the task completes. The
        tasks that run after the group wait for them, too.
        """
        return TaskGroup(self._attempt.from_queue, self.session, self._attempt.id)

    def set_progress(self, done: float, total: float | None = None, note: str = "") -> None:
        """Report how far the task has come, for people to look at.

        It costs almost nothing and may be called often, from any thread: at most once a second, the worker
        writes the last reports of all its tasks. `Queue.progress` and ``apoq show`` return the last one, also
        after the task has ended. It is a report, not a checkpoint: the last seconds before a crash are lost.

        Args:
            done: How much is done, in any unit.
            total: How much there is to do, in the same unit; None if that isn't known.
            note: A text of at most 500 characters.

        Raises:
            TypeError: If `done` or `total` is not a number, or `note` is not a string.
            ValueError: If a number is negative or not finite, or the note is too long or can't be stored.
        """
        checked = report(done, total, note)
        on_progress = self._attempt.row[CLAIM].on_progress
        if on_progress is not None and self._attempt.may_report:
            on_progress(self._attempt, checked)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} id={self.id} type={self.type!r} attempt={self.attempt}>"


def read_meta(attempt: AnyAttempt) -> dict[str, Any]:
    """Return the `meta` of a task, with the context of its trace if it has one."""
    text = attempt.row[META]
    try:
        found = None if text is None else read_json(text)
    except UnreadableData:
        return {}
    return found if isinstance(found, dict) else {}


class RunningTask(_Running[TaskSession]):
    """The running task that a plain function takes. Its ``session`` is a SQLAlchemy `Session`."""

    __slots__ = ()

    is_async = False

    @property
    def parent_results(self) -> Iterator[Any]:
        """The results of the tasks in `after`, in this order, read in pages by ``task.session``.

        Each is None if the task keeps no result, or has not completed.
        """
        return read_results(self.session, self._attempt.from_queue.schema, self._attempt.id)

    def count_parents(self) -> ParentCounts:
        """Return how many of the tasks that this one has waited for have completed, and how many have not."""
        counts: ParentCounts = count_parents(self.session, self._attempt.from_queue.schema, self._attempt.id)
        return counts


class AsyncRunningTask(_Running[AsyncTaskSession]):
    """The running task that a coroutine function takes. Its ``session`` is a SQLAlchemy `AsyncSession`."""

    __slots__ = ()

    is_async = True

    @property
    def parent_results(self) -> AsyncIterator[Any]:
        """The results of the tasks in `after`, for ``async for``; as `RunningTask.parent_results`."""
        return read_results_async(self.session, self._attempt.from_queue.schema, self._attempt.id)

    async def count_parents(self) -> ParentCounts:
        """Return how many of the tasks that this one has waited for have completed, and how many have not."""
        counts: ParentCounts = await count_parents(
            self.session, self._attempt.from_queue.schema, self._attempt.id
        )
        return counts


KNOWN = (
    "id",
    "type",
    "data",
    "queue",
    "priority",
    "created_at",
    "process_at",
    "tick_at",
    "attempt",
    "fail_count",
    "claim_token",
    "meta",
)
"""Attributes of a running task that are also columns of the task."""
