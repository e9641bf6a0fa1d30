"""`drain`: runs due tasks in the transaction of a test, with the worker's code."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import Any, Final, Literal, NamedTuple, overload
from uuid import uuid4

from psycopg.pq import TransactionStatus
from sqlalchemy import CursorResult, Executable, NestedTransaction, func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from apoq.client.queue import Queue
from apoq.client.session_adapters import CLOCK
from apoq.core.outcomes import Outcome, WorkerDied
from apoq.core.processing import running_processor
from apoq.core.progress import Report
from apoq.core.states import FAILED, PENDING
from apoq.errors import InvalidProcessor, glimpse
from apoq.postgres.urls import check_untranslated
from apoq.schema.models import Task, tasks_table
from apoq.schema.objects import detached
from apoq.schema.statements.claim import CLAIM, TYPE, claim
from apoq.schema.statements.data import read_data
from apoq.schema.statements.progress import mark_parts, write_progress
from apoq.schema.statements.queues import at_most_text, queue_text, queues_text, retry_limits_text
from apoq.schema.statements.survey import survey, surveyed
from apoq.testing.clock import travel
from apoq.testing.edges import InLineEdges
from apoq.testing.inline import Crew, InLineDeadlines, crew_of, held
from apoq.testing.inside import (
    AsyncTestSession,
    Inner,
    TestSession,
    clear_errors,
    connection_of,
    in_session,
    inside,
)
from apoq.testing.ticks import tick_schedules, time_before_travel
from apoq.worker import Worker
from apoq.worker.claiming.claimable_queue import retry_limits
from apoq.worker.claiming.cursor import MAX_LEVELS, ClaimCursor
from apoq.worker.claiming.intake import may_begin
from apoq.worker.execution.attempt import (
    AnyAttempt,
    AsyncAttempt,
    Attempt,
    Claim,
    Claimed,
    StopSignal,
    parameters_of_data,
)
from apoq.worker.execution.runner import AttemptResult, TaskLost, ended, run, run_coroutine
from apoq.worker.execution.task_sessions import AsyncTaskSession, TaskSession
from apoq.worker.lease import Lease
from apoq.worker.settling.batches import settlement_arrays
from apoq.worker.settling.failure_tasks import add_failure_tasks, has_failure_task
from apoq.worker.settling.result_writer import write_settlements
from apoq.worker.unique_keys import pending_without_key, take_free_keys

FOR_EVER: Final = Lease(math.inf, math.inf)
"""Other workers can't take tasks of the caller's transaction."""

DEFAULT_LIMIT: Final = 1_000
"""Default of the maximum number of attempts."""

Errors = Literal["raise", "record"]


@overload
def drain(
    session: TestSession, *workers: Worker | Queue, errors: Errors = ..., limit: int = ...
) -> list[Task]: ...
@overload
def drain(
    session: AsyncTestSession, *workers: Worker | Queue, errors: Errors = ..., limit: int = ...
) -> Coroutine[Any, Any, list[Task]]: ...
def drain(
    session: TestSession | AsyncTestSession,
    *workers: Worker | Queue,
    errors: Errors = "raise",
    limit: int = DEFAULT_LIMIT,
) -> list[Task] | Coroutine[Any, Any, list[Task]]:
    """Run the due tasks in the transaction of `session`, and the tasks that become due by that.

    Tasks are claimed, run, retried and completed as by a worker, with the same code, but on this thread, and
    nothing is committed. ``task.session`` is in the test's transaction, too.

    In a block of `travel` or `freeze`, the schedules of these queues that are due by then add their tasks
    first. Those of ``@queue.task`` begin at the time from which `travel` has moved the clock.

    Args:
        session: The session or connection of the test.
        *workers: Workers, which need not be started, or queues with typed tasks.
        errors: With "raise", `drain` stores the failure of an attempt and then raises its exception, and due
            tasks without a processor are an error. With "record", it continues after failures, like a worker.
        limit: The maximum number of attempts, against tasks that add themselves again and again.

    Returns:
        The tasks that have run, as they are afterwards. With an asyncio session, an awaitable of them.

    Raises:
        InvalidSchedule: If the times of a due schedule can't be computed.
        InvalidProcessor: If due tasks have no processor, with ``errors="raise"``; if a queue has no typed
            tasks.
        RuntimeError: If tasks are still due after `limit` attempts, or if it would block a running event
            loop.
        TypeError: If there is no worker or queue, or another object instead of one.
        UnsupportedSession: If `session` can't be used.
        SchemaMismatch: If apoq's tables are missing or at another version.

    Note:
        A session is flushed before, and its objects are expired afterwards, as by a commit.
    """
    if not workers:
        raise TypeError("drain must be given a worker or a queue: drain(session, worker)")
    if errors not in {"raise", "record"}:
        raise ValueError(f'errors must be "raise" or "record", got {errors!r}')
    crews = [crew_of(worker) for worker in workers]
    if not isinstance(session, AsyncSession | async_scoped_session | AsyncConnection):
        _refuse_to_block(crews)
    return inside(session, lambda inner: _Drain(inner, crews, errors).run(limit))


def _refuse_to_block(crews: Sequence[Crew]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    if not in_greenlet() and any(crew.has_coroutines for crew in crews):
        raise RuntimeError(
            "drain must not run coroutines on the thread of a running event loop, which it would block: pass "
            "an AsyncSession and await the result, or `await asyncio.to_thread(drain, session, worker)`"
        )


class _Drain:
    def __init__(self, inner: Inner, crews: Sequence[Crew], errors: Errors) -> None:
        self._inner = inner
        self._crews = crews
        self._errors = errors
        self._worker_id = uuid4()
        self._deadlines = InLineDeadlines()
        self._signal = StopSignal()
        self._ended: dict[tuple[str | None, int], _Row] = {}
        self._runner: asyncio.Runner | None = None
        self._last: AnyAttempt | None = None
        self._reports: dict[AnyAttempt, Report] = {}
        self._edges = InLineEdges(self._execute)

    def run(self, limit: int) -> list[Task]:
        """Run up to `limit` attempts."""
        with ExitStack() as stack:
            self._connection = connection_of(self._inner)
            clock = self._connection.get_execution_options().get(CLOCK)
            if clock is None:
                # Otherwise now() would be the beginning of the test's transaction; a worker begins new ones.
                stack.enter_context(travel(self._inner, timedelta()))
            stack.callback(self._close)
            self._flush()
            if clock is not None:
                # Without a clock of its own, a test would depend on the time of the day.
                queues = dict.fromkeys(queue for crew in self._crews for queue in crew.queues)
                tick_schedules(self._execute, queues, time_before_travel(self._connection, clock))
            for _ in range(limit):
                if (claimed := self._claim() or self._claim_unblocked()) is None:
                    break
                self._attempt(*claimed)
            else:
                self._refuse_more(limit)
            if self._errors == "raise":
                self._refuse_leftovers()
        return list(map(self._task_of, self._ended.values()))

    def _execute(
        self, queue: Queue, statement: Executable, parameters: Mapping[str, Any]
    ) -> CursorResult[Any]:
        connection = connection_of(self._inner)
        check_untranslated(connection.get_execution_options(), queue.schema)
        with clear_errors(queue.schema):
            return connection.execute(statement, parameters)

    def _due(self) -> Iterator[tuple[Crew, Queue, ClaimCursor]]:
        """Yield the queues that have due tasks, with the position at which a claim begins."""
        for crew in self._crews:
            for queue in crew.queues:
                cursor = ClaimCursor()
                its = queue_text(queue.name, crew.processors(queue))
                parameters = {"queues": queues_text([its]), "at_most": MAX_LEVELS + 1}
                found = surveyed(self._execute(queue, survey(queue.schema), parameters))
                if cursor.surveyed(found.firsts.get(queue.name, ()), found.now) <= 0:
                    yield crew, queue, cursor

    def _claim(self) -> tuple[Crew, AnyAttempt] | None:
        lines = ((*due, is_keyed) for due in self._due() for is_keyed in (True, False))
        for crew, queue, cursor, is_keyed in lines:
            processors = crew.processors(queue)
            parameters = {
                "queues": queues_text(
                    [queue_text(queue.name, processors), cursor.text(is_keyed=is_keyed), at_most_text(1)]
                ),
                "retry_limits": retry_limits_text(retry_limits(queue, processors)),
                "at_most": 1,
                "by_worker": self._worker_id,
            }
            statement = claim(
                queue.schema,
                overflows=cursor.lower_than is not None,
                keyed=is_keyed,
                noted=False,
                with_limited=True,
            )
            sent_at = time.monotonic()
            for row in self._execute(queue, statement, parameters):
                batch = Claim(
                    queue,
                    processors,
                    sent_at,
                    sent_at,
                    FOR_EVER,
                    self._signal,
                    self._fetch,
                    on_progress=self._reports.__setitem__,
                )
                return crew, self._make((*tuple(row), batch))
        return None

    def _claim_unblocked(self) -> tuple[Crew, AnyAttempt] | None:
        """Claim a task that has waited for tasks which were added before it, if there is one."""
        queues = {queue.schema: queue for crew in self._crews for queue in crew.queues}
        is_unblocked = [self._edges.check(queue) for queue in queues.values()]
        return self._claim() if any(is_unblocked) else None

    def _fetch(self, attempt: AnyAttempt) -> Sequence[Sequence[Any]]:
        queue = attempt.from_queue
        return self._execute(queue, read_data(queue.schema), parameters_of_data(attempt)).all()

    def _make(self, row: Claimed) -> AnyAttempt:
        processor = row[CLAIM].processors[row[TYPE]]
        if processor.is_coroutine:
            return AsyncAttempt(row, processor, self._open_async)
        return Attempt(row, processor, self._open)

    def _open(self) -> TaskSession:
        return TaskSession(self._connection, join_transaction_mode="create_savepoint")

    def _open_async(self) -> AsyncTaskSession:
        session = AsyncTaskSession(join_transaction_mode="create_savepoint")
        # Not an AsyncConnection, because the test's connection may be a synchronous one.
        session.sync_session.bind = self._connection
        return session

    def _attempt(self, crew: Crew, attempt: AnyAttempt) -> None:
        self._last = attempt
        if may_begin(attempt):
            # A processor may commit another session on this connection, which must only end a savepoint.
            savepoint = self._inner.begin_nested()
            self._connection = connection_of(self._inner)
            within = self._connection.get_nested_transaction()
            with running_processor():
                end = self._run(crew, attempt)
            self._leave(savepoint, within)
        else:
            end = ended(attempt, WorkerDied(WorkerDied.__doc__))
        self._settle(crew, end)
        self._write_progress(attempt)
        if end.outcome is not None and self._is_raised(end.outcome, end):
            end.outcome.add_note(
                f"Raised by task {attempt.id} ({attempt.type}), attempt {attempt.number}, with the data "
                f"{glimpse(attempt.data)}; run by apoq.testing.drain"
            )
            raise end.outcome

    def _run(self, crew: Crew, attempt: AnyAttempt) -> AttemptResult:
        if isinstance(attempt, Attempt):
            return run(attempt, crew.completion, self._deadlines)
        coroutine = run_coroutine(attempt, crew.completion, self._deadlines)
        if in_greenlet():
            end: AttemptResult = await_only(coroutine)
            return end
        if self._runner is None:
            self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        return self._runner.run(coroutine)

    def _leave(
        self, savepoint: SessionTransaction | NestedTransaction, within: NestedTransaction | None
    ) -> None:
        """Keep what the attempt has committed, and undo what it hasn't."""
        if not savepoint.is_active:
            return  # the processor has ended the transaction of the test's own session
        connection = connection_of(self._inner)
        while (left_open := connection.get_nested_transaction()) not in {None, within}:
            assert left_open is not None
            left_open.rollback()
        driver: Any = connection.connection.driver_connection
        if driver.info.transaction_status == TransactionStatus.INERROR:
            savepoint.rollback()
        else:
            savepoint.commit()

    def _settle(self, crew: Crew, end: AttemptResult) -> None:
        attempt, queue = end.attempt, end.attempt.from_queue
        row = end.row
        if row is None and not isinstance(end.outcome, TaskLost):
            if end.outcome is None:
                row = self._complete(crew, attempt, end.result)
            else:
                parameters = settlement_arrays([end]) | held(attempt)
                settled = self._execute(queue, write_settlements(queue.schema, full=True), parameters)
                row = settled.mappings().first()
            if row is not None:
                take_free_keys(partial(self._execute, queue), queue.schema, pending_without_key([row]))
                if has_failure_task(end):
                    add_failure_tasks(partial(self._execute, queue), queue.schema, [end])
        is_kept = end.outcome is not None or crew.completion.keep
        if row is None:
            # The attempt no longer owns the task, because its processor has cancelled or deleted it.
            tasks = tasks_table(queue.schema)
            found = select(*tasks.c).where(tasks.c.id == attempt.id)
            row, is_kept = self._execute(queue, found, {}).mappings().first(), True
        if row is not None:
            self._edges.ended(queue, row)
            known = {"data": attempt.known_data(), **row}
            self._ended[queue.schema, attempt.id] = _Row(queue.schema, known, is_kept)

    def _write_progress(self, attempt: AnyAttempt) -> None:
        """Write the last progress that a task has reported, also if it has failed."""
        if (report := self._reports.pop(attempt, None)) is None:
            return
        queue, its = attempt.from_queue, held(attempt)
        self._execute(queue, mark_parts(queue.schema), its)
        values = {"dones": [report.done], "totals": [report.total], "notes": [report.note]}
        self._execute(queue, write_progress(queue.schema), its | values)

    def _complete(self, crew: Crew, attempt: AnyAttempt, result: str | None) -> Mapping[Any, Any] | None:
        for linked in (False, True):
            statement, parameters = crew.completion.completing(attempt, result, linked=linked)
            if row := self._execute(attempt.from_queue, statement, parameters).mappings().first():
                return row
        return None

    def _task_of(self, row: _Row) -> Task:
        # A task that isn't kept is in no session, because it isn't in the database.
        return in_session(self._inner, row.schema, row.row) if row.is_kept else detached(row.schema, row.row)

    def _is_raised(self, outcome: BaseException, end: AttemptResult) -> bool:
        if not isinstance(outcome, Exception | SystemExit):
            return True  # KeyboardInterrupt, and exceptions of pytest
        if self._errors == "record" or isinstance(outcome, TaskLost):
            return False
        has_failed = end.settlement is not None and end.settlement.state == FAILED
        return has_failed or not isinstance(outcome, Outcome)

    def _refuse_more(self, limit: int) -> None:
        for _, queue, _ in self._due():
            raise RuntimeError(
                f"drain stopped after {limit} attempts, but tasks are still due in {queue!r}; the last "
                f"attempt was {self._last!r}: if no task adds itself or snoozes for 0 s, pass a higher limit"
            )

    def _refuse_leftovers(self) -> None:
        """Raise if due tasks have no processor, as with a misspelled type."""
        known: dict[Queue, set[str]] = {}
        for crew in self._crews:
            for queue in crew.queues:
                known.setdefault(queue, set()).update(crew.processors(queue))
        for queue, types in known.items():
            tasks = tasks_table(queue.schema)
            left = (
                select(tasks.c.type)
                .where(
                    tasks.c.queue == queue.name,
                    tasks.c.state == PENDING,
                    tasks.c.process_at <= func.now(),
                    tasks.c.type.not_in(types),
                )
                .distinct()
                .order_by(tasks.c.type)
            )
            if names := self._execute(queue, left, {}).scalars().all():
                raise InvalidProcessor(
                    f"due tasks in {queue!r} must have a processor, and those of these types have none: "
                    f"{', '.join(names)}. There are processors for: {', '.join(sorted(types)) or 'none'}. "
                    'drain(…, errors="record") ignores the others, as a worker does'
                )

    def _flush(self) -> None:
        if isinstance(self._inner, Session):
            self._inner.flush()

    def _close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        if isinstance(self._inner, Session) and self._inner.is_active:
            # As a commit would do, because the processors have written to the same rows.
            self._inner.flush()
            if self._inner.expire_on_commit:
                self._inner.expire_all()


class _Row(NamedTuple):
    """A task that has run, as it is now."""

    schema: str | None
    row: Mapping[Any, Any]
    is_kept: bool
