"""Shows that the worker lives, and rescues the tasks of those that don't."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from typing import Final
from uuid import UUID

from sqlalchemy import Engine

from apoq.connections import execute
from apoq.outcomes import WorkerDied, report
from apoq.payload import encode
from apoq.queue import Queue
from apoq.statements.heartbeat import forget, leave
from apoq.statements.recover import beat_and_rescue

logger = logging.getLogger(__name__)

BEATS: Final = 5
"""Heartbeats to a lease: a worker counts as dead when it has missed this many."""

RESCUED_AT_ONCE: Final = 1_000

FORGOTTEN_AFTER: Final = timedelta(hours=1)
"""For so long a dead worker's row is kept, for people to read."""


class Heartbeat:
    """Renews the worker's lease several times before it ends; all times are the database's.

    A worker whose lease has ended counts as dead, and any other makes its running tasks pending again.
    """

    def __init__(
        self,
        engine: Engine,
        queues: tuple[Queue, ...],
        *,
        concurrency: int,
        lease: timedelta,
        on_rescued: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._schemas = sorted({queue.schema for queue in queues}, key=lambda schema: schema or "")
        self._lease = lease
        self._on_rescued = on_rescued
        self._row = {
            "worker_host": platform.node(),
            "worker_version": version("apoq"),
            "worker_queues": [queue.name for queue in queues],
            "worker_concurrency": concurrency,
        }
        self._reason = encode(report(WorkerDied(WorkerDied.__doc__)))
        self._forgets_at = 0.0
        self.worker_id = UUID(int=0)

    def turn(self) -> float | None:
        """Beat and sweep; answer when to do so again."""
        self.beat()
        if self._forgets_at < time.monotonic():
            self.forget()
        return self._lease.total_seconds() / BEATS

    def beat(self) -> None:
        """Renew the lease, and rescue the tasks of dead workers."""
        parameters = {
            **self._row,
            "worker_id": self.worker_id,
            "by_worker": self.worker_id,
            "worker_pid": os.getpid(),
            "lease": self._lease,
            "at_most": RESCUED_AT_ONCE,
            "reason": self._reason,
        }
        for schema in self._schemas:
            while rescued := execute(self._engine, beat_and_rescue(schema), parameters).rowcount:
                logger.warning("%d tasks of workers that died are pending again", rescued)
                self._on_rescued()

    def forget(self) -> None:
        """Remove the rows of workers that died long ago."""
        self._forgets_at = time.monotonic() + FORGOTTEN_AFTER.total_seconds() / 10
        for schema in self._schemas:
            execute(self._engine, forget(schema), {"keep": FORGOTTEN_AFTER})

    def leave(self) -> None:
        """Take the worker's row away: it holds nothing any more."""
        for schema in self._schemas:
            execute(self._engine, leave(schema), {"worker_id": self.worker_id})
