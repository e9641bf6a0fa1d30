"""Claims due tasks for the slots, as many as they can start soon."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.pool import PoolProxiedConnection

from apoq.connections import STATEMENT_TIMEOUT, execute
from apoq.libpq import written
from apoq.outcomes import WorkerDied
from apoq.payload import encode
from apoq.queue import Queue
from apoq.registry import Processor, Registry
from apoq.statements.arrays import array_text
from apoq.statements.claim import claim
from apoq.statements.notes import forget_settled
from apoq.statements.recover import forget_unknown, give_back
from apoq.worker.attempts import Ended, ended
from apoq.worker.lease import Lease
from apoq.worker.notes import Notes
from apoq.worker.position import Position
from apoq.worker.running import BATCH, FAIL_COUNT, ID, PRIORITY, PROCESS_AT, AnyRunningTask, Batch, Claimed
from apoq.worker.slots import Slots, released

logger = logging.getLogger(__name__)

MOST_AT_ONCE: Final = 1_000
"""Tasks that one statement claims at most."""

MOST_AHEAD: Final = 2_000
"""Tasks that are claimed at most beyond those that run."""

HORIZON: Final = 0.25
"""Seconds of work that are claimed ahead: what the slots start within them."""

REST: Final = 5
"""How many times as long as it took a claim that came short it is to the next: many hints are few claims."""

LONGEST_REST: Final = 0.02
"""Seconds to it, at most: as long as a busy client's hint is late."""

LEASE_LOOK: Final = 0.1
"""Seconds after which a claimer whose lease has ended looks whether it is renewed."""

OVERDUE: Final = 2.0
"""Seconds after which a task that has not begun is given back, for others may have a free slot."""

STRAYS_LOOK: Final = 1.0
"""Seconds after which it is looked again for what a claim has taken whose answer was lost."""

_BY_AGE: Final = itemgetter(PROCESS_AT, ID)
_BY_PRIORITY: Final = itemgetter(PRIORITY)


def ahead(concurrency: int, run_time: float | None) -> int:
    """Answer how many tasks to claim beyond those that run, if one takes `run_time` seconds.

    Short ones by the hundred; none of those that would wait longer than `HORIZON` for a slot, nor of tasks
    of which nothing is known yet: what sits here claimed, another worker can't begin.
    """
    if run_time is None:
        return 0
    return min(MOST_AHEAD, int(concurrency * HORIZON / max(run_time, 1e-6)))


@dataclass(slots=True)
class _Source:
    """A queue that is claimed from, and what a claim from it asks each time."""

    queue: Queue
    position: Position
    processors: Mapping[str, Processor] = field(default_factory=dict)
    by_worker: UUID | None = None
    asked: dict[str, str] = field(default_factory=dict)


