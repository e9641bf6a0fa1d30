"""Tells what runs here that it runs in vain."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from sqlalchemy import Engine

from apoq.connections import execute
from apoq.statements.arrays import array_text
from apoq.statements.lost import lost
from apoq.worker.running import BATCH, ID, TOKEN, Batch, Claimed

logger = logging.getLogger(__name__)


class Recaller:
    """Looks which of the worker's tasks are its own no more: cancelled, deleted, or taken by others.

    Nothing depends on it, for whatever they come to is refused by their tokens. Tasks that have been here for
    longer than `interval` are looked up that often; those of which a hint says that they were cancelled, at
    once.
    """

    def __init__(
        self,
        engine: Engine,
        held: Callable[[], list[Claimed]],
        *,
        interval: float,
        on_lost: Callable[[list[Claimed]], None],
    ) -> None:
        self._engine = engine
        self._held = held
        self._interval = interval
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._hinted: set[int] = set()
        self._told: set[tuple[int, int]] = set()

    def hint(self, ids: Iterable[int]) -> bool:
        """Remember that these may have been cancelled; tell whether any is here."""
        mine = {row[ID] for row in self._held()}.intersection(ids)
        with self._lock:
            self._hinted |= mine
        return bool(mine)

    def turn(self) -> float | None:
        """Look them up, and tell of those that are lost."""
        with self._lock:
            hinted, self._hinted = self._hinted, set()
        claimed_before = time.monotonic() - self._interval
        held = {(row[ID], row[TOKEN]): row for row in self._held()}
        self._told &= held.keys()
        parts: dict[str | None, dict[tuple[int, int], Claimed]] = {}
        for key, row in held.items():
            batch: Batch = row[BATCH]
            if key not in self._told and (batch.claimed_at < claimed_before or row[ID] in hinted):
                parts.setdefault(batch.from_queue.schema, {})[key] = row
        try:
            for schema, rows in parts.items():
                self._look(schema, rows)
        except BaseException:
            self.hint(hinted)
            raise
        return self._interval

    def _look(self, schema: str | None, rows: dict[tuple[int, int], Claimed]) -> None:
        parameters = {
            "ids": array_text([id_ for id_, _ in rows]),
            "tokens": array_text([token for _, token in rows]),
        }
        gone = execute(self._engine, lost(schema), parameters).fetchall()
        if gone:
            logger.info(
                "these tasks are this worker's no more, and are told to stop: %s",
                ", ".join(str(id_) for id_, _ in gone),
            )
            self._told.update(gone)
            self._on_lost([rows[key] for key in gone])
