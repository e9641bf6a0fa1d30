"""A task while it runs: what its processor gets."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Any, Generic, TypeVar

from sqlalchemy import Row, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from apoq.errors import SessionMisused
from apoq.queue import Queue
from apoq.registry import Processor
from apoq.retry import RetryPolicy

S = TypeVar("S")


class TaskSession(Session):
    """The session of a task: the worker commits it, together with the task's completion."""

    def __exit__(self, *_: object) -> None:
        """Leave it open: the worker commits what `with task.session:` has written, and closes it."""


class AsyncTaskSession(AsyncSession):
    """The asyncio session of a task: the worker commits it, together with the task's completion."""

    sync_session_class = TaskSession

    async def __aexit__(
        self, type_: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave it open, as `TaskSession` does."""


@event.listens_for(TaskSession, "before_commit")
def _guard(session: Session) -> None:
    # A commit of the processor's own would part its writes from the completion.
    if not session.in_nested_transaction() and not session.info.get("apoq.completing"):
        raise SessionMisused(
            "task.session is committed by the worker, together with the task's completion: leave out the "
            "commit, or open a session of your own for what is to be committed before"
        )


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
        row: Row[Any],
        queue: Queue,
        processor: Processor,
        claimed_at: float,
        open_session: Callable[[], S],
    ) -> None:
        self.id: int = row.id
        self.type: str = row.type
        self.data: Any = row.data
        self.fail_count: int = row.fail_count
        self.attempt: int = row.attempt
        self.priority: int = row.priority
        self.created_at: datetime = row.created_at
        self.process_at: datetime = row.process_at
        # What follows is the worker's.
        self.token: int = row.token
        self.from_queue = queue
        self.processor = processor
        self.policy: RetryPolicy = processor.policy_for(row.retry_limit, row.retry_delay)
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


class RunningTask(_Running[Session]):
    """What a plain processor gets: the task, and ``task.session``, a `sqlalchemy.orm.Session`."""

    __slots__ = ()


class AsyncRunningTask(_Running[AsyncSession]):
    """What a coroutine processor gets: the task, and ``task.session``, an `AsyncSession`."""

    __slots__ = ()


AnyRunningTask = RunningTask | AsyncRunningTask
