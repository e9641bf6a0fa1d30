"""Finds tasks that wait for places, in case no worker hands these over."""

from __future__ import annotations

import math
import random
import time
from functools import partial
from typing import Final

from apoq.core.places import Share
from apoq.postgres.connections import execute
from apoq.schema.statements.places import awaited
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.claiming.hand_over import HandOver
from apoq.worker.database import WorkerDatabase
from apoq.worker.places import Places
from apoq.worker.service import Service

SWEEP_SECONDS: Final = 5.0
"""Seconds between two looks into a schema in which the worker has met tasks that need places."""

IDLE_SWEEP_SECONDS: Final = 60.0
"""Seconds between two looks into any other schema."""

MAX_SWEPT: Final = 64
"""Keys and pools that are looked at together, at most."""

MORE_SECONDS: Final = 0.01
"""Seconds until the next keys and pools are looked at."""

START: Final = ("", "", "")


class PlaceSweep(Service):
    """Lets `HandOver` look at the keys and pools that tasks wait for, a few at a time.

    The worker whose task ends hands over its place. The sweep is for the other cases: that worker dies at
    that moment, the task is deleted, or a limit is raised or removed and no notification arrives.
    """

    def __init__(
        self,
        database: WorkerDatabase,
        places: Places,
        hand_over: HandOver,
    ) -> None:
        super().__init__("apoq-place-sweep", database.outage)
        self._database = database
        self._queues = {
            schema: {queue.name: queue for queue in database.queues_of(schema)} for schema in database.schemas
        }
        self._places = places
        self._hand_over = hand_over
        self._breaker: CircuitBreaker[str | None] = CircuitBreaker(_describe, database.outage)
        self._behind = dict.fromkeys(database.schemas, START)
        """For each schema, the last key or pool that was looked at."""
        self._looked_at = dict.fromkeys(database.schemas, -math.inf)
        """When each schema was looked into, by time.monotonic()."""

    def look_into(self, schema: str | None) -> None:
        """Look into a schema now, from the beginning."""
        self._behind[schema] = START
        self._looked_at[schema] = -math.inf
        self.wake()

    def look(self) -> None:
        """Look into all schemas now, on the caller's thread."""
        for schema in self._database.schemas:
            self.look_into(schema)
        while self.turn() == MORE_SECONDS:
            pass

    def turn(self) -> float | None:
        """Look into the schemas for which it is time; return when to look again."""
        now = time.monotonic()
        has_more = False
        schemas = self._database.leased_schemas()
        for schema in schemas:
            pause = self._pause(schema)
            if now >= self._looked_at[schema] + pause:
                self._looked_at[schema] = now - pause * random.uniform(0, 0.2)  # noqa: S311
                if self._breaker.call(schema, schemas, partial(self._look, schema), False):
                    self._looked_at[schema] = -math.inf
                    has_more = True
        if has_more:
            return MORE_SECONDS
        due_in = min((self._looked_at[schema] + self._pause(schema) for schema in schemas), default=now) - now
        # Not later, because the worker may meet tasks that need places in a schema for the first time.
        return max(MORE_SECONDS * 2, min(due_in, SWEEP_SECONDS)) if schemas else SWEEP_SECONDS

    def _pause(self, schema: str | None) -> float:
        is_used = not self._places.met.isdisjoint(self._queues[schema].values())
        return SWEEP_SECONDS if is_used else IDLE_SWEEP_SECONDS

    def _look(self, schema: str | None) -> bool:
        """Look at the next keys and pools of a schema; return whether there are more."""
        queues = self._queues[schema]
        behind = self._behind[schema]
        after = dict(zip(("after_queue", "after_kind", "after_name"), behind, strict=True))
        parameters = {**after, "queue_names": list(queues), "at_most": MAX_SWEPT}
        found = execute(self._database.engine, awaited(schema), parameters).fetchall()
        by_queue: dict[str, dict[Share, int]] = {}
        for name, kind, share in found:
            by_queue.setdefault(name, {})[Share(kind, share)] = 1
        for name, shares in by_queue.items():
            self._hand_over.expect(queues[name], shares)
        has_more = len(found) == MAX_SWEPT
        if self._behind[schema] is behind:  # otherwise, it must begin again
            self._behind[schema] = tuple(found[-1]) if has_more else START
        return has_more


def _describe(schema: str | None) -> str:
    return "the sweep of waiting tasks" + ("" if schema is None else f" in the schema {schema!r}")
