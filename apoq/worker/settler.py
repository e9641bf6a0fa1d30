"""Writes what became of tasks, many at once."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum, auto
from functools import cache
from typing import Any

from psycopg import DatabaseError, DataError
from psycopg.rows import dict_row
from sqlalchemy import Engine, Executable

from apoq import events, states
from apoq.connections import execute, is_away
from apoq.events import Events
from apoq.model import detached, tasks_table
from apoq.outcomes import Settlement
from apoq.payload import encode
from apoq.statements.arrays import array_text
from apoq.statements.settle import settle
from apoq.worker.attempts import Ended, TaskLost
from apoq.worker.completion import Completion
from apoq.worker.tally import Counter

logger = logging.getLogger(__name__)


Rows = dict[int, Mapping[Any, Any] | None]
"""The tasks that were written, by their id; with their rows, where somebody wants to hear of them."""


class Settler:
    """Takes ended attempts as they come, and settles all that there are with each write.

    What can't be written because the database is away is kept, and written when it is back.
    """

    def __init__(
        self,
        engine: Engine,
        events_: Events,
        completion: Completion,
        counter: Counter,
        *,
        on_settled: Callable[[list[Ended]], None],
    ) -> None:
        self._engine = engine
        self._completion = completion
        self._counter = counter
        self._events = events_
        self._on_settled = on_settled
        self._ended: deque[Ended] = deque()
        self._unsettled: list[list[Ended]] = []
        self._lock = threading.Lock()

    def put(self, end: Ended) -> None:
        """Settle this soon; the caller wakes whoever takes the turns."""
        self._ended.append(end)

    def turn(self) -> float | None:
        """Settle all that have ended."""
        with self._lock:
            batch = []
            while self._ended:
                batch.append(self._ended.popleft())
            self._unsettled += _alike(batch)
            while self._unsettled:
                self._settle(self._unsettled[0])
                # Only now, so that it is still there when the database is not.
                del self._unsettled[0]
        return 0.0 if self._ended else None

    def settle(self, batch: list[Ended]) -> None:
        """Write these, then tell who listens."""
        for ends in _alike(batch):
            self._settle(ends)

    def _settle(self, ends: list[Ended]) -> None:
        match _kind(ends[0]):
            case _Kind.LOST:
                rows: Rows = {}
            case _Kind.COMMITTED:
                rows = {end.task.id: end.row for end in ends}
            case _:
                rows = self._write(ends)
        for end in ends:
            if end.task.id not in rows:
                logger.info(
                    "task %d (%s) was taken from this worker before it ended here; nothing was written to it",
                    end.task.id,
                    end.task.type,
                )
            elif end.outcome is not None or rows[end.task.id] is not None:
                self._tell(end, rows[end.task.id])
        self._counter.count(end for end in ends if end.task.id in rows)
        self._on_settled(ends)

    def _write(self, ends: list[Ended]) -> Rows:
        try:
            return self._execute(ends)
        except DatabaseError as error:
            if is_away(error):
                raise  # not the batch's trouble: tried again
            if len(ends) > 1:
                # A batch survives its worst member.
                return {id_: row for end in ends for id_, row in self._write([end]).items()}
            (end,) = ends
            logger.exception("task %d could not be settled; its error is left out", end.task.id)
            if end.settlement is not None:
                without = {"class": type(end.outcome).__name__, "message": "", "traceback": ""}
                end = end._replace(settlement=end.settlement._replace(error=without))
            try:
                return self._execute([end])
            except DataError:
                logger.exception(
                    "task %d can't be settled; it is run again when this worker stops", end.task.id
                )
                return {}

    def _execute(self, ends: list[Ended]) -> Rows:
        schema = ends[0].task.from_queue.schema
        parameters: dict[str, Any] = {
            "ids": array_text(end.task.id for end in ends),
            "tokens": array_text(end.task.token for end in ends),
        }
        if ends[0].outcome is None:
            is_heard = self._completion.is_heard
            statement = self._completion.statement(schema, full=is_heard)
        else:
            is_heard = self._events.heard(events.FAILED) or self._events.heard(events.RETRIED)
            statement = _settlement(schema, is_heard)
            parameters |= _arrays(ends)
        if is_heard:
            found = execute(self._engine, statement, parameters, row_factory=dict_row)
            return {row["id"]: row for row in found}
        return {id_: None for (id_,) in execute(self._engine, statement, parameters)}

    def _tell(self, end: Ended, row: Mapping[Any, Any] | None) -> None:
        if end.outcome is not None:
            _log(end)
        match end.settlement:
            case None:
                name = events.COMPLETED
            case Settlement(state=states.FAILED):
                name = events.FAILED
            case Settlement(state=states.PENDING, error=dict()):
                name = events.RETRIED
            case _:
                return
        if row is not None and self._events.heard(name):
            errors = () if end.outcome is None else (end.outcome,)
            self._events.emit(name, detached(end.task.from_queue.schema, row), *errors)


@cache
def _settlement(schema: str | None, full: bool) -> Executable:
    tasks = tasks_table(schema)
    return settle(schema).returning(*(tasks.c if full else [tasks.c.id]))


class _Kind(Enum):
    """How the end of an attempt is written."""

    LOST = auto()
    COMMITTED = auto()
    COMPLETED = auto()
    OTHER = auto()


def _kind(end: Ended) -> _Kind:
    if end.outcome is None:
        return _Kind.COMPLETED if end.row is None else _Kind.COMMITTED
    return _Kind.LOST if isinstance(end.outcome, TaskLost) else _Kind.OTHER


def _alike(batch: list[Ended]) -> list[list[Ended]]:
    """Part what ended into lists, each of which one statement can write."""
    alike: dict[tuple[str | None, _Kind], list[Ended]] = {}
    # By id, for whoever else locks several tasks does it in this order too.
    for end in sorted(batch, key=lambda end: end.task.id):
        alike.setdefault((end.task.from_queue.schema, _kind(end)), []).append(end)
    return list(alike.values())


def _arrays(ends: list[Ended]) -> dict[str, list[Any]]:
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


def _log(end: Ended) -> None:
    task, settlement = end.task, end.settlement
    match settlement:
        case Settlement(state=states.FAILED):
            logger.error(
                "task %d (%s) failed for good, with failure %d",
                task.id,
                task.type,
                settlement.fail_count,
                exc_info=end.outcome,
            )
        case Settlement(state=states.PENDING, error=dict(error)):
            logger.warning(
                "task %d (%s) failed %d times, and is tried again in %g s: %s: %s",
                task.id,
                task.type,
                settlement.fail_count,
                settlement.delay,
                error["class"],
                error["message"],
            )
