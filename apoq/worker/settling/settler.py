"""Writes the results of attempts, many at once."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from operator import itemgetter
from typing import Any, Final, NamedTuple, TypeVar

from psycopg import DatabaseError
from psycopg.errors import LockNotAvailable
from sqlalchemy import Engine, Executable

from apoq.client.queue import Queue
from apoq.core import states
from apoq.core.outcomes import Unreachable
from apoq.core.payload import encode
from apoq.events import COMPLETED, FAILED, RETRIED, Events, TaskCompleted, TaskFailed, TaskRetried
from apoq.postgres.connections import execute, is_caused_by_a_row
from apoq.schema.models import detached, tasks_table
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import CLAIM, CLAIM_TOKEN, ID
from apoq.schema.statements.locked import locked
from apoq.schema.statements.settle import settle
from apoq.worker import logs, reports
from apoq.worker.claim_log import ClaimLog
from apoq.worker.execution.attempt import AnyAttempt, Claimed, short_data
from apoq.worker.execution.completion import Completion, reported_columns
from apoq.worker.execution.runner import AttemptResult, TaskLost, ended, is_late, overdue
from apoq.worker.failures import Outage
from apoq.worker.isolation import Isolation
from apoq.worker.service import Service, left_until
from apoq.worker.settling.counters import Counter

T = TypeVar("T")

LOCKED_POLL_SECONDS: Final = 0.25
"""Seconds after which tasks that another session had locked are tried again."""

MAX_LOCKED_POLL_SECONDS: Final = 4.0
"""The same for a whole table that stays locked: each try waits for it, and delays other schemas."""

OUTAGE_SECONDS: Final = 10.0
"""Seconds without a task that couldn't connect after which the next one is logged again."""

Rows = dict[int, Mapping[Any, Any] | None]
"""The tasks that were written, by id; with their rows, if there are listeners."""


class Unsettled(NamedTuple):
    """Results in one schema, and the method that writes them."""

    write: Callable[[str | None, list[Any]], None]
    schema: str | None
    ended: list[Any]
    """Claimed rows of completed tasks, or else `AttemptResult`."""
    is_locked: bool = False
    """Whether another session had locked some of the tasks the last time."""
    looks_at: float = 0.0
    """When they are tried again after that."""


class Closed(NamedTuple):
    """A schema whose whole table is locked."""

    until: float
    pause: float