class Claimer:
    """Keeps the slots busy: one statement takes a batch for all of them, and commits before any runs."""

    def __init__(
        self,
        engine: Engine,
        queues: tuple[Queue, ...],
        registry: Registry,
        slots: Slots,
        *,
        positions: dict[Queue, Position],
        lease: Lease,
        on_claim: Callable[[int, int], None],
        make: Callable[[Claimed], AnyRunningTask],
        put_ended: Callable[[Ended], None],
    ) -> None:
        self._engine = engine
        self._sources = [_Source(queue, positions[queue]) for queue in queues]
        self._registry = registry
        self._slots = slots
        self._lease = lease
        self._on_claim = on_claim
        self._make = make
        self._put_ended = put_ended
        self.worker_id = UUID(int=0)
        self.held: dict[int, Claimed] = {}
        """Every task that was claimed and isn't settled yet, by the `id()` of its row.

        Not by its own: it may be claimed once more while its last run goes on, and schemas count from 1 each.
        """
        self._moves: list[tuple[Position, list[tuple[Any, ...]], bool]] = []
        self._notes = Notes()
        self.waits_for_room = True
        """Whether a slot that is freed is a reason to take a turn."""
        self._lock = threading.Lock()
        self._doubt_ends: float | None = None
        self._looked_at = 0.0
        self._hinted = True
        self._rested_at = 0.0

    def hint(self) -> None:
        """Look at the next turn, even if there was nothing a moment ago."""
        self._hinted = True

    def turn(self, connection: PoolProxiedConnection | None = None) -> float | None:
        """Claim what the slots have room for; answer when to look again.

        On one of the engine's connections, where the caller has that in hand.
        """
        # Before looking at the room, lest a slot that is freed meanwhile wake nobody.
        self.waits_for_room = True
        pause = self._give_back_overdue()
        if self._doubt_ends is not None:
            pause = STRAYS_LOOK  # it may commit at any time, and nobody would tell
            if time.monotonic() >= self._looked_at + STRAYS_LOOK:
                with self._lock:
                    self._give_back_strays()
                self._hinted = True
        if not self._hinted:
            self.waits_for_room = False
            return pause
        if not self._lease.is_held:
            return LEASE_LOOK
        is_careful = any(source.position.is_careful for source in self._sources)
        in_line = 0 if is_careful else ahead(self._slots.concurrency, self._slots.run_time)
        self._slots.low_water = in_line // 2
        room = self._slots.concurrency + in_line - self._slots.load
        free = self._slots.free
        if room < 1 or (free == 0 and room <= in_line // 2):
            return pause  # woken when there is more room
        began = time.monotonic()
        if began < self._rested_at:
            self.waits_for_room = False
            return self._rested_at - began
        self._hinted = False
        wanted = min(room, MOST_AT_ONCE)
        claimed = self.claim(wanted, free, connection)
        self._slots.put(self._startable(claimed))
        self._move()
        self._on_claim(len(claimed), wanted)
        if len(claimed) == wanted:
            self._hinted = True
        else:
            took = time.monotonic() - began
            self._rested_at = began + min(LONGEST_REST, REST * took)
        self._forget_settled(connection)
        return 0.0

    def claim_one(self) -> AnyRunningTask | None:
        """Claim a single task, for the caller to run."""
        self._forget_settled()
        while claimed := self.claim(1, 1):
            self._move()
            for task in self._startable(claimed):
                return self._make(task)
        return None

    def claim(self, limit: int, free: int, connection: PoolProxiedConnection | None = None) -> list[Claimed]:
        """Claim up to `limit` tasks, where `free` slots have nothing to do.

        Raises what a queue's claim raises, unless an earlier queue has given some: these are to run.
        """
        tasks: list[Claimed] = []
        with self._lock:
            try:
                self._give_back_strays()
                for source in self._rotated():
                    if len(tasks) < limit:
                        tasks += self._claim_from(
                            source, limit - len(tasks), free - len(tasks), connection or self._engine
                        )
            except BaseException:
                # It may have committed without an answer, or may do so until the server ends it.
                self._doubt_ends = time.monotonic() + STATEMENT_TIMEOUT
                self._hinted = True
                if not tasks:
                    raise
        return tasks

    def _startable(self, tasks: list[Claimed]) -> Iterator[Claimed]:
        for row in tasks:
            if row[FAIL_COUNT]:
                task = self._make(row)
                if not has_attempts(task):
                    self._put_ended(ended(task, WorkerDied(WorkerDied.__doc__)))
                    continue
            yield row

    def settled(self, tasks: list[Claimed]) -> None:
        """Forget tasks that have been written."""
        self._notes.settled([row for row in tasks if self.held.pop(id(row), None) is not None])

    def given_up(self, task: Claimed) -> None:
        """Forget a task that can't be written: others find it by its note, once this worker is gone."""
        self.held.pop(id(task), None)

    def _claim_from(
        self, source: _Source, limit: int, free: int, where: Engine | PoolProxiedConnection
    ) -> list[Claimed]:
        queue = source.queue
        processors = self._registry.of(queue)
        if not processors:
            return []
        # Another mapping, as soon as there is one more.
        if source.processors is not processors or source.by_worker is not self.worker_id:
            source.processors, source.by_worker = processors, self.worker_id
            source.asked = written(
                {"from_queue": queue.name, "by_worker": self.worker_id, **workable(processors)}
            )
        number = self._notes.number()
        parameters = {
            **source.asked,
            "at_most": limit,
            "ahead": limit > free,
            "number": number,
            **source.position.parameters(),
        }
        rows = execute(where, claim(queue.schema), parameters).fetchall()
        self._notes.claimed(queue.schema, number, len(rows))
        # In two steps, for which C's functions do; the second leaves each priority in the order of the first.
        rows.sort(key=_BY_AGE)
        rows.sort(key=_BY_PRIORITY, reverse=True)
        if rows:
            self._moves.append((source.position, rows, len(rows) < limit))
        batch = Batch(queue, processors, time.monotonic(), number)
        tasks: list[Claimed] = [(*row, batch) for row in rows]
        self.held.update({id(row): row for row in tasks})
        return tasks

    def _move(self) -> None:
        """Move the positions behind what was claimed: at once, but for the tasks, which begin before."""
        with self._lock:
            moves, self._moves = self._moves, []
        for position, rows, is_all in moves:
            position.claimed(rows, is_all=is_all)

    def _forget_settled(self, connection: PoolProxiedConnection | None = None) -> None:
        """Delete the notes that nobody needs any more, some time: no task waits for that."""
        for source in self._sources:
            schema = source.queue.schema
            if done := self._notes.done(schema):
                parameters = {"by_worker": self.worker_id, "done": array_text(done)}
                execute(connection or self._engine, forget_settled(schema), parameters)
                self._notes.forgotten(schema, done)

    def _rotated(self) -> list[_Source]:
        # Each queue comes first in its turn, so that none starves behind a full one.
        if len(self._sources) > 1:
            self._sources = [*self._sources[1:], self._sources[0]]
        return self._sources

    def _give_back_strays(self) -> None:
        """Give back what an earlier claim took, if it committed although its answer was lost.

        Each time until none can come late, for the server may have been slow only, and none is left.
        """
        if self._doubt_ends is None:
            return
        self._looked_at = time.monotonic()
        is_over = time.monotonic() >= self._doubt_ends
        held: dict[str | None, list[int]] = {source.queue.schema: [] for source in self._sources}
        for row in list(self.held.values()):
            batch: Batch = row[BATCH]
            held[batch.from_queue.schema].append(row[ID])
        known = array_text(self._notes.known())
        for schema, ids in held.items():
            parameters = {"by_worker": self.worker_id, "known": known, "held": array_text(ids)}
            ((left,),) = execute(self._engine, give_back(schema), parameters)
            is_over = is_over and not left
            if is_over:
                execute(self._engine, forget_unknown(schema), parameters)
        if is_over:
            self._doubt_ends = None

    def _give_back_overdue(self) -> float | None:
        """Answer when to look again, where any are in line that may become overdue."""
        since = self._slots.waiting_since
        if since is None:
            return None
        if time.monotonic() - since < OVERDUE:
            return OVERDUE
        for task in self._slots.take_back():
            self._put_ended(released(task))
        # The average speaks of shorter tasks than those that run now.
        self._slots.run_time = max(self._slots.run_time or 0.0, OVERDUE)
        return None


def workable(processors: Mapping[str, Processor]) -> dict[str, Any]:
    """Answer what may be claimed for these, as `claim` takes it."""
    limits = {type_: processor.policy.limit for type_, processor in processors.items()}
    return {"of_types": list(processors), "retry_limits": encode(limits)}


def has_attempts(task: AnyRunningTask) -> bool:
    """Tell whether a claimed task may begin: one that was rescued from a dead worker may have used all up."""
    return not task.fail_count or task.fail_count <= task.policy.limit
