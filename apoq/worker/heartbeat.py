"""Shows that the worker lives, and rescues the tasks of those that don't."""

from __future__ import annotations

import logging
import math
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any, Final
from uuid import UUID

from psycopg import DatabaseError
from psycopg.errors import LockNotAvailable
from sqlalchemy import Engine, Executable

from apoq.connections import execute, is_away, keeps_session, own_engine
from apoq.libpq import Answer
from apoq.outcomes import WorkerDied, report
from apoq.payload import encode
from apoq.queue import Queue
from apoq.statements.heartbeat import beat, forget, leave, uptime
from apoq.statements.recover import beat_and_rescue, forget_dead
from apoq.worker.lease import Lease

logger = logging.getLogger(__name__)

BEATS: Final = 5
"""Heartbeats to a lease: a worker counts as dead when it has missed this many."""

GRACE: Final = 1.5
"""Heartbeats after which a worker counts as dead whose connection is gone."""

LOCK_TIMEOUT: Final = 0.5
"""Heartbeats for which one waits for a lock on the tasks, before it does without a sweep."""

SOONEST: Final = 0.05
"""Seconds between two heartbeats, at least, when another worker is about to count as dead."""

RESCUED_AT_ONCE: Final = 1_000

FORGOTTEN_AFTER: Final = timedelta(hours=1)
"""For so long a dead worker's row is kept, for people to read."""


class Heartbeat:
    """Renews the worker's lease several times before it ends; all times are the database's.

    It has a connection of its own. A worker whose lease has ended counts as dead, and so does one whose
    connection is gone and that is not back within the grace. Any other makes its running tasks pending again;
    but not one that was away itself a moment ago, lest after an outage the first one back take the
    others for dead.
    """

    def __init__(
        self,
        engine: Engine,
        queues: tuple[Queue, ...],
        *,
        concurrency: int,
        lease: timedelta,
        on_rescued: Callable[[], None],
        on_lapse: Callable[[], None],
    ) -> None:
        self._schemas = sorted({queue.schema for queue in queues}, key=lambda schema: schema or "")
        self._lease = lease
        self._interval = lease.total_seconds() / BEATS
        self._engine = own_engine(engine, lock_timeout=f"{self._interval * LOCK_TIMEOUT * 1_000:.0f}ms")
        self._on_rescued = on_rescued
        self._on_lapse = on_lapse
        self._has_lapsed = False
        self._row = {
            "worker_host": platform.node(),
            "worker_version": version("apoq"),
            "worker_queues": [queue.name for queue in queues],
            "worker_concurrency": concurrency,
            "lease": lease,
            "grace": lease / BEATS * GRACE,
            "reason": encode(report(WorkerDied(WorkerDied.__doc__))),
        }
        self._forgets_at = 0.0
        self.worker_id = UUID(int=0)
        self.lease = Lease(lease.total_seconds(), self._interval * GRACE)
        self.seen_at: datetime | None = None
        """When the database last answered."""

    def turn(self) -> float:
        """Beat and sweep; answer when to do so again."""
        self._look_at_lease()  # the whole process may have been frozen until now
        try:
            pause = self.beat()
        except Exception:
            self.lease.shorten()
            self._look_at_lease()
            raise
        self._has_lapsed = False
        if self._forgets_at < time.monotonic():
            self.forget()
        return pause

    def enter(self) -> None:
        """Beat for the first time.

        Rescues the tasks of workers whose lease has ended, too, for this one may not live for long, as one
        that works a few tasks and ends; but not when the server has just come up, and nobody could renew.
        """
        ((is_up_for,),) = self._execute(uptime(), {})
        began = time.monotonic()
        if is_up_for > self._lease:
            for schema in self._schemas:
                self._beat_and_rescue(schema, self._parameters() | {"grace": self._lease})
            self._renewed(began)
        else:
            self.beat()

    def beat(self) -> float:
        """Renew the lease, and rescue the tasks of dead workers; answer the seconds until the next beat."""
        began = time.monotonic()
        parameters = self._parameters()
        pause = self._interval
        for schema in self._schemas:
            if self.lease.is_steady:
                try:
                    next_death = self._beat_and_rescue(schema, parameters)
                except LockNotAvailable:
                    logger.info("apoq_tasks is locked, by a migration perhaps: nothing can be rescued now")
                else:
                    pause = min(pause, max(next_death, SOONEST))
                    continue
            self._execute(beat(schema), parameters)
        self._renewed(began)
        return pause

    def _renewed(self, began: float) -> None:
        self.lease.renew(began)
        self.seen_at = datetime.now(UTC)

    def _parameters(self) -> dict[str, Any]:
        return {
            **self._row,
            "worker_id": self.worker_id,
            "by_worker": self.worker_id,
            "worker_pid": os.getpid(),
            "is_direct": keeps_session(self._engine),
        }

    def _beat_and_rescue(self, schema: str | None, parameters: dict[str, Any]) -> float:
        at_most, passed_over = RESCUED_AT_ONCE, 0
        ends_at = time.monotonic() + self._interval / 2
        while True:
            batch = {"at_most": at_most, "passed_over": passed_over}
            try:
                ((rescued, are_noted, next_death),) = self._execute(
                    beat_and_rescue(schema), parameters | batch
                )
            except DatabaseError as error:
                if is_away(error) or isinstance(error, LockNotAvailable):
                    raise
                # A batch survives its worst member: from here on, each is rescued by itself.
                if at_most == 1:
                    passed_over += 1
                else:
                    logger.warning("a task of a worker that died can't be made pending again: %s", error)
                at_most = 1
                if time.monotonic() < ends_at:
                    continue
                self._execute(beat(schema), parameters)
                return math.inf
            if rescued:
                logger.warning("%d tasks of workers that died are pending again", rescued)
                self._on_rescued()
            if rescued < at_most:
                if are_noted:
                    self._execute(forget_dead(schema), parameters)
                return math.inf if next_death is None else next_death

    def _execute(self, statement: Executable, parameters: dict[str, Any]) -> Answer:
        return execute(self._engine, statement, parameters, timeout=self._interval * GRACE)

    def _look_at_lease(self) -> None:
        if not self.lease.is_held and not self._has_lapsed:
            self._has_lapsed = True
            self._on_lapse()

    def forget(self) -> None:
        """Remove the rows of workers that died long ago."""
        self._forgets_at = time.monotonic() + FORGOTTEN_AFTER.total_seconds() / 10
        for schema in self._schemas:
            self._execute(forget(schema), {"keep": FORGOTTEN_AFTER})

    def dispose(self) -> None:
        """Close its connection."""
        self._engine.dispose()

    def leave(self) -> None:
        """Take the worker's row away: it holds nothing any more."""
        for schema in self._schemas:
            self._execute(leave(schema), {"worker_id": self.worker_id})
