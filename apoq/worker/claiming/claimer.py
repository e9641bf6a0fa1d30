"""Claims due tasks for the slots, as many as they can start soon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from sqlalchemy.pool import PoolProxiedConnection

from apoq.client.queue import Queue
from apoq.core.pace import Pace
from apoq.schema.statements.claim import CLAIM
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.claim_log import ClaimLog
from apoq.worker.claiming.claim_statement import Portions
from apoq.worker.claiming.claimable_queue import ClaimableQueue
from apoq.worker.claiming.declared_limits import DeclaredLimits
from apoq.worker.claiming.hand_over import HandOver
from apoq.worker.claiming.intake import Intake
from apoq.worker.claiming.queue_claims import MAX_CLAIM_SIZE
from apoq.worker.claiming.rotation import QueueRotation
from apoq.worker.claiming.scanner import QueueScanner
from apoq.worker.claiming.schema_claims import SchemaClaims, Taken
from apoq.worker.claiming.strays import POLL_SECONDS, Strays
from apoq.worker.database import WorkerDatabase
from apoq.worker.execution.attempt import AnyAttempt, Claimed
from apoq.worker.execution.executor import Executor
from apoq.worker.observer import Observer
from apoq.worker.places import Places
from apoq.worker.service import Service

MAX_PREFETCHED: Final = 2_000
"""Tasks that are claimed at most in addition to those that run."""

PREFETCH_SECONDS: Final = 0.25
"""Seconds of work that are prefetched: tasks that the slots can start within that time."""

LEASE_POLL_SECONDS: Final = 0.1
"""Seconds after which a claimer whose lease has ended looks whether it is renewed."""

RELEASE_AFTER_SECONDS: Final = 2.0
"""Seconds after which a task that has not begun is released, because another worker may have a free slot."""


def prefetch_limit(concurrency: int, run_time: float | None) -> int:
    """Return how many tasks to claim in addition to those that run, if one takes `run_time` seconds.

    Hundreds of short ones, but none that would wait longer than `PREFETCH_SECONDS` for a slot, and none of
    unknown length: another worker can't begin a task that is claimed here.
    """
    if run_time is None:
        return 0
    return min(MAX_PREFETCHED, int(concurrency * PREFETCH_SECONDS / max(run_time, 1e-6)))


class Claimer(Service):
    """Keeps the slots busy: one statement claims tasks for all, and commits before any of them begins."""

    def __init__(
        self,
        database: WorkerDatabase,
        queues: Iterable[ClaimableQueue],
        keyed: Iterable[ClaimableQueue],
        executor: Executor,
        intake: Intake,
        hand_over: HandOver,
        claim_log: ClaimLog,
        scanner: QueueScanner,
        strays: Strays,
        places: Places,
        declared_limits: DeclaredLimits,
        *,
        observer: Observer | None = None,
    ) -> None:
        """`keyed` has the tasks with concurrency keys of each queue, and `queues` those without."""
        super().__init__("apoq-claimer", database.outage)
        self._queues = {its.queue: its for its in queues}
        self._keyed = {its.queue: its for its in keyed}
        breaker: CircuitBreaker[ClaimableQueue] = CircuitBreaker(
            lambda queue: f"the claim from {queue!r}", database.outage
        )
        self._schemas = {
            schema: SchemaClaims(
                database,
                schema,
                [its for queue, its in self._queues.items() if queue.schema == schema],
                claim_log,
                strays,
                places,
                breaker,
            )
            for schema in database.schemas
        }
        self._rotation: QueueRotation[ClaimableQueue] = QueueRotation()
        self._executor = executor
        self._intake = intake
        self._hand_over = hand_over
        self._scanner = scanner
        self._strays = strays
        self._observer = observer
        self._declared_limits = declared_limits
        self._has_placed = False
        """Whether tasks with places were claimed that have not been given to the executor."""
        self._deferred: list[Callable[[], None]] = []
        """The steps of a claim that follow when its tasks have begun."""
        self._waits_for_room = True
        """Whether a slot that becomes free is a reason to take a turn."""
        self._lacks_room = False
        """Whether tasks that need places are due, and no slot will be free soon enough for one of them."""
        self._is_draining = False
        self._lock = threading.Lock()
        self._pace = Pace()
        self._rested_at = 0.0

    def start(self) -> None:
        """Start claiming, and declare the limits of the code again."""
        if not self.is_alive:
            self._declared_limits.forget()
            self._is_draining = False
        super().start()

    def drain(self) -> None:
        """Claim no more tasks; but still release strays."""
        self._is_draining = True

    def look_for_tasks(self, queues: Iterable[Queue] | None = None) -> None:
        """Claim now from these queues, or from all, even if the last claim found nothing there."""
        self._expect(queues)
        self.wake()

    def notified(self, queues: Iterable[Queue] | None, connection: PoolProxiedConnection | None) -> None:
        """Claim now from these queues, or from all, on the caller's thread, and on this connection if given.

        That is the connection that received the notification: its session is awake, and any other would have
        to wake up first.
        """
        self._expect(queues)
        self.take_turn(partial(self.turn, connection))

    def slot_is_free(self) -> None:
        """Claim now if the last turn found too few free slots."""
        if self._waits_for_room:
            self.wake()

    def look_for_strays(self) -> None:
        """Release stray tasks now, if there are any."""
        self._strays.expect()
        self.look_for_tasks()

    def turn(self, connection: PoolProxiedConnection | None = None) -> float | None:
        """Claim tasks for the free slots; return when to look again."""
        self._declared_limits.write()
        # Set before looking at the room: otherwise a slot that becomes free meanwhile would wake nothing.
        self._waits_for_room = True
        pause = self._release_overdue()
        if self._strays.are_expected:
            pause = POLL_SECONDS  # a claim may commit at any time, and nothing would notify
            if time.monotonic() >= self._strays.looked_at + POLL_SECONDS:
                with self._lock:
                    self._strays.release()
                self._expect(None)
        if not self._rotation:
            self._waits_for_room = False
            return pause
        if not self._rotation.has(self._may_claim):
            return LEASE_POLL_SECONDS
        room, free = self._room()
        if not room:
            return pause  # woken when there is more room
        began = time.monotonic()
        if began < self._rested_at:
            self._waits_for_room = False
            return self._rested_at - began
        wanted = min(room, MAX_CLAIM_SIZE)
        try:
            claimed = self.claim(wanted, free, connection)
        except BaseException:
            self._do_deferred()
            raise
        if self._observer is not None:
            self._observer.claimed(time.monotonic() - began)
        if len(claimed) < wanted:
            # Then there will be more tasks for the next claim.
            self._rested_at = began + self._pace.interval(time.monotonic() - began)
        self._begin(claimed, more_follow=len(claimed) == wanted)
        self._intake.release_paused(claimed)
        self._do_deferred()
        self._strays.forget_settled(connection)
        return 0.0

    def claim_one(self) -> AnyAttempt | None:
        """Claim a single task, and return the attempt that the caller is to run."""
        self._declared_limits.write()
        self._strays.forget_settled()
        self._expect(None)
        while True:
            claimed = self.claim(1, 1, room=1)
            self._do_deferred()
            if not claimed:
                return None
            if (attempt := self._intake.begin_one(claimed)) is not None:
                return attempt

    def claim(
        self,
        limit: int,
        free: int,
        connection: PoolProxiedConnection | None = None,
        *,
        room: int | None = None,
    ) -> list[Claimed]:
        """Claim up to `limit` tasks, of which `free` find a slot at once, from the queues that may have any.

        Up to `room` of them have places; by default, so many as begin soon enough.
        A queue whose claim fails is left out for a while. If it fails for all queues, its error is raised,
        unless another one has returned tasks before: these must run.
        """
        tasks: list[Claimed] = []
        if room is None:
            room = self._hand_over.room()
        had_room = room > 0
        with self._lock, self._executor.reserve(min(limit, free)):
            unreached = self._rotation.take(limit, self._may_claim)
            try:
                self._strays.release()
                for schema, portions in _by_schema(unreached).items():
                    left, left_free = limit - len(tasks), free - len(tasks)
                    if left > 0:
                        its = self._schemas[schema]
                        for taken in its.claim(portions, left, left_free, room, connection, self._others):
                            del unreached[taken.queue]
                            room -= 0 if taken.placed is None else len(taken.rows)
                            self._looked_into(taken)
                            tasks += self._hold(taken)
            except BaseException:
                if not tasks:
                    raise
            finally:
                self._lacks_room = not had_room and any(queue.needs_places for queue in unreached)
                self._rotation.put_back(unreached)
        return tasks

    def _room(self) -> tuple[int, int]:
        """Return how many tasks to claim now, zero for none, and how many slots are free."""
        executor = self._executor
        if self._is_draining:
            return 0, executor.free
        is_careful = any(queue.cursor.is_careful for queue in self._queues.values())
        # Prefetched tasks would take each slot before a task with a place could be claimed for it.
        may_prefetch = not (is_careful or self._lacks_room)
        prefetched = prefetch_limit(executor.concurrency, executor.run_time) if may_prefetch else 0
        executor.low_water = prefetched // 2
        room = executor.concurrency + prefetched - executor.load
        free = executor.free
        if room < 1 or (free == 0 and room <= prefetched // 2):
            return 0, free
        return room, free

    def _begin(self, tasks: list[Claimed], *, more_follow: bool) -> None:
        placed = [row for row in tasks if row[CLAIM].is_placed] if self._has_placed else []
        if placed:
            self._has_placed = False
            self._intake.begin(placed, placed=True)
            self._hand_over.wake()  # it releases those that don't begin in time
            tasks = [row for row in tasks if not row[CLAIM].is_placed]
        self._intake.begin(tasks, more_follow=more_follow)
        self._hand_over.claim_has_ended()

    def _looked_into(self, taken: Taken) -> None:
        """Remember how far a claim has looked into a queue."""
        queue, rows, placed = taken.queue, taken.rows, taken.placed
        self._rotation.looked_into(queue, has_more=taken.has_more)
        count = len(rows)
        if placed is not None:
            count += placed.blocked
            self._deferred.append(partial(queue.cursor.move_to, placed.ends, is_all=False))
        elif rows:
            self._deferred.append(partial(queue.cursor.claimed, rows, is_all=not taken.has_more))
        # It wakes another thread, which would take time from the tasks that begin. After the cursor has
        # moved, because a survey may move it back.
        self._deferred.append(partial(self._scanner.claimed, queue.queue, count, has_more=taken.has_more))

    def _hold(self, taken: Taken) -> list[Claimed]:
        """Remember what was taken from a queue; return its tasks."""
        if taken.placed is not None:
            self._hand_over.expect(taken.queue.queue, taken.placed.later)
            self._has_placed |= bool(taken.rows)
        return self._intake.hold(taken)

    def _expect(self, queues: Iterable[Queue] | None) -> None:
        """Look into these queues, or into all, with the next claim."""
        meant = self._queues if queues is None else queues
        expected = [self._queues[queue] for queue in meant]
        expected += [its for queue in meant if (its := self._keyed[queue]).cursor.has_keyed]
        # If there is a processor later, the next survey finds its tasks.
        self._rotation.expect(queue for queue in expected if queue.processors)

    def _do_deferred(self) -> None:
        """Move the cursors behind the claimed tasks, which have begun, and let the scanner look again."""
        with self._lock:
            deferred, self._deferred = self._deferred, []
        for each in deferred:
            each()

    def _may_claim(self, queue: ClaimableQueue) -> bool:
        return queue.lease.is_held and queue.queue not in self._declared_limits.unwritten

    def _others(self) -> Iterable[ClaimableQueue]:
        return (queue for queue in self._queues.values() if queue.lease.is_held)

    def _release_overdue(self) -> float | None:
        """Release tasks that have waited too long for a slot; return when to look again, if any wait."""
        since = self._executor.waiting_since
        if since is None:
            return None
        if time.monotonic() - since < RELEASE_AFTER_SECONDS:
            return RELEASE_AFTER_SECONDS
        self._intake.release_line()
        # The average is of shorter tasks than those that run now.
        self._executor.run_time = max(self._executor.run_time or 0.0, RELEASE_AFTER_SECONDS)
        return None


def _by_schema(portions: Portions) -> dict[str | None, dict[ClaimableQueue, int]]:
    schemas: dict[str | None, dict[ClaimableQueue, int]] = {}
    for queue, portion in portions.items():
        schemas.setdefault(queue.queue.schema, {})[queue] = portion
    return schemas
