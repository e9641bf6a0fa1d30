"""Claims due tasks for the slots, as many as they can start soon."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Engine, Row

from apoq.outcomes import WorkerDied
from apoq.queue import Queue
from apoq.registry import Registry
from apoq.statements.claim import claim, next_due
from apoq.statements.recover import give_back
from apoq.worker.attempts import Ended, ended
from apoq.worker.running import AnyRunningTask
from apoq.worker.slots import Slots, released

logger = logging.getLogger(__name__)

BATCH: Final = 500
"""Tasks that one statement claims at most."""

MOST_AHEAD: Final = 1_000
"""Tasks that are claimed at most beyond those that run."""

HORIZON: Final = 0.25
"""Seconds of work that are claimed ahead: what the slots start within them."""

OVERDUE: Final = 2.0
"""Seconds after which a task that has not begun is given back, for others may have a free slot."""

AFTERMATH: Final = 0.05
"""Seconds after which an idle worker looks once more, and learns when the next task is due."""


def ahead(concurrency: int, run_time: float | None) -> int:
    """Answer how many tasks to claim beyond those that run, if one takes `run_time` seconds.

    Short ones by the hundred; none of those that would wait longer than `HORIZON` for a slot, nor of tasks
    of which nothing is known yet: what sits here claimed, another worker can't begin.
    """
    if run_time is None:
        return 0
    return min(MOST_AHEAD, int(concurrency * HORIZON / max(run_time, 1e-6)))


class Claimer:
    """Keeps the slots busy: one statement takes a batch for all of them, and commits before any runs."""

    def __init__(
        self,
        engine: Engine,
        queues: tuple[Queue, ...],
        registry: Registry,
        slots: Slots,
        *,
        poll_interval: float,
        make: Callable[[Row[Any], Queue, float], AnyRunningTask],
        put_ended: Callable[[Ended], None],
    ) -> None:
        self._engine = engine
        self._queues = queues
        self._registry = registry
        self._slots = slots
        self._poll_interval = self._until_due = poll_interval
        self._make = make
        self._put_ended = put_ended
        self.worker_id = UUID(int=0)
        self.held: dict[int, AnyRunningTask] = {}
        """Every task that was claimed and isn't settled yet."""
        self.waits_for_room = True
        """Whether a slot that is freed is a reason to take a turn."""
        self._lock = threading.Lock()
        self._doubtful = False
        self._hinted = True
        self._next_look = 0.0
        # Told by the settler's thread, and read in turns only, so that no turn overlooks what came during it.
        self._due_again: deque[float] = deque()

    def hint(self) -> None:
        """Look at the next turn, even if there was nothing a moment ago."""
        self._hinted = True

    def doubt(self) -> None:
        """Remember that a claim may have committed without an answer."""
        self._doubtful = True
        self._hinted = True

    def turn(self) -> float | None:
        """Claim what the slots have room for; answer when to look again."""
        # Before looking at the room, lest a slot that is freed meanwhile wake nobody.
        self.waits_for_room = True
        self._give_back_overdue()
        while self._due_again:
            self._next_look = min(self._next_look, self._due_again.popleft())
        now = time.monotonic()
        if not self._hinted and now < self._next_look:
            return self._sleep(now)
        in_line = ahead(self._slots.concurrency, self._slots.run_time)
        self._slots.low_water = in_line // 2
        room = self._slots.concurrency + in_line - self._slots.load
        if room < 1 or (self._slots.free == 0 and room <= in_line // 2):
            return OVERDUE if self._slots.waiting_since is not None else None  # woken when there is more room
        self._hinted = False
        wanted = min(room, BATCH)
        claimed = self.claim(wanted)
        self._slots.put(self._startable(claimed))
        if len(claimed) == wanted:
            self._next_look = 0.0
            return 0.0
        self._next_look = now + (AFTERMATH if claimed else self._until_due)
        return self._sleep(now)

    def claim_one(self) -> AnyRunningTask | None:
        """Claim a single task, for the caller to run."""
        while claimed := self.claim(1):
            for task in self._startable(claimed):
                return task
        return None

    def claim(self, limit: int) -> list[AnyRunningTask]:
        """Claim up to `limit` tasks."""
        tasks: list[AnyRunningTask] = []
        types = self._registry.types
        if not types:
            return tasks
        # Jitter, so that idle workers don't all look at the same moment.
        self._until_due = self._poll_interval * random.uniform(0.9, 1.0)  # noqa: S311
        with self._lock:
            self._give_back_strays()
            for queue in self._rotated():
                if len(tasks) < limit:
                    tasks += self._claim_from(queue, types, limit - len(tasks))
        return tasks

    def _startable(self, tasks: list[AnyRunningTask]) -> Iterator[AnyRunningTask]:
        for task in tasks:
            if task.fail_count <= task.policy.limit:
                yield task
            else:
                # Rescued from a dead worker, with no attempt left.
                self._put_ended(ended(task, WorkerDied(WorkerDied.__doc__)))

    def settled(self, end: Ended) -> None:
        """Forget a task that has been written, and look when it is due again."""
        if self.held.get(end.task.id) is end.task:
            del self.held[end.task.id]
        if end.settlement.delay is not None:
            self._due_again.append(time.monotonic() + end.settlement.delay)

    def _claim_from(self, queue: Queue, types: list[str], limit: int) -> list[AnyRunningTask]:
        parameters = {
            "from_queue": queue.name,
            "of_types": types,
            "at_most": limit,
            "by_worker": self.worker_id,
        }
        self._doubtful = True
        with self._engine.begin() as connection:
            rows = connection.execute(claim(queue.schema), parameters).all()
            if not rows:
                # In the same transaction, whose now() stands still: else a task that falls due between
                # the two statements would be claimed by the one no more than waited for by the other.
                due = connection.scalar(next_due(queue.schema), {"from_queue": queue.name})
                if due is not None:
                    self._until_due = min(self._until_due, max(0.0, float(due)))
        self._doubtful = False
        now = time.monotonic()
        tasks = sorted((self._make(row, queue, now) for row in rows), key=_order)
        self.held.update((task.id, task) for task in tasks)
        return tasks

    def _rotated(self) -> tuple[Queue, ...]:
        # Each queue comes first in its turn, so that none starves behind a full one.
        if len(self._queues) > 1:
            self._queues = (*self._queues[1:], self._queues[0])
        return self._queues

    def _give_back_strays(self) -> None:
        """Give back what an earlier claim took, if it committed although its answer was lost."""
        if not self._doubtful:
            return
        with self._engine.begin() as connection:
            for schema in {queue.schema for queue in self._queues}:
                connection.execute(give_back(schema), {"by_worker": self.worker_id, "held": list(self.held)})
        self._doubtful = False

    def _give_back_overdue(self) -> None:
        since = self._slots.waiting_since
        if since is None or time.monotonic() - since < OVERDUE:
            return
        for task in self._slots.take_back():
            self._put_ended(released(task))
        # The average speaks of shorter tasks than those that run now.
        self._slots.run_time = max(self._slots.run_time or 0.0, OVERDUE)

    def _sleep(self, now: float) -> float:
        """Answer how long there is nothing to look for, whatever room there is."""
        self.waits_for_room = False
        pause = max(0.0, self._next_look - now)
        return pause if self._slots.waiting_since is None else min(pause, OVERDUE)


def _order(task: AnyRunningTask) -> tuple[int, datetime, int]:
    return -task.priority, task.process_at, task.id
