"""Looks over the queues, beside the claims, for what these don't see."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from typing import Final

from sqlalchemy import Engine

from apoq.connections import execute
from apoq.queue import Queue
from apoq.registry import Registry
from apoq.statements.survey import survey
from apoq.worker.position import Position

REST: Final = 20
"""How many times as long as a survey took the scout rests after it."""


SURVEY_TIMEOUT: Final = 60.0
"""Seconds that a survey may take: beside a long transaction, it walks through all that was taken since."""


class Scout:
    """Surveys the queues from their beginning: when a claim came short, and every now and then.

    It finds what stands behind a claim's position, priorities that nobody has told of, and when the next task
    is due. A survey may be long beside a long transaction or behind a million tasks of other types, so it
    neither holds up the claims nor takes more than a twentieth of the time.
    """

    def __init__(
        self,
        engine: Engine,
        positions: dict[Queue, Position],
        registry: Registry,
        *,
        poll_interval: float,
        on_due: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._positions = positions
        self._registry = registry
        self._poll_interval = poll_interval
        self._on_due = on_due
        self._lock = threading.Lock()
        self._rested_at = 0.0
        self._last_took = math.inf
        self._next_look = 0.0

    def look_in(self, seconds: float) -> bool:
        """Look in so many seconds, if not before; tell whether the one who takes the turns must be woken."""
        at = time.monotonic() + seconds
        with self._lock:
            is_sooner = at < self._next_look
            if is_sooner:
                self._next_look = at
        return is_sooner

    def turn(self) -> float | None:
        """Survey the queues, if it is time to; answer when to look again."""
        began = time.monotonic()
        pause = max(self._next_look, self._rested_at) - began
        if pause > 0:
            return pause
        with self._lock:
            # Jitter, so that idle workers don't all look at the same moment.
            self._next_look = began + self._poll_interval * random.uniform(0.9, 1.0)  # noqa: S311
        due_in = self.survey()
        if due_in <= 0:
            self._on_due()
        else:
            self.look_in(due_in)
        return max(self._next_look, self._rested_at) - time.monotonic()

    def survey(self) -> float:
        """Survey the queues now; answer in how many seconds the next task is due."""
        began = time.monotonic()
        due_in = float("inf")
        for queue, position in self._positions.items():
            if types := list(self._registry.of(queue)):
                parameters = {"from_queue": queue.name, "of_types": types}
                rows = execute(
                    self._engine, survey(queue.schema), parameters, timeout=SURVEY_TIMEOUT
                ).fetchall()
                due_in = min(due_in, position.surveyed(rows))
        ended = time.monotonic()
        took = ended - began
        # The shorter of the last two: one that has waited for a server that was away says nothing.
        self._rested_at = ended + REST * min(took, self._last_took)
        self._last_took = took
        return due_in