class Settler(Service):
    """Collects the results of attempts, and writes all that it has with each statement.

    While the database is away, it keeps them, and writes them when it is back. Tasks that another session has
    locked, such as one that cancels them and has not committed yet, are put off, and the others are written.
    So are the tasks of a schema whose whole table is locked, as by a migration, or which has been dropped.
    """

    def __init__(
        self,
        engine: Engine,
        events: Events,
        completion: Completion,
        counter: Counter,
        schemas: Sequence[str | None],
        outage: Outage,
        claim_log: ClaimLog,
        *,
        on_pending: Callable[[Queue, float], None],
    ) -> None:
        """`on_pending` is called with the queue of a settled task, and the seconds until it is due again."""
        super().__init__("apoq-settler", outage)
        self._engine = engine
        self._completion = completion
        self._counter = counter
        self._events = events
        self._claim_log = claim_log
        self._on_pending = on_pending
        # Most attempts complete, and only their claimed rows are needed.
        self._completed: deque[Claimed] = deque()
        self._ended: deque[AttemptResult] = deque()
        self._kept: dict[int, AttemptResult] = {}
        """Completed attempts of which listeners get more than the claimed row, by the `id()` of the row."""
        self._unsettled: deque[Unsettled] = deque()
        self._put_off: list[Unsettled] = []
        self._closed: dict[str | None, Closed] = {}
        self._schemas = schemas
        self._isolation: Isolation[str | None] = Isolation(_describe, outage)
        self._unreachable_at = -math.inf
        self.ends_at = math.inf
        """Until when results are written after the last turn, by time.monotonic()."""
        self._lock = threading.Lock()

    def put(self, end: AttemptResult) -> None:
        """Settle this attempt soon."""
        is_written = end.outcome is None and end.row is not None
        if is_written and end.seconds is None and not self._completion.has_listeners:
            # Its transaction has completed the task, and there are no listeners.
            self._counter.count(None)
            self._claim_log.settled([end.attempt.row])
            return
        self._collect(end)
        self.wake()

    def put_overdue(self, attempt: AnyAttempt, thread_id: int) -> None:
        """Settle an attempt that runs longer than its timeout, on this thread."""
        self.put(ended(attempt, overdue(attempt.timeout or 0.0, thread_id)))
        if not self.is_alive:
            self.turn()  # the worker hasn't started: it runs one task, in `work`

    def _collect(self, end: AttemptResult) -> None:
        if end.outcome is None and end.row is None:
            row = end.attempt.row
            if end.seconds is not None or (self._completion.has_listeners and not end.attempt.has_data):
                self._kept[id(row)] = end
            self._completed.append(row)
        else:
            self._ended.append(end)

    def turn(self) -> float | None:
        """Write all results that have come until now."""
        with self._lock:
            for unsettled in [*self._taken_back(), *self._taken_ended()]:
                is_due = self._looks_at(unsettled) <= time.monotonic()
                (self._unsettled if is_due else self._put_off).append(unsettled)
            while self._unsettled:
                self._write_first()
        if self._completed or self._ended:
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
        for schema, rows in _by_schema(_taken(self._completed), _schema_of).items():
            yield Unsettled(self._complete, schema, rows)
        for schema, ends in _by_schema(_taken(self._ended), lambda end: _schema_of(end.attempt.row)).items():
            yield Unsettled(self._settle, schema, ends)

    def _looks_at(self, unsettled: Unsettled) -> float:
        closed = self._closed.get(unsettled.schema)
        return unsettled.looks_at if closed is None else closed.until

    def _write_first(self) -> None:
        """Write the first of the unsettled parts, or replace it by smaller ones."""
        schema = self._unsettled[0].schema
        if not self._isolation.call(schema, self._schemas, self._try_first, otherwise=False):
            unsettled = self._unsettled.popleft()
            self._put_off.append(unsettled._replace(looks_at=time.monotonic() + LOCKED_POLL_SECONDS))

    def _try_first(self) -> bool:
        unsettled = self._unsettled[0]
        try:
            if unsettled.is_locked:
                unsettled = self._unsettled[0] = self._put_off_locked(unsettled)
            if unsettled.ended:
                unsettled.write(unsettled.schema, unsettled.ended)
        except LockNotAvailable:
            if unsettled.is_locked:
                self._close(unsettled.schema)  # for nothing of it could even be looked at
            else:
                self._unsettled[0] = unsettled._replace(is_locked=True)
        except DatabaseError as error:
            if not is_caused_by_a_row(error):
                raise  # all of it is still there when the database, the table or the right is back
            self._unsettled.popleft()
            self._unsettled.extendleft(reversed(self._parted(unsettled, error)))
        else:
            self._unsettled.popleft()
        return True

    def _put_off_locked(self, unsettled: Unsettled) -> Unsettled:
        """Put off those that are locked, and return the others."""
        ids = array_text([_row(one)[ID] for one in unsettled.ended])
        found = {id_ for (id_,) in execute(self._engine, locked(unsettled.schema), {"ids": ids})}
        self._closed.pop(unsettled.schema, None)
        if found:
            waiting = [one for one in unsettled.ended if _row(one)[ID] in found]
            looks_at = time.monotonic() + LOCKED_POLL_SECONDS
            self._put_off.append(unsettled._replace(ended=waiting, looks_at=looks_at))
        free = [one for one in unsettled.ended if _row(one)[ID] not in found]
        return unsettled._replace(ended=free, is_locked=False)

    def _close(self, schema: str | None) -> None:
        """Put off all of a schema whose table is locked, the longer the longer it is."""
        before = self._closed.get(schema)
        if before is None:
            logs.table_locked("the results of tasks are written when it is free")
        pause = LOCKED_POLL_SECONDS if before is None else min(MAX_LOCKED_POLL_SECONDS, 2 * before.pause)
        self._closed[schema] = Closed(time.monotonic() + pause, pause)
        # The next one asks first whether the table is free: that waits for the table at most, and for no row.
        self._put_off += [one._replace(is_locked=True) for one in self._unsettled if one.schema == schema]
        self._unsettled = deque(one for one in self._unsettled if one.schema != schema)

    def _complete(self, schema: str | None, tasks: list[Claimed]) -> None:
        tasks.sort(key=itemgetter(ID))
        rows = self._execute_completion(schema, tasks)
        self._counter.count(None, len(rows))
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
        self._claim_log.settled(tasks)

    def _settle(self, schema: str | None, ends: list[AttemptResult]) -> None:
        ends.sort(key=lambda end: end.attempt.id)
        rows: Rows = {end.attempt.id: end.row for end in ends if end.row is not None}
        unwritten = [end for end in ends if end.row is None and not isinstance(end.outcome, TaskLost)]
        if unwritten:
            rows |= self._execute_settlement(schema, unwritten)
        for end in ends:
            if is_late(end) or isinstance(end.outcome, TaskLost) or end.attempt.id not in rows:
                self._events.report(reports.lost(end.attempt.row, is_late=is_late(end)))
            else:
                self._tell(end, rows[end.attempt.id])
                self._counter.count(end.settlement)
        # One that took too long is settled as that, and not when it returns at last.
        self._claim_log.settled([end.attempt.row for end in ends if not is_late(end)])
        for end in ends:
            if end.settlement is not None and end.settlement.state == states.PENDING:
                self._on_pending(end.attempt.from_queue, end.settlement.delay or 0.0)

    def _parted(self, unsettled: Unsettled, error: DatabaseError) -> list[Unsettled]:
        """Part what the server refuses: a batch survives its worst member, written without its error."""
        if len(unsettled.ended) > 1:
            return [unsettled._replace(ended=[one]) for one in unsettled.ended]
        [one] = unsettled.ended
        logs.task_unwritable(_row(one)[ID], error)
        if isinstance(one, AttemptResult) and one.settlement is not None:
            without = {"class": type(one.outcome).__name__, "message": "", "traceback": ""}
            if one.settlement.error != without:
                bare = replace(one, settlement=one.settlement._replace(error=without))
                return [unsettled._replace(ended=[bare])]
        logs.task_given_up(_row(one)[ID])
        self._claim_log.given_up(_row(one))
        return []

    def _execute_completion(self, schema: str | None, tasks: list[Claimed]) -> Rows:
        is_full, token = self._completion.has_listeners, tasks[0][CLAIM_TOKEN]
        alike = len({task[CLAIM_TOKEN] for task in tasks}) == 1
        statement = self._completion.statement(schema, full=is_full, alike=alike)
        held = {"held_under": token} if alike else _tokens(tasks)
        return self._execute(statement, tasks, held, is_full=is_full)

    def _execute_settlement(self, schema: str | None, ends: list[AttemptResult]) -> Rows:
        is_full = self._events.has_listeners(FAILED) or self._events.has_listeners(RETRIED)
        tasks = [end.attempt.row for end in ends]
        return self._execute(
            write_settlements(schema, full=is_full),
            tasks,
            _tokens(tasks) | settlement_arrays(ends),
            is_full=is_full,
        )

    def _execute(
        self, statement: Executable, tasks: list[Claimed], arrays: dict[str, Any], *, is_full: bool
    ) -> Rows:
        ids = [task[ID] for task in tasks]
        parameters = {"ids": array_text(ids), **arrays}
        if is_full:
            found = execute(self._engine, statement, parameters)
            return {row["id"]: row for row in found.mappings()}
        written = execute(self._engine, statement, parameters)
        if written.rowcount == len(ids):
            return dict.fromkeys(ids)  # none was lost, as nearly always: their ids needn't be read
        return dict.fromkeys(id_ for (id_,) in written.fetchall())

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


