"""Deletes what ended long ago."""

from __future__ import annotations

import random
import time
from datetime import timedelta
from typing import Final

from sqlalchemy import Engine

from apoq.connections import execute
from apoq.queue import Queue
from apoq.statements.prune import prune_completed, prune_failed

BATCH: Final = 1_000
"""Rows that one statement deletes at most."""

SHARE: Final = 0.05
"""The share of its time that the pruner spends in the database while there is something to delete."""

TIMEOUT: Final = 60.0
"""Seconds that one such statement may take."""

INTERVAL: Final = 60.0
"""Seconds after which it looks again."""


class Pruner:
    """Deletes the ended tasks of a worker's queues when their time is over, in small bites."""

    def __init__(
        self,
        engine: Engine,
        queues: tuple[Queue, ...],
        *,
        keep_completed: timedelta | None,
        keep_failed: timedelta | None,
    ) -> None:
        self._engine = engine
        self._queues = queues
        self._rules = [
            (prune, keep)
            for prune, keep in ((prune_completed, keep_completed), (prune_failed, keep_failed))
            if keep is not None
        ]

    def turn(self) -> float | None:
        """Delete a batch of each kind; answer when to go on."""
        began = time.monotonic()
        if self.prune():
            return (time.monotonic() - began) * (1 / SHARE - 1)
        return INTERVAL * random.uniform(0.9, 1.1)  # noqa: S311 - workers needn't prune together

    def prune(self) -> bool:
        """Delete a batch of each kind; tell whether there may be more."""
        more = False
        for queue in self._queues:
            for prune, keep in self._rules:
                parameters = {"from_queue": queue.name, "keep": keep, "at_most": BATCH}
                more |= (
                    execute(self._engine, prune(queue.schema), parameters, timeout=TIMEOUT).rowcount == BATCH
                )
        return more
