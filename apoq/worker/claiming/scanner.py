"""Looks over the queues, beside the claims, for what these don't see."""

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
from apoq.worker.liveness.lease import Lease

REST_FACTOR: Final = 20
"""How many times as long as a survey took the scanner rests after it."""

SURVEY_TIMEOUT_SECONDS: Final = 60.0
"""Seconds that a survey may take: beside a long transaction, it walks through all that was taken since."""


class QueueScanner:
    """Surveys the queues from their beginning: when a claim came short, and every now and then.

    It finds what stands behind a claim's position, priorities that no claim has looked into, and when the
    next task is due. A survey may be long beside a long transaction, behind a million tasks of other types or
    among thousands of priorities, so it neither holds up the claims nor takes more than a twentieth of the
    time. While it rests after one of all priorities, it looks into those that it knows.
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
        self._engine = engine
        self._positions = positions
        self._registry = registry
        self._leases = leases
        self._poll_interval = poll_interval
        self._on_due = on_due
        self._isolation: Isolation[Queue] = Isolation(lambda queue: f"the survey of {queue!r}", outage)
        self._lock = threading.Lock()
        self._next_look = 0.0
        self._told: list[tuple[int, int] | None] = []
        self._told_at = 0.0
        self._rests = {False: Rest(), True: Rest(usual=0.001)}
        """After a survey of all priorities, and after one of those that are known."""

    def look_in(self, seconds: float) -> bool:
        """Look in so many seconds, if not before; tell whether the one who takes the turns must be woken."""
        at = time.monotonic() + seconds
        with self._lock:
            is_sooner = at < self._next_look
            if is_sooner:
                self._next_look = at
        return is_sooner

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
            self.look_in(self._rests[False].until - began)  # then into the others
        if due_in > 0:
            self.look_in(due_in)
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
        """Return whether a claim should look for what is due: not again, if the last one has left the same.

        Such as a task that another session has locked. It is tried again after a poll interval.
        """
        due = [position.first_due for position in self._positions.values()]
        is_news = due != self._told or now >= self._told_at + self._poll_interval
        if is_news:
            self._told, self._told_at = due, now
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
