"""Runs what is due, in the transaction of a test: as a worker would, and by the same code."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
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
from apoq.core.states import FAILED, PENDING
from apoq.errors import InvalidProcessor, glimpse
from apoq.postgres.urls import check_untranslated
from apoq.schema.models import Task, detached, tasks_table
from apoq.schema.statements.claim import CLAIM, TYPE, claim
from apoq.schema.statements.data import read_data
from apoq.schema.statements.survey import survey
from apoq.testing.clock import travel
from apoq.testing.inline import Crew, InLineDeadlines, crew_of, held
from apoq.testing.inside import (
    AsyncTestSession,
    Inner,
    TestSession,
    answered,
    clear_errors,
    connection_of,
    inside,
)
from apoq.worker import Worker
from apoq.worker.claiming.claimer import may_begin
from apoq.worker.claiming.cursor import MAX_LEVELS, ClaimCursor
from apoq.worker.claiming.queue_claims import workable
from apoq.worker.execution.attempt import (
    AnyAttempt,
    AsyncAttempt,
    Attempt,
    Claim,
    Claimed,
    StopSignal,
    longest_data,
)
from apoq.worker.execution.runner import AttemptResult, TaskLost, ended, run, run_coroutine
from apoq.worker.execution.task_sessions import AsyncTaskSession, TaskSession
from apoq.worker.lease import Lease
from apoq.worker.settling.settler import settlement_arrays, write_settlements

FOR_EVER: Final = Lease(math.inf, math.inf)
"""Tasks that run in the caller's transaction can't be taken by another worker."""

DEFAULT_LIMIT: Final = 1_000
"""Attempts of one `drain`, unless its caller says otherwise."""

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
    """Run what is due, and what becomes due by it, in the transaction of `session`; answer the tasks.

    In line, with the processors of a worker, which isn't started, or of a queue's typed tasks: claimed in
    the same order, tried again, completed together with what was written to ``task.session``. That session
    is in the test's transaction, too, and nothing is committed. What `session` holds is written before and
    read anew after, as by a commit of yours.

    An attempt that fails is written to its task, and then its error is raised; so is an `InvalidProcessor`
    where tasks are due that have no processor. With ``errors="record"``, all goes on as in a worker. After
    `limit` attempts, it is a RuntimeError that there are still more.

    Answers each task that has run, as it stands in the end. With an asyncio session, await the answer.
    """
    if not workers:
        raise TypeError("drain runs the processors of a worker or a queue: drain(session, worker)")
    if errors not in {"raise", "record"}:
        raise ValueError(f'errors is "raise" or "record", not {errors!r}')
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
            "drain would block the event loop that runs here, and has coroutines: give an AsyncSession "
            "and await the answer, or `await asyncio.to_thread(drain, session, worker)`"
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

    def run(self, limit: int) -> list[Task]:
        """Run up to `limit` attempts."""
        with ExitStack() as stack:
            self._connection = connection_of(self._inner)
            if not self._connection.get_execution_options().get(CLOCK):
                # Else they would read when the transaction began: a worker has transactions of its own.
                stack.enter_context(travel(self._inner, timedelta()))
            stack.callback(self._close)
            self._flush()
            for _ in range(limit):
                if (claimed := self._claim()) is None:
                    break
                self._attempt(*claimed)
            else:
                self._refuse_more(limit)
            if self._errors == "raise":
                self._refuse_leftovers()
        return list(map(self._answer, self._ended.values()))

    def _execute(
        self, queue: Queue, statement: Executable, parameters: Mapping[str, Any]
    ) -> CursorResult[Any]:
        connection = connection_of(self._inner)
        check_untranslated(connection.get_execution_options(), queue.schema)
        with clear_errors(queue.schema):
            return connection.execute(statement, parameters)

    def _due(self) -> Iterator[tuple[Crew, Queue, ClaimCursor]]:
        """Find out where something is due, and where a claim of it begins."""
        for crew in self._crews:
            for queue in crew.queues:
                position = ClaimCursor()
                looked_for = {
                    "from_queue": queue.name,
                    "of_types": list(crew.processors(queue)),
                    "at_most": MAX_LEVELS + 1,
                }
                if position.surveyed(self._execute(queue, survey(queue.schema), looked_for)) <= 0:
                    yield crew, queue, position

    def _claim(self) -> tuple[Crew, AnyAttempt] | None:
        for crew, queue, position in self._due():
            parameters = {
                "from_queue": queue.name,
                **workable(crew.processors(queue)),
                "at_most": 1,
                "by_worker": self._worker_id,
                **position.parameters(),
            }
            statement = claim(queue.schema, overflows=position.lower_than is not None)
            for row in self._execute(queue, statement, parameters):
                batch = Claim(
                    queue, crew.processors(queue), time.monotonic(), FOR_EVER, self._signal, self._fetch
                )
                return crew, self._make((*tuple(row), batch))
        return None

    def _fetch(self, attempt: AnyAttempt) -> Sequence[Sequence[Any]]:
        queue = attempt.from_queue
        parameters = {
            "task_id": attempt.id,
            "held_under": attempt.claim_token,
            "longest_data": longest_data(queue),
        }
        return self._execute(queue, read_data(queue.schema), parameters).all()

    def _make(self, row: Claimed) -> AnyAttempt:
        processor = row[CLAIM].processors[row[TYPE]]
        if processor.is_coroutine:
            return AsyncAttempt(row, processor, self._open_async)
        return Attempt(row, processor, self._open)

    def _open(self) -> TaskSession:
        return TaskSession(self._connection, join_transaction_mode="create_savepoint")

    def _open_async(self) -> AsyncTaskSession:
        session = AsyncTaskSession(join_transaction_mode="create_savepoint")
        # Not an AsyncConnection, for the test's may be none: then the coroutine just isn't held up by it.
        session.sync_session.bind = self._connection
        return session

    def _attempt(self, crew: Crew, attempt: AnyAttempt) -> None:
        self._last = attempt
        if may_begin(attempt):
            # Where a processor has a session of its own on this connection, it commits into this.
            savepoint = self._inner.begin_nested()
            self._connection = connection_of(self._inner)
            within = self._connection.get_nested_transaction()
            end = self._run(crew, attempt)
            self._leave(savepoint, within)
        else:
            end = ended(attempt, WorkerDied(WorkerDied.__doc__))
        self._settle(crew, end)
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
                statement = crew.completion.statement(queue.schema, full=True, alike=True)
                parameters: dict[str, Any] = {}
            else:
                statement = write_settlements(queue.schema, full=True)
                parameters = settlement_arrays([end])
            row = self._execute(queue, statement, parameters | held(attempt)).mappings().first()
        is_kept = end.outcome is not None or crew.completion.keep
        if row is None:
            # Taken from this attempt by the processor itself, which has cancelled or deleted it.
            tasks = tasks_table(queue.schema)
            found = select(*tasks.c).where(tasks.c.id == attempt.id)
            row, is_kept = self._execute(queue, found, {}).mappings().first(), True
        if row is not None:
            known = {"data": attempt.known_data(), **row}
            self._ended[queue.schema, attempt.id] = _Row(queue.schema, known, is_kept)

    def _answer(self, row: _Row) -> Task:
        # One that isn't kept is in no session, for it isn't in the database.
        return answered(self._inner, row.schema, row.row) if row.is_kept else detached(row.schema, row.row)

    def _is_raised(self, outcome: BaseException, end: AttemptResult) -> bool:
        if not isinstance(outcome, Exception | SystemExit):
            return True  # meant for the program, or for pytest
        if self._errors == "record" or isinstance(outcome, TaskLost):
            return False
        has_failed = end.settlement is not None and end.settlement.state == FAILED
        return has_failed or not isinstance(outcome, Outcome)

    def _refuse_more(self, limit: int) -> None:
        for _, queue, _ in self._due():
            raise RuntimeError(
                f"drain has made {limit} attempts, and more is due in {queue!r}: does a task add itself, or "
                f"snooze for no time? If not, give a higher limit. The last was {self._last!r}"
            )

    def _refuse_leftovers(self) -> None:
        """Refuse to leave what a mistyped type, or a processor that wasn't configured, would leave."""
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
                    f"due in {queue!r} are tasks of types that have no processor here: {', '.join(names)}. "
                    f"It has processors of: {', '.join(sorted(types)) or 'none'}. A worker leaves the others "
                    'to other workers, and so does drain(…, errors="record")'
                )

    def _flush(self) -> None:
        if isinstance(self._inner, Session):
            self._inner.flush()

    def _close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        if isinstance(self._inner, Session) and self._inner.is_active:
            # What a commit would do: the processors have written, too.
            self._inner.flush()
            if self._inner.expire_on_commit:
                self._inner.expire_all()


class _Row(NamedTuple):
    """A task that has run, as it stands."""

    schema: str | None
    row: Mapping[Any, Any]
    is_kept: bool
