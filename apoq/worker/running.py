"""A task while it runs: what its processor gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Generic, TypeVar

from apoq.queue import Queue
from apoq.registry import Processor
from apoq.retry import RetryPolicy
from apoq.worker.task_sessions import AsyncTaskSession, TaskSession

S = TypeVar("S")


class _Running(Generic[S]):
    """A claimed task, as its processor sees it."""

    __slots__ = (
        "attempt",
        "claimed_at",
        "created_at",
        "data",
        "fail_count",
        "from_queue",
        "id",
        "open_session",
        "opened",
        "policy",
        "priority",
        "process_at",
        "processor",
        "token",
        "type",
    )

    def __init__(
        self,
        row: Iterable[Any],
        queue: Queue,
        processor: Processor,
        claimed_at: float,
        open_session: Callable[[], S],
    ) -> None:
        self.id: int
        self.type: str
        self.data: Any
        self.priority: int
        self.created_at: datetime
        self.process_at: datetime
        self.attempt: int
        self.fail_count: int
        self.token: int
        (
            self.id,
            self.type,
            self.data,
            self.priority,
            self.created_at,
            self.process_at,
            self.attempt,
            self.fail_count,
            self.token,
            retry_limit,
            retry_delay,
        ) = row  # as `claim` returns it
        # What follows is the worker's.
        self.from_queue = queue
        self.processor = processor
        self.policy: RetryPolicy = processor.policy_for(retry_limit, retry_delay)
        self.claimed_at = claimed_at  # by time.monotonic()
        self.open_session = open_session
        self.opened: S | None = None

    @property
    def queue(self) -> str:
        """The name of the queue that it came from."""
        return self.from_queue.name

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

    def __repr__(self) -> str:
        return f"<{type(self).__name__} id={self.id} type={self.type!r} attempt={self.attempt}>"


class RunningTask(_Running[TaskSession]):
    """What a plain processor gets: the task, and ``task.session``, a SQLAlchemy `Session`."""

    __slots__ = ()


class AsyncRunningTask(_Running[AsyncTaskSession]):
    """What a coroutine processor gets: the task, and ``task.session``, an `AsyncSession`."""

    __slots__ = ()


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
    "token",
)
"""What a running task knows of its row."""
