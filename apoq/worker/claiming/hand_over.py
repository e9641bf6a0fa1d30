"""Gives the places that have become free to the next tasks."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from psycopg import DatabaseError

from apoq.client.queue import Queue
from apoq.core.places import POOL, WHOLE_QUEUE, Share
from apoq.postgres.connections import execute, is_caused_by_a_row
from apoq.schema.statements.notify import arrays, has_tasks, notify
from apoq.worker import logs
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.claim_log import ClaimLog
from apoq.worker.claiming.claim_statement import ClaimStatement
from apoq.worker.claiming.claimable_queue import ClaimableQueue
from apoq.worker.claiming.intake import Intake
from apoq.worker.claiming.placed_claims import PlacedClaims
from apoq.worker.claiming.schema_claims import Taken
from apoq.worker.claiming.strays import Strays
from apoq.worker.database import WorkerDatabase
from apoq.worker.execution.executor import Executor
from apoq.worker.places import Freed, Places
from apoq.worker.service import Service

AHEAD_SECONDS: Final = 0.01
"""Seconds within which a slot must become free for a task to be claimed together with its place.

Otherwise, the task is unblocked, and any worker may claim it: while it waited here for a slot, it would keep
the place from all other tasks.
"""

PLACED_SECONDS: Final = 0.05
"""Seconds after which a task that has a place and has not begun is released: another gets the place."""

LOGGED_SECONDS: Final = 600.0
"""Seconds after which it is logged again that the server refuses to change a task."""

RETRY_SECONDS: Final = 0.005
"""Seconds after which a place is handed over for which another transaction was just looking for a task."""


class HandOver(Service):
    """Hands over free places: it claims the tasks that wait for them, and unblocks those it has no slot for.

    It has a thread and transactions of its own, so that the next task of a key waits for no other claim.
    """

    def __init__(
        self,
        database: WorkerDatabase,
        queues: Iterable[ClaimableQueue],
        intake: Intake,
        executor: Executor,
        claim_log: ClaimLog,
        strays: Strays,
        places: Places,
        *,
        on_unblocked: Callable[[Queue], None],
        on_room: Callable[[], None],
    ) -> None:
        """`queues` has the tasks with concurrency keys of each queue.

        `on_unblocked` is called with a queue of which waiting tasks can be claimed again, and `on_room` when
        slots that were reserved may be free.
        """
        super().__init__("apoq-hand-over", database.outage)
        self._engine = database.engine
        self._queues = {its.queue: its for its in queues}
        self._claims = {
            schema: PlacedClaims(
                database.engine, schema, ClaimStatement(database, schema, claim_log, strays), places
            )
            for schema in database.schemas
        }
        self._intake = intake
        self._executor = executor
        self._strays = strays
        self._places = places
        self._on_unblocked = on_unblocked
        self._on_room = on_room
        self._breaker: CircuitBreaker[Queue] = CircuitBreaker(
            lambda queue: f"handing over places of {queue!r}", database.outage
        )
        self._logged_at: dict[tuple[Queue, Share], float] = {}
        """Keys and pools whose next tasks the server refuses to change, and when that was logged."""
        self._released: set[Queue] = set()
        """The queues of which tasks with places were released, which others may claim."""
        self._is_draining = False
        self._lock = threading.Lock()
        places.on_free = self.wake

    def start(self) -> None:
        """Start handing over places, to tasks that this worker runs."""
        if not self.is_alive:
            self._is_draining = False
        super().start()

    def drain(self) -> None:
        """Claim no more tasks; but still unblock those that get places."""
        self._is_draining = True

    def expect(self, queue: Queue, shares: Freed) -> None:
        """Look for tasks that wait for places of these keys and pools, because some may be free."""
        if shares:
            self._places.expect(queue, shares)
            self.wake()

    def claim_has_ended(self) -> None:
        """Look again for slots that the claim had reserved."""
        if self._places:
            self.wake()

    def room(self) -> int:
        """Return how many more tasks with places would begin soon enough."""
        return 0 if self._is_draining else self._executor.room_for_places(AHEAD_SECONDS)

    def turn(self) -> float | None:
        """Hand over the free places; return when to look again."""
        if self._places:
            self._give_away()
            self._strays.forget_settled()
        pause = self._release_overdue()
        if self._places:
            return RETRY_SECONDS if pause is None else min(pause, RETRY_SECONDS)
        return pause

    def unblock(self) -> None:
        """Give free places to tasks that any worker may claim, on the caller's thread."""
        self._give_away(room=0)
        if self._places:
            self.wake()  # for the others

    def unblock_all(self, by: float) -> None:
        """Do so with all free places until `by`, by time.monotonic(), or until the rest must wait."""
        before = math.inf
        while 0 < (count := self._places.count()) < before and time.monotonic() < by:
            before = count
            self.unblock()

    def _give_away(self, room: int | None = None) -> None:
        """Give the free places to the tasks that wait for them: claim up to `room`, and unblock the others.

        By default, up to as many as begin within `AHEAD_SECONDS`.
        """
        left = self._places.take()
        try:
            for queue, freed in list(left.items()):
                give = partial(self._give_away_singly, self._queues[queue], freed, room)
                if self._breaker.call(queue, self._queues, give, otherwise=False):
                    del left[queue]
        finally:
            for queue, freed in left.items():
                self._places.expect(queue, freed)

    def _give_away_singly(self, queue: ClaimableQueue, freed: Freed, room: int | None) -> bool:
        """Give away places of a queue, each by itself if the server refuses the row of a task."""
        try:
            return self._give_away_in(queue, freed, room)
        except DatabaseError as error:
            if not is_caused_by_a_row(error):
                raise
            if len(freed) == 1:
                [share] = freed
                self._log_refusal(queue.queue, share, error)
                return True  # the sweep tries it again
            handled = [
                self._give_away_singly(queue, {share: count}, room) for share, count in list(freed.items())
            ]
            return all(handled)

    def _log_refusal(self, queue: Queue, share: Share, error: DatabaseError) -> None:
        now = time.monotonic()
        if now >= self._logged_at.get((queue, share), -math.inf) + LOGGED_SECONDS:
            self._logged_at = {key: at for key, at in self._logged_at.items() if now < at + LOGGED_SECONDS}
            self._logged_at[queue, share] = now
            logs.place_not_handed_over(*share, error)

    def _give_away_in(self, queue: ClaimableQueue, freed: Freed, room: int | None) -> bool:
        """Give away places of a queue; return False if that must wait."""
        if not queue.lease.is_held:
            return True  # another worker's sweep finds the tasks that wait
        most = self.room() if room is None else room
        free = self._executor.free
        if room is None and most < sum(freed.values()) and self._executor.is_reserved:
            return False  # until it is known whether the claim has taken the slots
        with self._lock, self._executor.reserve(min(most, free, sum(freed.values()))):
            placed = self._claims[queue.queue.schema].hand_over(queue, freed, most, free)
            tasks = self._intake.hold(Taken.under_limits(queue, placed, free))
        self._places.expect(queue.queue, placed.later)
        self._intake.begin(tasks, placed=True)
        self._on_room()
        self._intake.release_paused(tasks)
        is_released = queue.queue in self._released
        if placed.is_unblocked or is_released or Share(POOL, WHOLE_QUEUE) in freed:
            self._released.discard(queue.queue)
            self._offer(queue.queue)
        return True

    def _offer(self, queue: Queue) -> None:
        """Let all workers, and this one, claim tasks of a queue that could not begin before."""
        self._on_unblocked(queue)
        execute(self._engine, notify(), arrays([has_tasks(queue.schema, queue.name)]))

    def _release_overdue(self) -> float | None:
        """Release tasks with places that have not begun in time, so that others get their places."""
        since = self._executor.placed_since
        if since is None:
            return None
        left = since + PLACED_SECONDS - time.monotonic()
        if left > 0:
            return left
        self._released |= self._intake.release_placed()
        # The average is of shorter tasks than those that run now. With so long ones, no place is taken ahead.
        long = (self._executor.concurrency + 1) * PLACED_SECONDS
        self._executor.run_time = max(self._executor.run_time or 0.0, long)
        return None
