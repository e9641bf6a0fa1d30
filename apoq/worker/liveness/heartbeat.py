"""Shows that the worker is alive, and rescues the tasks of dead workers."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from importlib.metadata import version
from typing import Any, Final
from uuid import UUID

from psycopg import DatabaseError
from psycopg.errors import LockNotAvailable
from sqlalchemy import Engine, Executable

from apoq.client.queue import Queue
from apoq.core.outcomes import WorkerDied, report
from apoq.core.payload import encode
from apoq.events import TasksRescued
from apoq.postgres.connections import execute, is_away, is_caused_by_a_row, keeps_session, own_engine
from apoq.postgres.fast_path import Result
from apoq.postgres.watchdog import Stopped
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.heartbeat import beat_and_look, forget, leave
from apoq.schema.statements.notes import forget_settled
from apoq.schema.statements.recover import forget_dead, held_by_dead, rescue
from apoq.worker import logs
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.claim_log import ClaimLog
from apoq.worker.failures import Outage
from apoq.worker.lease import Lease
from apoq.worker.liveness.peers import Peer
from apoq.worker.liveness.presence import Presence
from apoq.worker.unique_keys import lacking, take_free_keys

HEARTBEATS_PER_LEASE: Final = 5
"""Heartbeats to a lease: a worker counts as dead when it has missed this many."""

GRACE_HEARTBEATS: Final = 1.5
"""Heartbeats after which a worker counts as dead if its connection is gone."""

LOCK_TIMEOUT_HEARTBEATS: Final = 0.5
"""Heartbeats for which a rescue waits for a lock on the tasks, before it gives up."""

MIN_INTERVAL_SECONDS: Final = 0.05
"""Seconds between two heartbeats, at least, when another worker is about to count as dead."""

FORGOTTEN_AFTER: Final = timedelta(hours=1)
"""How long the row of a dead worker is kept, for people to read."""

REASON: Final = encode(report(WorkerDied(WorkerDied.__doc__)))
"""The error of a task that was taken from a dead worker."""

_version = cache(version)


class Heartbeat:
    """Renews the worker's lease in each schema several times before it ends; all times are the database's.

    It has a connection of its own. A worker whose lease has ended counts as dead, and so does one whose
    connection is gone and that is not back within its grace period. Both times are those that the worker has
    written itself, not settings of the worker that reads them. Any other worker makes its running tasks
    pending again.

    A schema in which the heartbeat fails, such as one that was dropped, doesn't stop it in the others.
    """

    def __init__(
        self,
        engine: Engine,
        queues: tuple[Queue, ...],
        outage: Outage,
        claim_log: ClaimLog,
        sharded: Collection[str | None],
        *,
        concurrency: int,
        lease: timedelta,
        release: datetime,
        on_rescued: Callable[[str | None], None],
        on_unknown: Callable[[], None],
        on_lapse: Callable[[list[str | None]], None],
    ) -> None:
        """`on_rescued` is called with the schema of rescued tasks, `on_unknown` if there are unknown claims.

        `on_lapse` is called with the schemas in which the lease has ended.
        """
        seconds = lease.total_seconds()
        self._sharded = sharded
        self._interval = seconds / HEARTBEATS_PER_LEASE
        self._grace = self._interval * GRACE_HEARTBEATS
        self._presences = [
            Presence(schema, queues, outage, lease=seconds, interval=self._interval, grace=self._grace)
            for schema in sorted({queue.schema for queue in queues}, key=lambda schema: schema or "")
        ]
        self._breaker: CircuitBreaker[Presence] = CircuitBreaker(repr, outage)
        self.engine = own_engine(
            engine, lock_timeout=f"{self._interval * LOCK_TIMEOUT_HEARTBEATS * 1_000:.0f}ms"
        )
        self._claim_log = claim_log
        self._report = outage.report
        self._on_rescued = on_rescued
        self._on_unknown = on_unknown
        self._on_lapse = on_lapse
        self._row = {
            "worker_host": platform.node(),
            "worker_version": _version("apoq"),
            "worker_concurrency": concurrency,
            "worker_release": release,
        }
        self._forgets_at = 0.0
        self.worker_id = UUID(int=0)
        self.last_heartbeat_at: datetime | None = None
        """When the last heartbeat succeeded, by this machine's clock."""

    @property
    def leases(self) -> dict[str | None, Lease]:
        """The worker's lease in each schema."""
        return {presence.schema: presence.lease for presence in self._presences}

    def turn(self) -> float:
        """Beat and rescue; return when to do so again."""
        self._look_at_leases()  # the whole process may have been frozen until now
        try:
            pause = self.beat()
        except Stopped:
            raise  # the lease holds as long as it takes to stop
        except Exception:
            for presence in self._presences:
                presence.lease.shorten()
                presence.peers.forget()
                presence.next_beat = -math.inf
            raise
        finally:
            self._look_at_leases()
        if self._forgets_at < time.monotonic():
            self.forget()
        return pause

    def enter(self) -> None:
        """Beat for the first time.

        This also rescues the tasks of workers that have been dead for long, because this worker may run only
        a few tasks and end.
        """
        self._beat_in_all(self._presences, is_first=True)

    def beat(self) -> float:
        """Renew the leases for which it is time, and rescue the tasks of dead workers there.

        Returns the seconds until the next beat.
        """
        began = time.monotonic()
        for presence in self._presences:
            if presence.is_quiet and self._claim_log.known(presence.schema):
                presence.is_quiet, presence.next_beat = False, began
            elif not presence.lease.is_held:
                presence.next_beat = began
        self._beat_in_all([each for each in self._presences if each.next_beat <= began], is_first=False)
        next_beat = min(presence.next_beat for presence in self._presences)
        return max(MIN_INTERVAL_SECONDS, min(self._interval, next_beat - time.monotonic()))

    def _beat_in_all(self, presences: list[Presence], *, is_first: bool) -> None:
        parameters = {
            **self._row,
            "worker_id": self.worker_id,
            "by_worker": self.worker_id,
            "worker_pid": os.getpid(),
            "is_direct": keeps_session(self.engine),
        }
        for presence in presences:
            presence.next_beat = time.monotonic() + presence.interval
            beat_here = partial(self._beat_in, presence, parameters, is_first=is_first)
            self._breaker.call(presence, self._presences, beat_here, None)

    def _beat_in(self, presence: Presence, parameters: dict[str, Any], *, is_first: bool) -> None:
        schema, began = presence.schema, time.monotonic()
        if began - presence.looked_at > self._grace * presence.stretch:
            presence.peers.forget()  # this one was away itself
        if presence.may_be_quiet and (notes := self._claim_log.leftover(schema)):
            self._execute(forget_settled(schema), parameters | {"done": array_text(notes)})
            self._claim_log.forgotten(schema, notes)
        known = self._claim_log.known(schema)
        its = {
            "worker_queues": presence.queues,
            "known": array_text(known),
            "lease": timedelta(seconds=self._interval * HEARTBEATS_PER_LEASE * presence.stretch),
            "grace": timedelta(seconds=self._grace * presence.stretch),
        }
        found = self._execute(beat_and_look(schema), parameters | its).fetchall()
        presence.lease.renew(began, presence.stretch)
        presence.has_lapsed = False
        presence.looked_at = began
        self.last_heartbeat_at = datetime.now(UTC)
        if found[0][0]:
            self._on_unknown()
        peers = [Peer(*row[1:]) for row in found if row[1] is not None]
        dead, next_death = presence.peers.look(peers, time.monotonic())
        if is_first:
            dead = [peer.id for peer in peers if peer.is_long_gone]
        presence.next_beat = began + max(MIN_INTERVAL_SECONDS, min(presence.interval, next_death))
        presence.is_quiet = presence.may_be_quiet and not (peers or known or found[0][0])
        if dead:
            self._rescue(presence, dead)

    def _rescue(self, presence: Presence, dead: list[UUID]) -> None:
        parameters = {"dead": dead, "reason": REASON}
        narrowing, ends_at = presence.narrowing, time.monotonic() + self._interval / 2
        has_more = True
        while has_more and time.monotonic() < ends_at:
            try:
                rows = self._execute(rescue(presence.schema), parameters | narrowing.parameters).fetchall()
                rescued = len(rows)
            except LockNotAvailable:
                logs.table_locked("tasks of dead workers are rescued when it is free")
                return
            except DatabaseError as error:
                if is_away(error):
                    raise
                if not self._can_go_on_without(error, presence, parameters):
                    presence.rescuing.failed(error)
                    return
                continue
            if rescued:
                if presence.schema not in self._sharded:
                    take_free_keys(self._execute, presence.schema, lacking(rows))
                self._report(TasksRescued(rescued, presence.schema))
                self._on_rescued(presence.schema)
            has_more = narrowing.written(rescued)
        if not has_more:
            presence.rescuing.recovered()
            presence.has_told = narrowing.kept > 0
            self._execute(forget_dead(presence.schema), parameters)

    def _can_go_on_without(
        self, error: DatabaseError, presence: Presence, parameters: dict[str, Any]
    ) -> bool:
        """Return whether a task was to blame that is now passed over, or will be found among fewer."""
        narrowing = presence.narrowing
        if not is_caused_by_a_row(error):
            return False
        # A batch survives its worst member: the others are rescued without it.
        if not narrowing.refused():
            return True
        [(held,)] = self._execute(held_by_dead(presence.schema), parameters).fetchall()
        if narrowing.passed_over > held:  # so it was none of them, as if a trigger refuses the statement
            narrowing.written(0)
            return False
        if not presence.has_told:
            presence.has_told = True
            logs.rescue_refused(error)
        return True

    def _execute(self, statement: Executable, parameters: dict[str, Any]) -> Result:
        return execute(self.engine, statement, parameters, timeout=self._grace)

    def _look_at_leases(self) -> None:
        lapsed = [each for each in self._presences if not each.lease.is_held and not each.has_lapsed]
        for presence in lapsed:
            presence.has_lapsed = True
        if lapsed:
            self._on_lapse([presence.schema for presence in lapsed])

    def forget(self) -> None:
        """Delete the rows of workers that died long ago."""
        self._forgets_at = time.monotonic() + FORGOTTEN_AFTER.total_seconds() / 10
        for presence in self._presences:
            its_schema = partial(self._execute, forget(presence.schema), {"keep": FORGOTTEN_AFTER})
            self._breaker.call(presence, self._presences, its_schema, None)

    def dispose(self) -> None:
        """Close its connection."""
        self.engine.dispose()

    def leave(self) -> None:
        """Delete the worker's row: it holds no more tasks."""
        for presence in self._presences:
            if not self._breaker.is_failing(presence):
                self._execute(leave(presence.schema), {"worker_id": self.worker_id})
