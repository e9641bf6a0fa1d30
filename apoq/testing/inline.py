"""Replacements for parts of a worker that runs on one thread and in one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Executable

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
    """The queues whose tasks run, their processors, and how tasks are completed."""

    queues: tuple[Queue, ...]
    processors: Callable[[Queue], Mapping[str, Processor]]
    """Returns the processors of a queue, by type."""
    completion: InLineCompletion

    @property
    def has_coroutines(self) -> bool:
        """Whether one of the processors is a coroutine function."""
        found = [processor for queue in self.queues for processor in self.processors(queue).values()]
        return any(processor.is_coroutine for processor in found)


def crew_of(worker: Worker | Queue) -> Crew:
    """Return the queues and processors of a worker, or of a queue's typed tasks."""
    if isinstance(worker, Queue):
        if not worker.tasks:
            raise InvalidProcessor(
                f"the queue must have typed tasks, got {worker!r}, which has none: pass another queue or "
                "a worker"
            )
        registry = Registry()
        worker.register_in(registry)
        return Crew((worker,), registry.of, InLineCompletion(keep=True))
    if not isinstance(worker, Worker):
        raise TypeError(f"drain must be given workers or queues after the session, got {worker!r}")
    keep = worker.options.keeps_completed
    return Crew(worker.queues, worker.processors, InLineCompletion(keep=keep))


class InLineCompletion(Completion):
    """Completes a task without ending the transaction."""

    def __init__(self, *, keep: bool) -> None:
        super().__init__(Events(), keep=keep)

    def write(
        self, connection: Connection, attempt: AnyAttempt, result: str | None
    ) -> Mapping[Any, Any] | None:
        """Complete a task; return its row, or None if the attempt no longer owns it."""
        for linked in (False, True):
            statement, parameters = self.completing(attempt, result, linked=linked)
            if row := connection.execute(statement, parameters).mappings().first():
                return row
        return None

    def completing(
        self, attempt: AnyAttempt, result: str | None, *, linked: bool
    ) -> tuple[Executable, dict[str, Any]]:
        """Return the statement that completes a task, with its result if there is one, and its parameters."""
        schema = attempt.from_queue.schema
        if result is None:
            return self.statement(schema, full=True, alike=True, linked=linked), held(attempt)
        parameters = {**held(attempt), "results": [result]}
        return self.statement_with_results(schema, full=True, linked=linked), parameters


def held(attempt: AnyAttempt) -> dict[str, Any]:
    """Return the parameters by which a statement finds a task that the attempt still owns."""
    return {
        "ids": array_text([attempt.id]),
        "tokens": array_text([attempt.claim_token]),
        "held_under": attempt.claim_token,
    }


class InLineDeadlines(Deadlines):
    """Fails an attempt that took too long when it has ended, because no other thread can do it earlier."""

    def __init__(self) -> None:
        outage = Outage()
        super().__init__(lambda _attempt, _thread_id: None, outage, MissingThreads(outage))
        self._ends_at: dict[AnyAttempt, tuple[float, float]] = {}

    def watch(self, attempt: AnyAttempt, limit: float, grace: float = 0.0) -> None:
        """Set the end of an attempt to `limit` seconds from now."""
        attempt.ends_at = time.monotonic() + limit
        self._ends_at[attempt] = attempt.ends_at + grace, limit

    def forget(self, attempt: AnyAttempt) -> bool:
        """Raise TimeoutError if the attempt took longer than its limit."""
        ends_at, limit = self._ends_at.pop(attempt)
        if time.monotonic() >= ends_at:
            raise overdue(limit)
        return True
