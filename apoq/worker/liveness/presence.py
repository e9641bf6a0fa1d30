"""The worker in one schema: its lease there, when it beats, and the other workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from apoq.client.queue import Queue
from apoq.worker.failures import Failures, Outage
from apoq.worker.lease import Lease
from apoq.worker.liveness.peers import Peers
from apoq.worker.narrowing import Narrowing

MAX_RESCUED_AT_ONCE: Final = 1_000

QUIET_BEATS_PER_SECOND: Final = 10
"""Heartbeats that a worker of many schemas sends to those that are quiet, at most."""


class Presence:
    """The worker in one schema.

    A schema is quiet if neither this worker nor another one holds tasks there. If there are so many schemas
    that the heartbeats to all would be more than `QUIET_BEATS_PER_SECOND`, those to the quiet ones are less
    frequent, and the leases there are longer, so that what isn't used costs little.
    """

    def __init__(
        self,
        schema: str | None,
        queues: Sequence[Queue],
        outage: Outage,
        *,
        lease: float,
        interval: float,
        grace: float,
    ) -> None:
        """`queues` are those of all schemas; `lease`, `interval` and `grace` are in seconds."""
        self.schema = schema
        self.queues = [queue.name for queue in queues if queue.schema == schema]
        """The names of the worker's queues there."""
        self.lease = Lease(lease, grace)
        self.peers = Peers(grace)
        self.looked_at = -math.inf
        self.narrowing = Narrowing(MAX_RESCUED_AT_ONCE)
        where = "" if schema is None else f" in the schema {schema!r}"
        self.rescuing = Failures(f"the rescue of tasks of dead workers{where}", outage)
        self.has_told = False
        """Whether it was logged that a task can't be rescued."""
        self.has_lapsed = True
        """Whether the end of the lease has been reported; at first it has none."""
        self.next_beat = -math.inf
        """By time.monotonic()."""
        self._interval = interval
        schemas = {queue.schema for queue in queues}
        self._stretch = max(1.0, len(schemas) / QUIET_BEATS_PER_SECOND / interval)
        self.is_quiet = self.may_be_quiet
        """Whether no worker held a task there at the last look; this one holds none before the first."""

    @property
    def may_be_quiet(self) -> bool:
        """Whether there are so many schemas that a quiet one makes a difference."""
        return self._stretch > 1

    @property
    def stretch(self) -> float:
        """How many times as long as usual the lease and the pauses between heartbeats are."""
        return self._stretch if self.is_quiet else 1.0

    @property
    def interval(self) -> float:
        """Seconds between two heartbeats."""
        return self._interval * self.stretch

    def __repr__(self) -> str:
        return "the heartbeat" if self.schema is None else f"the heartbeat in the schema {self.schema!r}"
