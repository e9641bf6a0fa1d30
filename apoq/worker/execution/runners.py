"""Runs attempts, in spans if the worker traces."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, Final, NamedTuple

from apoq.core.states import CANCELLED
from apoq.schema.statements.claim import CREATED_AT
from apoq.tracing import Tracer
from apoq.worker.execution.attempt import AnyAttempt, AsyncAttempt, Attempt, IsolatedAttempt
from apoq.worker.execution.completion import Completion
from apoq.worker.execution.deadlines import Deadlines
from apoq.worker.execution.isolated_context import IsolatedContext
from apoq.worker.execution.runner import (
    AttemptResult,
    TaskLost,
    run,
    run_coroutine,
    run_coroutine_here,
    run_here,
)
from apoq.worker.execution.running_task import read_meta

CHILD_WITHIN_SECONDS: Final = 60.0
"""Seconds after it was added in which a first attempt may be in the same trace, so that traces end soon."""


RunOnThread = Callable[[Any, Completion, Deadlines], AttemptResult]
"""Runs an attempt of one class on the caller's thread."""


class Runner(NamedTuple):
    """The functions that run attempts."""

    on_threads: Mapping[type, RunOnThread]
    """Those that run an attempt on the caller's thread, by its class."""
    run_coroutine: Callable[[AsyncAttempt, Completion, Deadlines], Coroutine[Any, Any, AttemptResult]]


class _TracingRunner:
    """Runs each attempt in a span, which ends after the commit of ``task.session``.

    The span is made current and ended in the attempt's own context, so the next task in the slot has no trace
    of it.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def on_thread(self, run: RunOnThread) -> RunOnThread:
        """Return a function that runs an attempt on this thread as `run` does, in a span."""

        def run_in_span(attempt: Attempt, completion: Completion, deadlines: Deadlines) -> AttemptResult:
            return copy_context().run(self._run, run, attempt, completion, deadlines)

        return run_in_span

    async def run_coroutine(
        self, attempt: AsyncAttempt, completion: Completion, deadlines: Deadlines
    ) -> AttemptResult:
        """Run a coroutine processor on this event loop, in a span."""
        return await IsolatedContext(self._run_coroutine(attempt, completion, deadlines))

    def _run(
        self, run: RunOnThread, attempt: Attempt, completion: Completion, deadlines: Deadlines
    ) -> AttemptResult:
        with self._span(attempt) as span:
            end = run(attempt, completion, deadlines)
            self._describe(span, end)
        return end

    async def _run_coroutine(
        self, attempt: AsyncAttempt, completion: Completion, deadlines: Deadlines
    ) -> AttemptResult:
        with self._span(attempt) as span:
            end = await run_coroutine_here(attempt, completion, deadlines)
            self._describe(span, end)
        return end

    @contextmanager
    def _span(self, attempt: AnyAttempt) -> Iterator[Any]:
        is_soon = time.time() - attempt.row[CREATED_AT] < CHILD_WITHIN_SECONDS
        with self._tracer.span(
            f"process {attempt.type}",
            {
                "messaging.system": "apoq",
                "messaging.destination.name": attempt.from_queue.name,
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.message.id": str(attempt.id),
                "apoq.task.type": attempt.type,
                "apoq.task.attempt": attempt.number,
            },
            read_meta(attempt),
            may_be_child=attempt.number == 1 and is_soon,
        ) as span:
            yield span

    def _describe(self, span: Any, end: AttemptResult) -> None:
        """Note the error of a failed attempt; other outcomes, such as `Snooze`, are not errors."""
        settlement, outcome = end.settlement, end.outcome
        if outcome is None or settlement is None or isinstance(outcome, TaskLost):
            return
        if settlement.error is not None and settlement.state != CANCELLED:
            self._tracer.fail(span, outcome)


def make_runner(tracer: Tracer | None, run_isolated: RunOnThread) -> Runner:
    """Return the functions that run attempts, in spans if there is a tracer."""
    if tracer is None:
        return Runner({Attempt: run, IsolatedAttempt: run_isolated}, run_coroutine)
    tracing = _TracingRunner(tracer)
    on_threads: dict[type, RunOnThread] = {
        Attempt: tracing.on_thread(run_here),
        IsolatedAttempt: tracing.on_thread(run_isolated),
    }
    return Runner(on_threads, tracing.run_coroutine)
