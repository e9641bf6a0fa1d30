"""Writes what became of tasks, many at once."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Engine, Executable, Result, RowMapping
from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, OperationalError

from apoq import events, states
from apoq.events import Events
from apoq.model import detached, tasks_table
from apoq.outcomes import Settlement
from apoq.payload import encode
from apoq.statements.settle import settle
from apoq.worker.attempts import Ended, TaskLost
from apoq.worker.completion import Completion

logger = logging.getLogger(__name__)


Rows = dict[int, RowMapping | None]
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
        *,
        on_settled: Callable[[Ended], None],
    ) -> None:
        self._engine = engine
        self._completion = completion
        self._events = events_
        self._on_settled = on_settled
        self._ended: deque[Ended] = deque()
        self._lock = threading.Lock()

    def put(self, end: Ended) -> None:
        """Settle this soon; the caller wakes whoever takes the turns."""
        self._ended.append(end)

    def turn(self) -> float | None:
        """Settle all that have ended."""
        with self._lock:
            batch = list(self._ended)
            if batch:
                self.settle(batch)
                # Only now, so that they are still there when the database is not.
                for _ in batch:
                    self._ended.popleft()
        return 0.0 if self._ended else None

    def settle(self, batch: list[Ended]) -> None:
        """Write these, then tell who listens."""
        committed = [end for end in batch if end.row is not None]
        lost = [end for end in batch if isinstance(end.outcome, TaskLost)]
        to_write = [end for end in batch if end.row is None and not isinstance(end.outcome, TaskLost)]
        rows = self._write(to_write) if to_write else {}
        for end in to_write:
            if end.task.id in rows:
                self._tell(end, rows[end.task.id])
            else:
                lost.append(end)
        for end in committed:
            self._tell(end, end.row)
        for end in lost:
            logger.info(
                "task %d (%s) was taken from this worker before it ended here; nothing was written to it",
                end.task.id,
                end.task.type,
            )
        for end in batch:
            self._on_settled(end)

    def _write(self, batch: list[Ended]) -> Rows:
        try:
            with self._engine.begin() as connection:
                return self._settle_all(connection, batch)
        except (OperationalError, InterfaceError):
            raise  # the database's trouble, not the batch's: tried again
        except DBAPIError as error:
            if error.connection_invalidated:
                raise
            if len(batch) > 1:
                # A batch survives its worst member.
                return {id_: row for end in batch for id_, row in self._write([end]).items()}
            (end,) = batch
            logger.exception("task %d could not be settled; its error is left out", end.task.id)
            without = {"class": type(end.outcome).__name__, "message": "", "traceback": ""}
            end = end._replace(settlement=end.settlement._replace(error=without))
            try:
                with self._engine.begin() as connection:
                    return self._settle_all(connection, [end])
            except DataError:
                logger.exception(
                    "task %d can't be settled; it is run again when this worker stops", end.task.id
                )
                return {}

    def _settle_all(self, connection: Connection, batch: Iterable[Ended]) -> Rows:
        rows: Rows = {}
        for schema, group in groupby(sorted(batch, key=_schema), _schema):
            # By id, for whoever else locks several tasks does it in this order too.
            ends = sorted(group, key=lambda end: end.task.id)
            done = [end for end in ends if end.settlement.state == states.COMPLETED]
            others = [end for end in ends if end.settlement.state != states.COMPLETED]
            if done:
                statement = self._completion.statement(schema or None)
                rows |= _rows(connection.execute(statement, _keys(done)))
            if others:
                statement = _settlement(schema or None, self._is_heard())
                rows |= _rows(connection.execute(statement, _keys(others) | _arrays(others)))
        return rows

    def _is_heard(self) -> bool:
        return self._events.heard(events.FAILED) or self._events.heard(events.RETRIED)

    def _tell(self, end: Ended, row: RowMapping | None) -> None:
        if end.outcome is not None:
            _log(end)
        match end.settlement:
            case Settlement(state=states.COMPLETED):
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


def _schema(end: Ended) -> str:
    return end.task.from_queue.schema or ""


def _rows(result: Result[Any]) -> Rows:
    if len(result.keys()) == 1:
        return dict.fromkeys(result.scalars())
    return {row["id"]: row for row in result.mappings()}


def _keys(ends: list[Ended]) -> dict[str, list[Any]]:
    return {"ids": [end.task.id for end in ends], "tokens": [end.task.token for end in ends]}


def _arrays(ends: list[Ended]) -> dict[str, list[Any]]:
    settlements = [end.settlement for end in ends]
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
