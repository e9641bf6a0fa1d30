"""Tells what runs here that it runs in vain."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, TypeVar

from sqlalchemy import Engine

from apoq.postgres.connections import execute
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.begin import begin
from apoq.schema.statements.claim import CLAIM, CLAIM_TOKEN, ID
from apoq.schema.statements.lost import lost
from apoq.worker.claim_log import ClaimLog
from apoq.worker.execution.attempt import AnyAttempt, Claimed
from apoq.worker.failures import Outage
from apoq.worker.isolation import Isolation

T = TypeVar("T")

logger = logging.getLogger(__name__)


MIN_INTERVAL_SECONDS: Final = 0.05
"""Seconds from one look to the next, at least: any role may notify, and as often as it likes."""


class LostTaskMonitor:
    """Looks which of the worker's tasks are its own no more: cancelled, deleted, or taken by others.

    Nothing depends on it, for whatever they come to is refused by their tokens. Tasks that have been here for
    longer than `interval` are looked up that often; those of which a notification says that they were
    cancelled, at once. They are told each time, because the first time may have been while they were about to
    begin.
    """

    def __init__(
        self,
        engine: Engine,
        schemas: tuple[str | None, ...],
        outage: Outage,
        claim_log: ClaimLog,
        *,
        running: Callable[[], list[AnyAttempt]],
        interval: float,
        on_lost: Callable[[list[Claimed]], None],
    ) -> None:
        self._engine = engine
        self._isolation: Isolation[str | None] = Isolation(_describe, outage)
        self._schemas = schemas
        self._claim_log = claim_log
        self._running = running
        self._interval = interval
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._wanted: set[int] = set()
        self._rested_at = 0.0
        self._logged: set[tuple[str | None, int, int]] = set()
        self._begun: set[tuple[str | None, int, int]] = set()

    def look_for(self, ids: Iterable[int]) -> bool:
        """Remember that these may have been cancelled; tell whether any is here."""
        mine = {row[ID] for row in self._claim_log.held()}.intersection(ids)
        with self._lock:
            self._wanted |= mine
        return bool(mine)

    def turn(self) -> float | None:
        """Look them up, and tell of those that are lost."""
        if (pause := self._rested_at - time.monotonic()) > 0:
            return pause
        with self._lock:
            wanted, self._wanted = self._wanted, set()
        claimed_before = time.monotonic() - self._interval
        held = self._claim_log.held()
        self._logged &= {_key(row) for row in held}
        parts: dict[str | None, dict[tuple[int, int], Claimed]] = {}
        for row in held:
            batch = row[CLAIM]
            if batch.claimed_at < claimed_before or row[ID] in wanted:
                parts.setdefault(batch.from_queue.schema, {})[row[ID], row[CLAIM_TOKEN]] = row
        try:
            self._for_each(parts, self._look)
            self._note_begun()
        except BaseException:
            self.look_for(wanted)
            raise
        if parts:
            self._rested_at = time.monotonic() + MIN_INTERVAL_SECONDS
        return self._interval

    def _note_begun(self) -> None:
        """Let the database know of the tasks that have begun although they were claimed ahead.

        Or else, should this worker die now, their attempts would not count.
        """
        begun = {_key(attempt.row) for attempt in self._running() if attempt.row[CLAIM].is_ahead}
        self._begun &= begun
        parts: dict[str | None, list[tuple[int, int]]] = {}
        for schema, id_, token in begun - self._begun:
            parts.setdefault(schema, []).append((id_, token))
        self._for_each(parts, self._note)

    def _for_each(self, parts: dict[str | None, T], function: Callable[[str | None, T], None]) -> None:
        for schema, part in parts.items():
            self._isolation.call(schema, self._schemas, partial(function, schema, part), None)

    def _note(self, schema: str | None, tasks: list[tuple[int, int]]) -> None:
        ids, tokens = zip(*tasks, strict=True)
        execute(self._engine, begin(schema), {"ids": array_text(ids), "tokens": array_text(tokens)})
        self._begun.update((schema, *task) for task in tasks)

    def _look(self, schema: str | None, rows: dict[tuple[int, int], Claimed]) -> None:
        parameters = {
            "ids": array_text([id_ for id_, _ in rows]),
            "tokens": array_text([token for _, token in rows]),
        }
        gone = [rows[key] for key in execute(self._engine, lost(schema), parameters)]
        if new := [row for row in gone if _key(row) not in self._logged]:
            logger.info(
                "these tasks are this worker's no more, and are told to stop: %s",
                ", ".join(str(id_) for id_ in sorted(row[ID] for row in new)),
            )
            self._logged.update(map(_key, new))
        self._on_lost(gone)


def _describe(schema: str | None) -> str:
    return "the look at running tasks" + ("" if schema is None else f" in the schema {schema!r}")


def _key(row: Claimed) -> tuple[str | None, int, int]:
    batch = row[CLAIM]
    return batch.from_queue.schema, row[ID], row[CLAIM_TOKEN]
