"""Claims due tasks for the slots, as many as they can start soon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from itertools import repeat
from operator import concat, itemgetter
from typing import Final, cast

from sqlalchemy import Engine
from sqlalchemy.pool import PoolProxiedConnection

from apoq.client.queue import Queue
from apoq.core.outcomes import WorkerDied
from apoq.core.pace import Pace
from apoq.core.places import POOL, WHOLE_QUEUE, Share
from apoq.core.progress import Report
from apoq.core.registry import Registry
from apoq.events import Events, TaskClaimed, TaskCompleted, TaskStarted
from apoq.postgres.connections import execute
from apoq.schema.statements.claim import CLAIM, FAIL_COUNT
from apoq.schema.statements.notify import arrays, has_tasks, notify
from apoq.worker import reports
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.claim_log import ClaimLog
from apoq.worker.claiming.claim_statement import Portions
from apoq.worker.claiming.claimable_queue import ClaimableQueue
from apoq.worker.claiming.cursor import ClaimCursor
from apoq.worker.claiming.declared_limits import DeclaredLimits
from apoq.worker.claiming.queue_claims import MAX_CLAIM_SIZE
from apoq.worker.claiming.rotation import QueueRotation
from apoq.worker.claiming.scanner import QueueScanner
from apoq.worker.claiming.schema_claims import SchemaClaims, Taken
from apoq.worker.claiming.strays import POLL_SECONDS, Strays
from apoq.worker.execution.attempt import AnyAttempt, Claim, Claimed, StopSignal
from apoq.worker.execution.executor import Executor, released
from apoq.worker.execution.runner import AttemptResult, ended
from apoq.worker.failures import Outage
from apoq.worker.lease import Lease
from apoq.worker.observer import Observer
from apoq.worker.places import Places
from apoq.worker.service import Service

MAX_PREFETCHED: Final = 2_000
"""Tasks that are claimed at most in addition to those that run."""

PREFETCH_SECONDS: Final = 0.25
"""Seconds of work that are prefetched: tasks that the slots can start within that time."""

LEASE_POLL_SECONDS: Final = 0.1
"""Seconds after which a claimer whose lease has ended looks whether it is renewed."""

PLACED_SECONDS: Final = 0.05
"""Seconds after which a task that has a place and has not begun is released: another gets the place."""

HAND_OVER_RETRY_SECONDS: Final = 0.005
"""Seconds after which a place is handed over for which another transaction was just looking for a task."""

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
        engine: Engine,
        queues: tuple[Queue, ...],
        registry: Registry,
        executor: Executor,
        claim_log: ClaimLog,
        outage: Outage,
        events: Events,
        scanner: QueueScanner,
        strays: Strays,
        sharded: set[str | None],
        places: Places,
        declared_limits: DeclaredLimits,
        *,
        cursors: Mapping[Queue, ClaimCursor],
        leases: Mapping[str | None, Lease],
        signals: Mapping[str | None, StopSignal],
        on_ended: Callable[[AttemptResult], None],
        observer: Observer | None = None,
        on_progress: Callable[[AnyAttempt, Report], None],
    ) -> None:
        """`sharded` has the schemas that Citus shards, as far as it is known.

        `on_ended` is called with the results of tasks that end without having run, and `on_progress` with
        the progress that running tasks report.
        """
        super().__init__("apoq-claimer", outage)
        self._queues = {
            queue: ClaimableQueue(queue, cursors[queue], leases[queue.schema], registry) for queue in queues
        }
        self._keyed = {
            queue: ClaimableQueue(queue, cursors[queue], leases[queue.schema], registry, is_keyed=True)
            for queue in queues
        }
        breaker: CircuitBreaker[ClaimableQueue] = CircuitBreaker(
            lambda queue: f"the claim from {queue!r}", outage
        )
        self._schemas = {
            schema: SchemaClaims(
                engine,
                schema,
                [its for queue, its in self._queues.items() if queue.schema == schema],
                claim_log,
                strays,
                sharded,
                places,
                breaker,
            )
            for schema in leases
        }
        self._rotation: QueueRotation[ClaimableQueue] = QueueRotation()
        self._signals = signals
        self._events = events
        self._executor = executor
        self._scanner = scanner
        self._strays = strays
        self._on_ended = on_ended
        self._observer = observer
        self._on_progress = on_progress
        self._claim_log = claim_log
        self._engine = engine
        self._places = places
        self._declared_limits = declared_limits
        self._has_placed = False
        """Whether tasks with places were claimed that have not been given to the executor."""
        self._released: set[Queue] = set()
        """The queues of which tasks with places were released, which others may claim."""
        places.on_free = self.wake
        self._deferred: list[Callable[[], None]] = []
        """The steps of a claim that follow when its tasks have begun."""
        self._waits_for_room = True
        """Whether a slot that becomes free is a reason to take a turn."""
        self._is_draining = False
        self._paused_at: dict[Queue, float] = {}
        """When a queue was found to be paused, by time.monotonic()."""
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
        """Claim no more tasks; but still give free places to others, and release strays."""
        self._is_draining = True

    def queue_is_paused(self, queue: Queue) -> None:
        """Release the tasks of a queue that was paused, as far as they have not begun; from any thread.

        Also those that a claim is just taking, which began before the pause.
        """
        self._paused_at[queue] = time.monotonic()
        self.release_line([queue])

    def release_line(self, queues: Container[Queue] | None = None) -> None:
        """Release the tasks that have not begun: all of them, or those of these queues. From any thread."""
        for attempt in self._executor.take_back(queues):
            self._on_ended(released(attempt))

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
        """Hand over free places, and claim tasks for the free slots; return when to look again."""
        if self._places:
            self.hand_over()
            self._strays.forget_settled(connection)
        pause = self._claim_tasks(connection)
        if self._places:
            pause = HAND_OVER_RETRY_SECONDS if pause is None else min(pause, HAND_OVER_RETRY_SECONDS)
        return pause

    def hand_over(self, room: int | None = None) -> None:
        """Give free places to the tasks that wait for them: claim up to `room`, and unblock the others.

        By default, up to as many as begin within `PLACED_SECONDS`.
        """
        for queue, freed in self._places.take().items():
            its = self._keyed[queue]
            if not its.lease.is_held:
                continue  # another worker's sweep finds the tasks that wait
            try:
                with self._lock:
                    space = self._room_for_places() if room is None else room
                    free = self._executor.free
                    taken = self._schemas[queue.schema].hand_over(its, freed, space, free)
                    tasks = self._hold(taken)
            except BaseException:
                self._places.expect(queue, freed)
                raise
            self._executor.put(self._startable(tasks), placed=True)
            self._release_paused(tasks)
            is_unblocked = taken.placed is not None and taken.placed.is_unblocked
            if is_unblocked or queue in self._released or Share(POOL, WHOLE_QUEUE) in freed:
                self._released.discard(queue)
                self._offer(queue)

    def _offer(self, queue: Queue) -> None:
        """Let all workers, and this one, claim tasks of a queue that could not begin before."""
        self._expect([queue])
        self._scanner.look_into(queue)
        execute(self._engine, notify(), arrays([has_tasks(queue.schema, queue.name)]))

    def _claim_tasks(self, connection: PoolProxiedConnection | None) -> float | None:
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
        if not self._rotation.has(_has_lease):
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
        self._release_paused(claimed)
        self._do_deferred()
        self._strays.forget_settled(connection)
        return 0.0

    def claim_one(self) -> AnyAttempt | None:
        """Claim a single task, and return the attempt that the caller is to run."""
        self._declared_limits.write()
        self._strays.forget_settled()
        self._expect(None)
        while True:
            claimed = self.claim(1, 1)
            self._do_deferred()
            if not claimed:
                return None
            for task in self._startable(claimed):
                return self._executor.attempt_of(task)

    def claim(self, limit: int, free: int, connection: PoolProxiedConnection | None = None) -> list[Claimed]:
        """Claim up to `limit` tasks, of which `free` find a slot at once, from the queues that may have any.

        A queue whose claim fails is left out for a while. If it fails for all queues, its error is raised,
        unless another one has returned tasks before: these must run.
        """
        tasks: list[Claimed] = []
        with self._lock:
            unreached = self._rotation.take(limit, _has_lease)
            try:
                self._strays.release()
                for schema, portions in _by_schema(unreached).items():
                    left, left_free = limit - len(tasks), free - len(tasks)
                    if left:
                        its = self._schemas[schema]
                        room = self._room_for_places()
                        for taken in its.claim(portions, left, left_free, room, connection, self._others):
                            del unreached[taken.queue]
                            self._looked_into(taken)
                            tasks += self._hold(taken)
            except BaseException:
                if not tasks:
                    raise
            finally:
                self._rotation.put_back(unreached)
        return tasks

    def _room(self) -> tuple[int, int]:
        """Return how many tasks to claim now, zero for none, and how many slots are free."""
        executor = self._executor
        if self._is_draining:
            return 0, executor.free
        is_careful = any(queue.cursor.is_careful for queue in self._queues.values())
        prefetched = 0 if is_careful else prefetch_limit(executor.concurrency, executor.run_time)
        executor.low_water = prefetched // 2
        room = executor.concurrency + prefetched - executor.load
        free = executor.free
        if room < 1 or (free == 0 and room <= prefetched // 2):
            return 0, free
        return room, free

    def _room_for_places(self) -> int:
        return 0 if self._is_draining else self._executor.room_for_places(PLACED_SECONDS)

    def _begin(self, tasks: list[Claimed], *, more_follow: bool) -> None:
        placed = [row for row in tasks if row[CLAIM].is_placed] if self._has_placed else []
        if placed:
            self._has_placed = False
            self._executor.put(self._startable(placed), placed=True)
            tasks = [row for row in tasks if not row[CLAIM].is_placed]
        self._executor.put(self._startable(tasks), more_follow=more_follow)

    def _release_paused(self, tasks: list[Claimed]) -> None:
        """Release the tasks of claims that were sent before their queue was found to be paused."""
        if self._paused_at:
            claims = {id(row[CLAIM]): row[CLAIM] for row in tasks}.values()
            sent_at = {claim.from_queue: claim.sent_at for claim in claims}
            if paused := {queue for queue, at in sent_at.items() if at <= self._paused_at.get(queue, 0.0)}:
                self.release_line(paused)

    def _startable(self, tasks: list[Claimed]) -> list[Claimed]:
        """Return the tasks that have attempts left; end the others."""
        if not any(map(itemgetter(FAIL_COUNT), tasks)):
            return tasks
        startable = []
        for row in tasks:
            attempt = self._executor.attempt_of(row)
            if may_begin(attempt):
                startable.append(row)
            else:
                self._on_ended(ended(attempt, WorkerDied(WorkerDied.__doc__)))
        return startable

    def _looked_into(self, taken: Taken) -> None:
        """Remember how far a claim has looked into a queue."""
        queue, rows, placed = taken.queue, taken.rows, taken.placed
        self._rotation.looked_into(queue, has_more=taken.has_more)
        # It wakes another thread, which would take time from the tasks that begin.
        look = partial(self._scanner.claimed, queue.queue, len(rows), has_more=taken.has_more)
        self._deferred.append(look)
        if placed is not None:
            self._deferred.append(partial(queue.cursor.move_to, placed.ends, is_all=False))
        elif rows:
            self._deferred.append(partial(queue.cursor.claimed, rows, is_all=not taken.has_more))

    def _hold(self, taken: Taken) -> list[Claimed]:
        """Remember what was taken from a queue; return its tasks."""
        queue, rows, placed = taken.queue, taken.rows, taken.placed
        if placed is not None:
            self._places.expect(queue.queue, placed.later)
        if not rows:
            return []
        self._has_placed |= placed is not None
        batch = Claim(
            queue.queue,
            queue.processors,
            time.monotonic(),
            taken.sent_at,
            queue.lease,
            self._signals[queue.queue.schema],
            self._schemas[queue.queue.schema].fetch,
            taken.number,
            self._report_start if self._is_followed() else None,
            is_ahead=taken.is_ahead,
            on_progress=self._on_progress,
            is_placed=placed is not None,
        )
        tasks = cast("list[Claimed]", list(map(concat, rows, repeat((batch,)))))
        self._claim_log.hold(tasks)
        if self._events.has_listeners(TaskClaimed):
            for task in tasks:
                self._events.report(reports.claimed(task))
        return tasks

    def _expect(self, queues: Iterable[Queue] | None) -> None:
        """Look into these queues, or into all, with the next claim."""
        meant = self._queues if queues is None else queues
        expected = [self._queues[queue] for queue in meant]
        expected += [its for queue in meant if (its := self._keyed[queue]).cursor.has_keyed]
        # If there is a processor later, the next survey finds its tasks.
        self._rotation.expect(queue for queue in expected if queue.processors)

    def _is_followed(self) -> bool:
        """Return whether a listener wants to know of each task that begins, or how long it takes."""
        return self._events.has_listeners(TaskStarted) or self._events.has_listeners(TaskCompleted)

    def _report_start(self, row: Claimed) -> None:
        if self._events.has_listeners(TaskStarted):
            self._events.report(reports.started(row))

    def _do_deferred(self) -> None:
        """Move the cursors behind the claimed tasks, which have begun, and let the scanner look again."""
        with self._lock:
            deferred, self._deferred = self._deferred, []
        for each in deferred:
            each()

    def _others(self) -> Iterable[ClaimableQueue]:
        return (queue for queue in self._queues.values() if queue.lease.is_held)

    def _release_overdue(self) -> float | None:
        """Release tasks that have waited too long for a slot; return when to look again, if any wait."""
        pause = self._release_placed()
        since = self._executor.waiting_since
        if since is None:
            return pause
        if time.monotonic() - since < RELEASE_AFTER_SECONDS:
            return RELEASE_AFTER_SECONDS if pause is None else pause
        self.release_line()
        # The average is of shorter tasks than those that run now.
        self._executor.run_time = max(self._executor.run_time or 0.0, RELEASE_AFTER_SECONDS)
        return None

    def _release_placed(self) -> float | None:
        """Release tasks with places that have not begun in time, so that others get their places."""
        since = self._executor.placed_since
        if since is None:
            return None
        left = since + PLACED_SECONDS - time.monotonic()
        if left > 0:
            return left
        for attempt in self._executor.take_back_placed():
            self._on_ended(released(attempt))
            self._released.add(attempt.from_queue)
        # The average is of shorter tasks than those that run now. With so long ones, no place is taken ahead.
        long = (self._executor.concurrency + 1) * PLACED_SECONDS
        self._executor.run_time = max(self._executor.run_time or 0.0, long)
        return None


def _has_lease(queue: ClaimableQueue) -> bool:
    return queue.lease.is_held


def _by_schema(portions: Portions) -> dict[str | None, dict[ClaimableQueue, int]]:
    schemas: dict[str | None, dict[ClaimableQueue, int]] = {}
    for queue, portion in portions.items():
        schemas.setdefault(queue.queue.schema, {})[queue] = portion
    return schemas


def may_begin(attempt: AnyAttempt) -> bool:
    """Return whether an attempt may begin: a rescued task may have used up its attempts."""
    return not attempt.fail_count or attempt.fail_count <= attempt.policy.limit
