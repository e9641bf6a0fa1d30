"""What of a worker is another where all happens on one thread, and in one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from apoq.client.queue import Queue
from apoq.core.registry import Processor, Registry
from apoq.errors import InvalidProcessor
from apoq.events import Events
from apoq.schema.statements.arrays import array_text
from apoq.worker import Worker
from apoq.worker.execution.attempt import AnyAttempt
from apoq.worker.execution.completion import Completion
from apoq.worker.execution.deadlines import Deadlines
from apoq.worker.execution.runner import overdue
from apoq.worker.failures import Outage
from apoq.worker.threads import MissingThreads


@dataclass(frozen=True)
class Crew:
    """Whose tasks run, and how they are completed."""

    queues: tuple[Queue, ...]
    processors: Callable[[Queue], Mapping[str, Processor]]
    """Answers those of a queue, by their types."""
    completion: Completion

    @property
    def has_coroutines(self) -> bool:
        """Tell whether any of its processors needs an event loop."""
        found = [processor for queue in self.queues for processor in self.processors(queue).values()]
        return any(processor.is_coroutine for processor in found)


def crew_of(worker: Worker | Queue) -> Crew:
    """Answer what a worker works, which needn't have started, or one would that is given just a queue."""
    if isinstance(worker, Queue):
        if not worker.tasks:
            raise InvalidProcessor(
                f"{worker!r} has no typed tasks: give the queue that has them by @queue.task, or a worker"
            )
        registry = Registry()
        worker.register_in(registry)
        return Crew((worker,), registry.of, InLineCompletion(keep=True))
    if not isinstance(worker, Worker):
        raise TypeError(f"drain takes workers or queues after its session, not {worker!r}")
    keep = worker.options.keeps_completed
    return Crew(worker.queues, worker.processors, InLineCompletion(keep=keep))


class InLineCompletion(Completion):
    """Completes a task in a transaction that goes on."""

    def __init__(self, *, keep: bool) -> None:
        super().__init__(Events(), keep=keep)

    def write(self, connection: Connection, attempt: AnyAttempt) -> Mapping[Any, Any] | None:
        """Complete a task; answer its row, or None where it was lost."""
        statement = self.statement(attempt.from_queue.schema, full=True, alike=True)
        return connection.execute(statement, held(attempt)).mappings().first()


def held(attempt: AnyAttempt) -> dict[str, Any]:
    """Answer the parameters by which a statement finds a task that is still held."""
    return {
        "ids": array_text([attempt.id]),
        "tokens": array_text([attempt.claim_token]),
        "held_under": attempt.claim_token,
    }


class InLineDeadlines(Deadlines):
    """Lets an attempt that took too long fail when it has ended: there is nobody to do it before."""

    def __init__(self) -> None:
        outage = Outage()
        super().__init__(lambda _attempt, _thread_id: None, outage, MissingThreads(outage))
        self._ends_at: dict[AnyAttempt, tuple[float, float]] = {}

    def watch(self, attempt: AnyAttempt, limit: float, grace: float = 0.0) -> None:
        """Let an attempt stop in `limit` seconds."""
        attempt.ends_at = time.monotonic() + limit
        self._ends_at[attempt] = attempt.ends_at + grace, limit

    def forget(self, attempt: AnyAttempt) -> bool:
        """Raise TimeoutError where its time was over before it ended."""
        ends_at, limit = self._ends_at.pop(attempt)
        if time.monotonic() >= ends_at:
            raise overdue(limit)
        return True
