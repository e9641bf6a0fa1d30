"""Surveys the queues for due tasks that the claims don't see."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from sqlalchemy import Engine

from apoq.client.queue import Queue
from apoq.core.registry import Registry
from apoq.postgres.connections import execute
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.survey import survey
from apoq.worker.claiming.cursor import MAX_LEVELS, ClaimCursor
from apoq.worker.failures import Outage
from apoq.worker.isolation import Isolation
from apoq.worker.lease import Lease
from apoq.worker.service import Service

REST_FACTOR: Final = 20
"""After a survey, the scanner pauses so many times as long as it took."""

RESURVEY_SECONDS: Final = 0.05
"""Seconds after a claim that found too few tasks until the next survey."""

BUSY_RESURVEY_SECONDS: Final = 0.25
"""Seconds after a claim that found enough: by then, a new and higher priority is found."""

SURVEY_TIMEOUT_SECONDS: Final = 60.0
"""Seconds that a survey may take: during a long transaction, it walks through all tasks claimed since."""


class QueueScanner(Service):
    """Surveys the queues from their beginning: after a claim that found too few tasks, and regularly.

    It finds tasks behind a claim's cursor, priorities that no claim has looked at, and when the next task is
    due. A survey may take long while a long transaction is open, behind a million tasks of other types or
    with thousands of priorities. So it runs on a thread of its own, for a twentieth of the time at most.
    While it rests after a survey of all priorities, it looks at those that it knows.
    """

    def __init__(
        self,
        engine: Engine,
        positions: dict[Queue, ClaimCursor],
        registry: Registry,
        leases: Mapping[str | None, Lease],
        outage: Outage,
        *,
        poll_interval: float,
        on_due: Callable[[], None],
    ) -> None:
        """`on_due` is called when there may be tasks to claim."""
        super().__init__("apoq-scanner", outage)
        self._engine = engine
        self._positions = positions
        self._registry = registry
        self._leases = leases
        self._poll_interval = poll_interval
        self._on_due = on_due
        self._isolation: Isolation[Queue] = Isolation(lambda queue: f"the survey of {queue!r}", outage)
        self._lock = threading.Lock()
        self._next_look = 0.0
        self._reported: list[tuple[int, float, int] | None] = []
        self._reported_at = 0.0
        self._rests = {False: Rest(), True: Rest(usual=0.001)}
        """After a survey of all priorities, and after one of those that are known."""

    def look_in(self, seconds: float = 0.0) -> None:
        """Survey the queues in so many seconds at the latest."""
        if self._moved_up(seconds):
            self.wake()

    def claimed(self, count: int, wanted: int) -> None:
        """Survey the queues soon after a claim, to see whether these were all tasks that are due."""
        if count:
            self._reported = []  # one of these may soon be due again
        # A notification that led to no task may have been for something else: that is looked at immediately.
        self.look_in(BUSY_RESURVEY_SECONDS if count == wanted else RESURVEY_SECONDS if count else 0.0)

    def turn(self) -> float | None:
        """Survey the queues, if it is time to; return when to look again."""
        began = time.monotonic()
        pause = self._wait_until() - began
        if pause > 0:
            return pause
        with self._lock:
            # Jitter, so that idle workers don't all look at the same moment.
            self._next_look = began + self._poll_interval * random.uniform(0.9, 1.0)  # noqa: S311
        known = began < self._rests[False].until
        due_in = self.survey(known=known)
        if known:
            self._moved_up(self._rests[False].until - began)  # then at the others
        if due_in > 0:
            self._moved_up(due_in)
        elif self._is_news(began):
            self._on_due()
        return self._wait_until() - time.monotonic()

    def survey(self, *, known: bool = False) -> float:
        """Survey the queues now; return in how many seconds the next task is due.

        `known`: look only into the priorities that are known.
        """
        began = time.monotonic()
        queues = [
            queue
            for queue in self._positions
            if self._registry.of(queue) and self._leases[queue.schema].is_held
        ]
        due_in = min(
            (
                self._isolation.call(queue, queues, partial(self._survey_one, queue, known=known), math.inf)
                for queue in queues
            ),
            default=math.inf,
        )
        self._rests[known].took(time.monotonic() - began)
        if not known:
            self._rests[True].begin()
        return due_in

    def _is_news(self, now: float) -> bool:
        """Return whether the claimer should claim: not if the same tasks are due that it left the last time.

        Another session may have locked them, for example. They are tried again after a poll interval.
        """
        due = [position.first_due for position in self._positions.values()]
        is_news = due != self._reported or now >= self._reported_at + self._poll_interval
        if is_news:
            self._reported, self._reported_at = due, now
        return is_news

    def _survey_one(self, queue: Queue, *, known: bool) -> float:
        position = self._positions[queue]
        passed_over = position.passed_over()
        parameters = {
            **position.parameters(),
            "from_queue": queue.name,
            "of_types": list(self._registry.of(queue)),
            "at_most": MAX_LEVELS + 1,
            "passed_over": array_text(passed_over),
        }
        statement = survey(queue.schema, known=known, passes_over=bool(passed_over))
        rows = execute(self._engine, statement, parameters, timeout=SURVEY_TIMEOUT_SECONDS).fetchall()
        return position.surveyed(rows, known=known)

    def _moved_up(self, seconds: float) -> bool:
        """Look in so many seconds at the latest; return whether that is sooner than before."""
        at = time.monotonic() + seconds
        with self._lock:
            is_sooner = at < self._next_look
            if is_sooner:
                self._next_look = at
        return is_sooner

    def _wait_until(self) -> float:
        return max(self._next_look, min(rest.until for rest in self._rests.values()))


class Rest:
    """Until when the scanner rests after one kind of survey."""

    def __init__(self, usual: float = math.inf) -> None:
        """`usual`: seconds that such a survey is taken to need until one was measured."""
        self.until = 0.0
        self._last = self._needs = usual

    def took(self, seconds: float) -> None:
        """Rest from now on, after a survey that took so many seconds."""
        # The shorter of the last two: one that has waited for a server that was away says nothing.
        self._needs, self._last = min(seconds, self._last), seconds
        self.begin()

    def begin(self) -> None:
        """Rest from now on."""
        self.until = time.monotonic() + REST_FACTOR * self._needs
