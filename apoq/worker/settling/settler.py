"""Writes the results of attempts, many at once."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any, Final

from psycopg import DatabaseError
from psycopg.errors import LockNotAvailable

from apoq.client.queue import Queue
from apoq.core import states
from apoq.core.outcomes import Unreachable
from apoq.core.results import NAME as RESULT
from apoq.errors import InvalidData
from apoq.events import COMPLETED, FAILED, RETRIED, Events, TaskCompleted, TaskFailed, TaskRetried
from apoq.postgres.connections import execute, is_caused_by_a_row
from apoq.postgres.messages import brief
from apoq.schema.objects import detached
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import ID
from apoq.schema.statements.lost import lost
from apoq.worker import logs, reports
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.claim_log import ClaimLog
from apoq.worker.database import WorkerDatabase
from apoq.worker.execution.attempt import AnyAttempt, Claimed, short_data
from apoq.worker.execution.completion import Completion
from apoq.worker.execution.runner import AttemptResult, TaskLost, ended, is_late, overdue
from apoq.worker.service import Service, left_until
from apoq.worker.settling.batches import (
    Closed,
    Unsettled,
    claim_of,
    id_and_token,
    in_parts,
    row_of,
    taken,
    token_arrays,
)
from apoq.worker.settling.counters import Counter
from apoq.worker.settling.result_writer import ResultWriter, Rows

LOCKED_POLL_SECONDS: Final = 0.25
"""Seconds after which tasks that another session had locked are tried again."""

MAX_LOCKED_POLL_SECONDS: Final = 4.0
"""The same for a whole table that stays locked: each try waits for it, and delays other schemas."""

OUTAGE_SECONDS: Final = 10.0
"""Seconds without a task that couldn't connect after which the next one is logged again."""


