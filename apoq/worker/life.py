"""A worker from its entry into the database to its leaving."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Final
from uuid import uuid4

from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, defer
from sqlalchemy.orm.attributes import set_committed_value

from apoq import preflight
from apoq.connections import is_away
from apoq.errors import NotPrepared
from apoq.events import Events
from apoq.migrations.prepare import check
from apoq.model import Task, detached
from apoq.queue import Queue
from apoq.registry import Registry
from apoq.states import COMPLETED
from apoq.worker.attempts import Ended
from apoq.worker.options import WorkerOptions
from apoq.worker.parts import PATIENCE, Parts
from apoq.worker.running import KNOWN
from apoq.worker.slots import released
from apoq.worker.tally import Tally
from apoq.worker.threads import RETRY_INTERVAL

logger = logging.getLogger(__name__)

TOLERATED: Final = 5.0
"""Seconds for which claims or settlements may fail before the worker isn't healthy any more."""


class Life:
    """Enters a worker while it has started or `work` is called, and shows that it lives as long as that."""

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        queues: tuple[Queue, ...],
        registry: Registry,
        events: Events,
        options: WorkerOptions,
    ) -> None:
        self.parts = Parts(engine, queues, registry, events, options)
        self._schemas = {queue.schema for queue in queues}
        self._lock = threading.RLock()
        self._enlisted = 0
        self._is_started = False
        self._has_entered = False
        self._begins_later = False
        """Whether the heartbeat's thread starts the others: when the database, and each thread, is there."""
        self._looked_at: set[str | None] = set()
        """The schemas of which the log has what is in a worker's way there."""
        self._beating = self.parts.loop("apoq-heartbeat", self._beat)

    @property
    def is_enlisted(self) -> bool:
        """Tell whether it has begun."""
        return self._enlisted > 0

    def is_healthy(self) -> bool:
        """Tell whether it has started, with all its threads, holds a lease, and claims and settles."""
        parts = self.parts
        loops = (self._beating, parts.recalling, *parts.loops)
        return (
            self._is_started
            and any(lease.is_held for lease in parts.heartbeat.leases.values())
            and all(loop.is_alive for loop in loops)
            and not parts.missing
            and not parts.coroutines.is_closed
            and not parts.claiming.is_failing_for(TOLERATED)
            and not parts.settling.is_failing_for(TOLERATED)
        )

    def tally(self) -> Tally:
        """Answer how many tasks run now, and what became of those that have ended."""
        return self.parts.counter.tally(len(self.parts.slots.running()))

    def work(self) -> Task | None:
        """Claim, run and settle one due task on the caller's thread."""
        self.enlist()
        parts = self.parts
        try:
            task = parts.claimer.claim_one()
            if task is None and parts.scout.survey() <= 0:
                task = parts.claimer.claim_one()
            if not self._is_started:
                parts.settler.turn()
            if task is None:
                return None
            try:
                end = parts.run_beside(task)
            except Exception:  # such as that no thread can be started for the loop of a coroutine
                parts.settler.put(released(task))
                parts.settler.flush(PATIENCE)
                raise
            parts.settler.put(end)
            parts.settler.flush(PATIENCE)
            if isinstance(end.outcome, KeyboardInterrupt):
                raise end.outcome  # meant for the program, not for the task that happened to run
            return self._load(end)
        finally:
            self.discharge()

    def start(self, loop: asyncio.AbstractEventLoop | None) -> bool:
        """Start the threads; tell whether they hadn't started before."""
        parts = self.parts
        if parts.is_current():
            return False  # it runs, or the caller wouldn't; and a stop may be waiting for the caller
        with self._lock:
            if self._is_started:
                return False
            parts.coroutines.use(loop)
            parts.claimer.hint()
            parts.listener.open()
            self._is_started = True
            try:
                self.enlist(wait=False)
            except BaseException:
                self._is_started = False
                parts.listener.close()
                raise
            try:
                if not self._begins_later:
                    parts.start()
            except BaseException:
                self._end(0.0)  # nothing stays half started
                raise
        return True

    def stop(self, patience: float | None) -> bool:
        """Stop the threads; tell whether they had started."""
        if self._is_started:
            # Before the lock is taken, for another thread that stops holds it while it waits for this one.
            self._refuse_to_wait_for_itself()
        with self._lock:
            if not self._is_started:
                return False
            self._refuse_to_wait_for_itself()
            self._end(patience)
        return True

    def enlist(self, *, wait: bool = True) -> None:
        """Show that this worker lives, before it claims anything; in its own time, unless told to `wait`."""
        parts = self.parts
        with self._lock:
            self._enlisted += 1
            if self._enlisted > 1:
                return
            # Fresh each time, so that nothing an earlier life of this worker left behind looks alive.
            parts.claimer.worker_id = parts.heartbeat.worker_id = uuid4()
            self._has_entered = False
            self._looked_at.clear()
            try:
                try:
                    self._enter()
                except BaseException as error:
                    if wait or not is_away(error):
                        raise
                self._begins_later = not self._has_entered
                self._beating.start()
                parts.recalling.start()
            except BaseException:
                self.discharge()
                raise

    def discharge(self) -> None:
        """Undo one `enlist`; with the last of them the worker's row and its connections go."""
        parts = self.parts
        with self._lock:
            self._enlisted -= 1
            if self._enlisted == 0:
                parts.deadlines.stop()
                parts.recalling.stop()
                self._beating.stop()
                try:
                    if self._has_entered:
                        parts.heartbeat.leave()
                except Exception as error:  # noqa: BLE001 - the lease ends by itself
                    logger.warning("this worker's row could not be removed, and will be: %s", error)
                parts.dispose()

    def _enter(self) -> None:
        refused = [error for schema in self._schemas if (error := self._refused(schema)) is not None]
        if len(refused) == len(self._schemas):
            raise refused[0]
        for error in refused:
            # A tenant's schema may have been dropped.
            logger.error("%s; until then, this worker does without the queues there", error)
        self.parts.heartbeat.enter()
        # Before the first claim, which wouldn't know of priorities otherwise.
        self.parts.scout.survey()
        self._has_entered = True

    def _refused(self, schema: str | None) -> NotPrepared | None:
        """Log what is in a worker's way in a schema; return the error if its tables aren't this library's.

        Raises `UnsupportedDatabase` if no worker may work on them.
        """
        with self.parts.engine.begin() as connection:
            if schema not in self._looked_at:  # the database may be away for several of these
                preflight.check(connection, schema)
                self._looked_at.add(schema)
            try:
                check(connection, schema)
            except NotPrepared as error:
                return error
        return None

    def _end(self, patience: float | None) -> None:
        if self._begins_later:
            self._beating.stop()  # or else it might begin to work just now
        self.parts.stop(patience)
        self._is_started = False
        # Last: until here, what runs is this worker's.
        self.discharge()

    def _beat(self) -> float | None:
        if not self._has_entered:
            self._enter()
        pause = self.parts.heartbeat.turn()
        if self._begins_later:
            self.parts.start()
            self._begins_later = False
        if self.parts.missing:
            self.parts.retry_threads()
            pause = min(pause, RETRY_INTERVAL)
        return pause

    def _refuse_to_wait_for_itself(self) -> None:
        if self.parts.coroutines.is_current():
            raise RuntimeError(
                "stop would block the event loop on which this worker's coroutines run: "
                "`await asyncio.to_thread(worker.stop)`"
            )
        if self.parts.is_current():
            raise RuntimeError(
                "stop waits for the processors and listeners that run, and this is one of them: set a "
                "threading.Event here, and call stop where you wait for it"
            )

    def _load(self, end: Ended) -> Task:
        mapped = end.task.from_queue.task_class
        # Its data is known, or was too large.
        its_row = select(mapped).where(mapped.id == end.task.id).options(defer(mapped.data))
        with Session(self.parts.engine, expire_on_commit=False) as session, session.begin():
            found = session.scalar(its_row)
            if found is not None:
                set_committed_value(found, "data", end.task.known_data())
        # A completed task that isn't kept is gone: then it is returned as far as it is known here.
        known = {name: getattr(end.task, name) for name in KNOWN}
        return found or detached(end.task.from_queue.schema, known | {"state": COMPLETED})