@cache
def write_settlements(schema: str | None, *, full: bool) -> Executable:
    """Write the settlements of `settlement_arrays` to the tasks of `ids`; return their ids, or more."""
    tasks = tasks_table(schema)
    return settle(schema).returning(*(reported_columns(schema) if full else [tasks.c.id]))


NAMED: Final = {TaskCompleted: COMPLETED, TaskFailed: FAILED, TaskRetried: RETRIED}
"""The events that are also emitted by name."""


def _describe(schema: str | None) -> str:
    return "settling tasks" if schema is None else f"settling tasks in the schema {schema!r}"


def _schema_of(row: Claimed) -> str | None:
    return row[CLAIM].from_queue.schema


def _row(one: Claimed | AttemptResult) -> Claimed:
    return one.attempt.row if isinstance(one, AttemptResult) else one


def _tokens(tasks: list[Claimed]) -> dict[str, Any]:
    return {"tokens": array_text([task[CLAIM_TOKEN] for task in tasks])}


def _taken(ended: deque[T]) -> list[T]:
    """Empty this, while others add to it."""
    taken = []
    with suppress(IndexError):
        while True:
            taken.append(ended.popleft())
    return taken


def _by_schema(batch: list[T], schema_of: Callable[[T], str | None]) -> dict[str | None, list[T]]:
    """Part what ended into lists that one statement can write."""
    parts: dict[str | None, list[T]] = {}
    for one in batch:
        parts.setdefault(schema_of(one), []).append(one)
    return parts


def settlement_arrays(ends: list[AttemptResult]) -> dict[str, list[Any]]:
    """Return the settlements as parameters of `settle`."""
    settlements = [end.settlement for end in ends if end.settlement is not None]
    return {
        "states": [settlement.state for settlement in settlements],
        "attempts": [settlement.attempt for settlement in settlements],
        "fail_counts": [settlement.fail_count for settlement in settlements],
        "delays": [settlement.delay for settlement in settlements],
        "errors": [
            None if settlement.error is None else encode(settlement.error) for settlement in settlements
        ],
    }
