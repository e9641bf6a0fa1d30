"""Surveys the queues for due tasks that the claims don't see."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Final

from psycopg import DatabaseError

from apoq.client.queue import Queue
from apoq.core.registry import Registry
from apoq.postgres.connections import execute, is_away
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.queues import queue_text, queues_text
from apoq.schema.statements.survey import First, survey, surveyed
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.claiming.cursor import MAX_LEVELS, ClaimCursor
from apoq.worker.claiming.look_times import LookTimes
from apoq.worker.database import WorkerDatabase
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
        database: WorkerDatabase,
        cursors: Mapping[Queue, ClaimCursor],
        registry: Registry,
        *,
        poll_interval: float,
        on_due: Callable[[list[Queue]], None],
    ) -> None:
        """`on_due` is called with the queues in which there may be tasks to claim."""
        super().__init__("apoq-scanner", database.outage)
        self._database = database
        self._cursors = cursors
        self._registry = registry
        self._poll_interval = poll_interval
        self._on_due = on_due
        self._breaker: CircuitBreaker[Queue] = CircuitBreaker(
            lambda queue: f"the survey of {queue!r}", database.outage
        )
        self._looks = LookTimes(cursors, poll_interval)
        self._reported: dict[Queue, tuple[tuple[First, ...], float]] = {}
        """The first due tasks of each queue, and when these were reported to the claimer."""
        self._rests = {False: Rest(), True: Rest(usual=0.001)}
        """After a survey of all priorities, and after one of those that are known."""

    def look_into(self, queue: Queue, seconds: float = 0.0) -> None:
        """Survey a queue in so many seconds at the latest."""
        if self._looks.move_up(queue, seconds):
            self.wake()

    def claimed(self, queue: Queue, count: int, *, has_more: bool) -> None:
        """Survey a queue soon after a claim, to see whether these were all tasks that are due.

        `count`: how many tasks it has taken, or let wait.
        """
        if count:
            self._reported.pop(queue, None)  # one of these may soon be due again
        # A notification that led to no task may have been for something else: that is looked at immediately.
        self.look_into(queue, BUSY_RESURVEY_SECONDS if has_more else RESURVEY_SECONDS if count else 0.0)

    def turn(self) -> float | None:
        """Survey the queues for which it is time; return when to look again."""
        began = time.monotonic()
        pause = self._wait_until() - began
        if pause > 0:
            return pause
        known = began < self._rests[False].until
        due_in = self._survey(self._looks.take(began), known=known)
        for queue, seconds in due_in.items():
            if known:
                self._looks.move_up(queue, self._rests[False].until - began)  # then at the others
            if seconds > 0:
                self._looks.move_up(queue, seconds)
        due = [queue for queue, seconds in due_in.items() if seconds <= 0]
        if news := [queue for queue in due if self._is_news(queue, began)]:
            self._on_due(news)
        return self._wait_until() - time.monotonic()

    def survey(self) -> float:
        """Survey all queues now; return in how many seconds the next task is due."""
        return min(self._survey(list(self._cursors), known=False).values(), default=math.inf)

    def _survey(self, queues: list[Queue], *, known: bool) -> dict[Queue, float]:
        """Return for each queue in how many seconds its next task is due.

        `known`: look only into the priorities that are known.
        """
        began = time.monotonic()
        due_in: dict[Queue, float] = {}
        for schema, of_schema in groupby(queues, attrgetter("schema")):
            if self._database.leases[schema].is_held:
                its = [queue for queue in of_schema if self._registry.of(queue)]
                due_in |= self._survey_schema(schema, its, known=known)
        self._rests[known].took(time.monotonic() - began)
        if not known:
            self._rests[True].begin()
        return due_in

    def _survey_schema(self, schema: str | None, queues: list[Queue], *, known: bool) -> dict[Queue, float]:
        if len(queues) > 1:
            try:
                return self._execute(schema, queues, known=known)
            except DatabaseError as error:
                if is_away(error):
                    raise
        # One by one, so that a queue that makes this fail doesn't hold up the others.
        due_in: dict[Queue, float] = {}
        none: dict[Queue, float] = {}
        for queue in queues:
            survey_one = partial(self._execute, schema, [queue], known=known)
            others = (each for each in self._cursors if self._database.leases[each.schema].is_held)
            due_in |= self._breaker.call(queue, others, survey_one, none)
        return due_in

    def _execute(self, schema: str | None, queues: list[Queue], *, known: bool) -> dict[Queue, float]:
        passed_over = [task_id for queue in queues for task_id in self._cursors[queue].passed_over()]
        texts = [
            (queue_text(queue.name, self._registry.of(queue)), self._cursors[queue].levels)
            for queue in queues
        ]
        parameters = {
            "queues": queues_text(*texts),
            "at_most": MAX_LEVELS + 1,
            "passed_over": array_text(passed_over),
        }
        statement = survey(schema, known=known, passes_over=bool(passed_over))
        found = surveyed(
            execute(self._database.engine, statement, parameters, timeout=SURVEY_TIMEOUT_SECONDS)
        )
        due_in: dict[Queue, float] = {}
        for queue in queues:
            self._cursors[queue].is_limited = queue.name in found.limited
            firsts = found.firsts.get(queue.name, ())
            of_tasks = self._cursors[queue].surveyed(firsts, found.now, known=known)
            due_in[queue] = min(of_tasks, found.resumes.get(queue.name, math.inf) - found.now)
        return due_in

    def _is_news(self, queue: Queue, now: float) -> bool:
        """Return whether the claimer should claim: not if the task is due that it left the last time.

        Another session may have locked it, for example. It is tried again after a poll interval.
        """
        first_due = self._cursors[queue].first_due
        reported, reported_at = self._reported.get(queue, ((), -math.inf))
        is_news = first_due != reported or now >= reported_at + self._poll_interval
        if is_news:
            self._reported[queue] = first_due, now
        return is_news

    def _wait_until(self) -> float:
        return max(self._looks.next_look, min(rest.until for rest in self._rests.values()))


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
