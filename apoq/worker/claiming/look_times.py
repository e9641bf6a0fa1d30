"""When the scanner looks into which queue."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from typing import Final

from apoq.client.queue import Queue

JITTER: Final = 0.1
"""By what part of itself a poll interval is shortened at random, so that idle workers don't look at once."""

POLLS_PER_SECOND: Final = 20
"""Polls that a worker of many schemas sends to those that are quiet, at most."""


class LookTimes:
    """For each queue, the time of its next look. A schema's queues are looked into together if they are idle.

    A schema in which nothing happens is polled every poll interval. If there are so many schemas that this
    would be more than `POLLS_PER_SECOND`, the quiet ones are polled less and less often, down to that rate.
    """

    def __init__(self, queues: Iterable[Queue], poll_interval: float) -> None:
        self._lock = threading.Lock()
        self._next = dict.fromkeys(queues, 0.0)
        self._poll_interval = poll_interval
        schemas = {queue.schema for queue in self._next}
        self._max_interval = max(poll_interval, len(schemas) / POLLS_PER_SECOND)
        self._intervals = dict.fromkeys(schemas, poll_interval)
        self.next_look = 0.0
        """The first of these times, by time.monotonic()."""

    def move_up(self, queue: Queue, seconds: float) -> bool:
        """Look into a queue in so many seconds at the latest; return whether that is the next look of all."""
        at = time.monotonic() + seconds
        with self._lock:
            if at < self._next[queue]:
                self._next[queue] = at
                self._intervals[queue.schema] = self._poll_interval
            is_next = at < self.next_look
            if is_next:
                self.next_look = at
        return is_next

    def take(self, now: float) -> list[Queue]:
        """Return the queues to look into now, those of a schema together; the next look is a poll later."""
        with self._lock:
            schemas = {queue.schema for queue, at in self._next.items() if at <= now}
            queues = [
                queue
                for queue, at in self._next.items()
                if queue.schema in schemas and at <= now + self._intervals[queue.schema] / 2
            ]
            pauses = {schema: self._pause(schema) for schema in schemas}
            self._next.update({queue: now + pauses[queue.schema] for queue in queues})
            self.next_look = min(self._next.values())
        return sorted(queues, key=lambda queue: queue.schema or "")

    def _pause(self, schema: str | None) -> float:
        interval = self._intervals[schema]
        self._intervals[schema] = min(2 * interval, self._max_interval)
        return interval * random.uniform(1 - JITTER, 1.0)  # noqa: S311