class Settler(Service):
    """Collects the results of attempts, and writes all that it has with each statement.

    While the database is away, it keeps them, and writes them when it is back. Tasks that another session has
    locked, such as one that cancels them and has not committed yet, are put off, and the others are written.
    So are the tasks of a schema whose whole table is locked, as by a migration, or which has been dropped.
    """

    def __init__(
        self,
        name: str,
        database: WorkerDatabase,
        events: Events,
        completion: Completion,
        counter: Counter,
        claim_log: ClaimLog,
        *,
        on_pending: Callable[[Queue, float], None],
        on_followed: Callable[[str | None, list[int], list[int]], None],
    ) -> None:
        """`on_pending` is called with the queue of a settled task, and the seconds until it is due again.

        `on_followed` is called with a schema and the ids of ended tasks for which others wait: those that
        have completed, and the others.
        """
        super().__init__(name, database.outage)
        self._database = database
        self._writer = ResultWriter(database, events, completion, on_followed)
        self._completion = completion
        self._counter = counter
        self._events = events
        self._claim_log = claim_log
        self._on_pending = on_pending
        self._on_followed = on_followed
        # Most attempts complete, and only their claimed rows are needed.
        self._completed: deque[Claimed] = deque()
        self._with_results: deque[Claimed] = deque()
        self._ended: deque[AttemptResult] = deque()
        self._kept: dict[int, AttemptResult] = {}
        """Completed attempts of which more than the claimed row is needed, by the `id()` of the row."""
        self._unsettled: deque[Unsettled] = deque()
        self._put_off: list[Unsettled] = []
        self._closed: dict[str | None, Closed] = {}
        self._breaker: CircuitBreaker[str | None] = CircuitBreaker(_describe, database.outage)
        self._unreachable_at = -math.inf
        self.ends_at = math.inf
        """Until when results are written after the last turn, by time.monotonic()."""
        self._lock = threading.Lock()

    def put(self, end: AttemptResult) -> None:
        """Settle this attempt soon."""
        if end.outcome is not None:
            self._ended.append(end)
        elif end.row is None:
            self._collect(end)
        elif end.seconds is None and not self._completion.has_listeners:
            # Its transaction has completed the task, and there are no listeners.
            if end.row.get("is_followed"):
                self._on_followed(end.attempt.from_queue.schema, [end.attempt.id], [])
            self._counter.count(None, [end.attempt.row])
            self._claim_log.settled([end.attempt.row])
            return
        else:
            self._ended.append(end)
        self.wake()

    def put_overdue(self, attempt: AnyAttempt, thread_id: int) -> None:
        """Settle an attempt that runs longer than its timeout, on this thread."""
        self.put(ended(attempt, overdue(attempt.timeout or 0.0, thread_id)))
        if not self.is_alive:
            self.turn()  # the worker hasn't started: it runs one task, in `work`

    def _collect(self, end: AttemptResult) -> None:
        """Complete a task soon; until then, keep more than its claimed row only if that is needed."""
        row = end.attempt.row
        if end.result is not None:
            self._kept[id(row)] = end
            self._with_results.append(row)
            return
        if end.seconds is not None or (end.attempt.was_fetched and self._completion.has_listeners):
            self._kept[id(row)] = end
        self._completed.append(row)

    def turn(self) -> float | None:
        """Write all results that have come until now."""
        with self._lock:
            for unsettled in [*self._taken_back(), *self._taken_ended()]:
                is_due = self._looks_at(unsettled) <= time.monotonic()
                (self._unsettled if is_due else self._put_off).append(unsettled)
            while self._unsettled:
                self._write_first()
        if self._completed or self._with_results or self._ended:
            return 0.0
        looks_at = min(map(self._looks_at, self._put_off), default=None)
        return None if looks_at is None else max(0.0, looks_at - time.monotonic())

    def flush(self, patience: float) -> None:
        """Write all results, and wait up to `patience` seconds for tasks that other sessions have locked."""
        deadline = time.monotonic() + patience
        while (pause := self.turn()) is not None and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(pause, max(left, LOCKED_POLL_SECONDS)))  # so that the last look comes at the end
        if count := sum(len(unsettled.ended) for unsettled in self._put_off):
            logs.results_locked(count)

    def after_last_turn(self) -> None:
        """Write all results that are left, until `ends_at`: it may have to connect, which takes long."""
        try:
            self.flush(left_until(self.ends_at))
        except Exception as error:  # noqa: BLE001 - other workers will run these tasks
            logs.settling_failed(error)

    def _taken_back(self) -> list[Unsettled]:
        taken, self._put_off = self._put_off, []
        return taken

    def _taken_ended(self) -> Iterator[Unsettled]:
        for schema, rows in in_parts(taken(self._completed), claim_of):
            yield self._unsettled_of(schema, rows)
        for schema, rows in in_parts(taken(self._with_results), claim_of):
            yield self._unsettled_of(schema, rows)._replace(has_results=True)
        for schema, ends in in_parts(taken(self._ended), lambda end: claim_of(end.attempt.row)):
            yield Unsettled(self._settle, schema, ends, schema in self._database.sharded)

    def _unsettled_of(self, schema: str | None, rows: list[Claimed]) -> Unsettled:
        is_linked = schema in self._writer.linking
        return Unsettled(self._complete, schema, rows, schema in self._database.sharded, is_linked=is_linked)

    def _looks_at(self, unsettled: Unsettled) -> float:
        closed = self._closed.get(unsettled.schema)
        return unsettled.looks_at if closed is None else closed.until

    def _write_first(self) -> None:
        """Write the first of the unsettled parts, or replace it by smaller ones."""
        schema = self._unsettled[0].schema
        if not self._breaker.call(schema, self._database.schemas, self._try_first, otherwise=False):
            unsettled = self._unsettled.popleft()
            self._put_off.append(unsettled._replace(looks_at=time.monotonic() + LOCKED_POLL_SECONDS))

    def _try_first(self) -> bool:
        unsettled = self._unsettled[0]
        try:
            locked = unsettled.write(unsettled)
        except LockNotAvailable:
            if unsettled.skips_locked:
                self._close(unsettled.schema)  # because it waits for no row, the whole table must be locked
            else:
                self._unsettled[0] = unsettled._replace(skips_locked=True)
        except DatabaseError as error:
            if not is_caused_by_a_row(error):
                # All of it is still there when the database, the table or the right is back. Perhaps it has
                # waited for a lock without a timeout, because Citus has sharded the schema meanwhile.
                self._unsettled[0] = unsettled._replace(skips_locked=True)
                raise
            self._unsettled.popleft()
            self._unsettled.extendleft(reversed(self._parted(unsettled, error)))
        else:
            self._unsettled.popleft()
            self._closed.pop(unsettled.schema, None)
            if locked:
                looks_at = time.monotonic() + LOCKED_POLL_SECONDS
                self._put_off.append(unsettled._replace(ended=locked, looks_at=looks_at))
        return True

    def _close(self, schema: str | None) -> None:
        """Put off all of a schema whose table is locked, the longer the longer it is."""
        before = self._closed.get(schema)
        if before is None:
            logs.table_locked("the results of tasks are written when it is free")
        pause = LOCKED_POLL_SECONDS if before is None else min(MAX_LOCKED_POLL_SECONDS, 2 * before.pause)
        self._closed[schema] = Closed(time.monotonic() + pause, pause)
        # The next try waits for the table at most, and for no row.
        self._put_off += [one._replace(skips_locked=True) for one in self._unsettled if one.schema == schema]
        self._unsettled = deque(one for one in self._unsettled if one.schema != schema)

    def _complete(self, unsettled: Unsettled) -> list[Claimed]:
        schema, tasks = unsettled.schema, sorted(unsettled.ended, key=itemgetter(ID))
        if unsettled.has_results:
            results = [self._kept[id(task)].result for task in tasks]
            rows = self._writer.complete_with_results(unsettled, tasks, results)
        else:
            rows = self._writer.complete(unsettled, tasks)
        missing: list[Claimed] = []
        written = tasks
        if len(rows) < len(tasks):
            missing = [task for task in tasks if task[ID] not in rows]
            written = [task for task in tasks if task[ID] in rows]
        if missing and not unsettled.is_linked:
            # Other tasks may wait for these.
            self._unsettled.append(unsettled._replace(ended=missing, is_linked=True))
            missing, tasks = [], written
        locked = self._left_out(unsettled, missing)
        settled = [task for task in tasks if id_and_token(task) not in locked] if locked else tasks
        self._counter.count(None, written)
        if missing or self._kept or self._completion.has_listeners:
            self._report_completed(schema, settled, rows)
        self._claim_log.settled(settled)
        return [task for task in missing if id_and_token(task) in locked]

    def _report_completed(self, schema: str | None, tasks: list[Claimed], rows: Rows) -> None:
        """Report the tasks that have `rows` as completed, and the others as lost."""
        for task in tasks:
            kept = self._kept.pop(id(task), None) if self._kept else None
            if task[ID] not in rows:
                self._events.report(reports.lost(task))
                continue
            if kept is not None and self._events.has_listeners(TaskCompleted):
                self._events.report(reports.completed(task, kept.seconds))
            if row := rows[task[ID]]:
                known = {"data": short_data(task) if kept is None else kept.attempt.known_data()}
                self._events.emit(COMPLETED, detached(schema, {**row, **known}))

    def _settle(self, unsettled: Unsettled) -> list[AttemptResult]:
        schema = unsettled.schema
        ends: list[AttemptResult] = sorted(unsettled.ended, key=lambda end: end.attempt.id)
        rows: Rows = {end.attempt.id: end.row for end in ends if end.row is not None}
        if followed := [id_ for id_, row in rows.items() if row is not None and row.get("is_followed")]:
            self._on_followed(schema, followed, [])
        unwritten = [end for end in ends if end.row is None and not isinstance(end.outcome, TaskLost)]
        if unwritten:
            rows |= self._writer.settle(unsettled.schema, unwritten, skips_locked=unsettled.skips_locked)
        missing = [end.attempt.row for end in unwritten if end.attempt.id not in rows]
        locked = self._left_out(unsettled, missing)
        settled = [end for end in ends if id_and_token(end.attempt.row) not in locked]
        for end in settled:
            if is_late(end) or isinstance(end.outcome, TaskLost) or end.attempt.id not in rows:
                self._events.report(reports.lost(end.attempt.row, is_late=is_late(end)))
            else:
                self._tell(end, rows[end.attempt.id])
                self._counter.count(end.settlement, [end.attempt.row])
        # One that took too long is settled as that, and not when it returns at last.
        self._claim_log.settled([end.attempt.row for end in settled if not is_late(end)])
        for end in settled:
            if end.settlement is not None and end.settlement.state == states.PENDING:
                self._on_pending(end.attempt.from_queue, end.settlement.delay or 0.0)
        return [end for end in ends if id_and_token(end.attempt.row) in locked]

    def _left_out(self, unsettled: Unsettled, missing: list[Claimed]) -> set[tuple[int, int]]:
        """Return the ids and tokens of those that the worker owns, and that were not written: locked ones."""
        if not missing or not unsettled.skips_locked:
            return set()
        claims = set(map(id_and_token, missing))
        parameters = {"ids": array_text(task[ID] for task in missing), **token_arrays(missing)}
        try:
            found = execute(self._database.engine, lost(unsettled.schema), parameters)
        except Exception:  # noqa: BLE001 - the others are written, and the next try will show the error
            return claims
        return claims - {(id_, token) for id_, token in found}

    def _parted(self, unsettled: Unsettled, error: DatabaseError) -> list[Unsettled]:
        """Part what the server refuses: a batch survives its worst member, written without its error."""
        if len(unsettled.ended) > 1:
            return [unsettled._replace(ended=[one]) for one in unsettled.ended]
        [one] = unsettled.ended
        if unsettled.has_results:
            end = self._kept.pop(id(one))
            refused = ended(end.attempt, InvalidData(RESULT, brief(error)), seconds=end.seconds)
            return [Unsettled(self._settle, unsettled.schema, [refused], unsettled.skips_locked)]
        logs.task_unwritable(row_of(one)[ID], error)
        if isinstance(one, AttemptResult) and one.settlement is not None:
            without = {"class": type(one.outcome).__name__, "message": "", "traceback": ""}
            if one.settlement.error != without:
                bare = one._replace(settlement=one.settlement._replace(error=without))
                return [unsettled._replace(ended=[bare])]
        logs.task_given_up(row_of(one)[ID])
        self._claim_log.given_up(row_of(one))
        return []

    def _tell(self, end: AttemptResult, row: Mapping[Any, Any] | None) -> None:
        if isinstance(end.outcome, Unreachable):
            self._log_unreachable(end.outcome)
        event = reports.ended(end)
        self._events.report(event)
        name = NAMED.get(type(event))
        if name is not None and row is not None and self._events.has_listeners(name):
            errors = () if end.outcome is None else (end.outcome,)
            known = {**row, "data": end.attempt.known_data()}
            self._events.emit(name, detached(end.attempt.from_queue.schema, known), *errors)

    def _log_unreachable(self, outcome: Unreachable) -> None:
        """Say it once for an outage, and not for each of its tasks."""
        last, self._unreachable_at = self._unreachable_at, time.monotonic()
        if self._unreachable_at > last + OUTAGE_SECONDS:
            logs.session_unreachable(outcome)


NAMED: Final = {TaskCompleted: COMPLETED, TaskFailed: FAILED, TaskRetried: RETRIED}
"""The events that are also emitted by name."""


def _describe(schema: str | None) -> str:
    return "settling tasks" if schema is None else f"settling tasks in the schema {schema!r}"
