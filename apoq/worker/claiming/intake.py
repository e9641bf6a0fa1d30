"""Takes over the tasks of claims: the claim log remembers them, and the executor runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import repeat
from operator import concat, itemgetter
from typing import Any, cast

from sqlalchemy import Engine

from apoq.client.queue import Queue
from apoq.core.outcomes import WorkerDied
from apoq.core.progress import Report
from apoq.events import Events, TaskClaimed, TaskCompleted, TaskStarted
from apoq.postgres.connections import execute
from apoq.schema.statements.claim import CLAIM, FAIL_COUNT
from apoq.schema.statements.data import read_data
from apoq.worker import reports
from apoq.worker.claim_log import ClaimLog
from apoq.worker.claiming.schema_claims import Taken
from apoq.worker.execution.attempt import AnyAttempt, Claim, Claimed, StopSignal, parameters_of_data
from apoq.worker.execution.executor import Executor, released
from apoq.worker.execution.runner import AttemptResult, ended


class Intake:
    """Holds claimed tasks from the end of their claim until they begin, or are released."""

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        claim_log: ClaimLog,
        events: Events,
        *,
        signals: Mapping[str | None, StopSignal],
        on_ended: Callable[[AttemptResult], None],
        on_progress: Callable[[AnyAttempt, Report], None],
    ) -> None:
        """`on_ended` is called with the results of tasks that end without having run.

        `on_progress` is called with the progress that running tasks report.
        """
        self._engine = engine
        self._executor = executor
        self._claim_log = claim_log
        self._events = events
        self._signals = signals
        self._on_ended = on_ended
        self._on_progress = on_progress
        self._paused_at: dict[Queue, float] = {}
        """When a queue was found to be paused, by time.monotonic()."""

    def hold(self, taken: Taken) -> list[Claimed]:
        """Remember the tasks that were taken from a queue, and return them."""
        queue, rows = taken.queue, taken.rows
        if not rows:
            return []
        batch = Claim(
            queue.queue,
            queue.processors,
            time.monotonic(),
            taken.sent_at,
            queue.lease,
            self._signals[queue.queue.schema],
            self._fetch,
            taken.number,
            self._report_start if self._is_followed() else None,
            is_ahead=taken.is_ahead,
            on_progress=self._on_progress,
            is_placed=taken.placed is not None,
        )
        tasks = cast("list[Claimed]", list(map(concat, rows, repeat((batch,)))))
        self._claim_log.hold(tasks)
        if self._events.has_listeners(TaskClaimed):
            for task in tasks:
                self._events.report(reports.claimed(task))
        return tasks

    def begin(self, tasks: list[Claimed], *, placed: bool = False, more_follow: bool = False) -> None:
        """Run these tasks as soon as slots are free; see `Executor.put`."""
        self._executor.put(self._startable(tasks), placed=placed, more_follow=more_follow)

    def begin_one(self, tasks: list[Claimed]) -> AnyAttempt | None:
        """Return the attempt of a single task that the caller is to run; None if it has no attempts left."""
        for task in self._startable(tasks):
            return self._executor.attempt_of(task)
        return None

    def queue_is_paused(self, queue: Queue) -> None:
        """Release the tasks of a queue that was paused, as far as they have not begun; from any thread.

        Also those that a claim is just taking, which began before the pause.
        """
        self._paused_at[queue] = time.monotonic()
        self.release_line([queue])

    def release_line(self, queues: Container[Queue] | None = None) -> None:
        """Release the tasks that have not begun: all of them, or those of these queues. From any thread."""
        for attempt in self._executor.take_back(queues):
            self._on_ended(released(attempt))

    def release_paused(self, tasks: list[Claimed]) -> None:
        """Release the tasks of claims that were sent before their queue was found to be paused."""
        if self._paused_at:
            claims = {id(row[CLAIM]): row[CLAIM] for row in tasks}.values()
            sent_at = {claim.from_queue: claim.sent_at for claim in claims}
            if paused := {queue for queue, at in sent_at.items() if at <= self._paused_at.get(queue, 0.0)}:
                self.release_line(paused)

    def release_placed(self) -> set[Queue]:
        """Release the tasks with places that have not begun; return their queues."""
        attempts = self._executor.take_back_placed()
        for attempt in attempts:
            self._on_ended(released(attempt))
        return {attempt.from_queue for attempt in attempts}

    def _startable(self, tasks: list[Claimed]) -> list[Claimed]:
        """Return the tasks that have attempts left; end the others."""
        if not any(map(itemgetter(FAIL_COUNT), tasks)):
            return tasks
        startable = []
        for row in tasks:
            attempt = self._executor.attempt_of(row)
            if may_begin(attempt):
                startable.append(row)
            else:
                self._on_ended(ended(attempt, WorkerDied(WorkerDied.__doc__)))
        return startable

    def _is_followed(self) -> bool:
        """Return whether a listener wants to know of each task that begins, or how long it takes."""
        return self._events.has_listeners(TaskStarted) or self._events.has_listeners(TaskCompleted)

    def _report_start(self, row: Claimed) -> None:
        if self._events.has_listeners(TaskStarted):
            self._events.report(reports.started(row))

    def _fetch(self, attempt: AnyAttempt) -> Sequence[Sequence[Any]]:
        """Read the data of a task that is too large for the result of its claim."""
        statement = read_data(attempt.from_queue.schema)
        return execute(self._engine, statement, parameters_of_data(attempt)).fetchall()


def may_begin(attempt: AnyAttempt) -> bool:
    """Return whether an attempt may begin: a rescued task may have used up its attempts."""
    return not attempt.fail_count or attempt.fail_count <= attempt.policy.limit
