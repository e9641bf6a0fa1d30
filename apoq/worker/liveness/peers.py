"""Which of the other workers are dead: decided from what this one has seen of them, without a database."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple
from uuid import UUID

GONE_SHARE_OF_GRACE: Final = 0.5
"""The share of its grace for which a worker is looked at whose connection is gone, another sign of death."""


class Peer(NamedTuple):
    """Another worker that holds claims, as a heartbeat finds it; see `beat_and_look`."""

    id: UUID
    heartbeat: float | None
    """None: it has claims, but no row."""
    grace: float | None
    left: float | None
    """Seconds until it counts as dead, by the database's clock."""
    is_gone: bool
    """Whether its connection is gone."""
    is_long_gone: bool


@dataclass(frozen=True, slots=True)
class _Sighting:
    heartbeat: float | None
    since: float


class Peers:
    """Looks at the other workers again and again, and finds those that have died.

    A clock may be set, and the database's is the one by which a lease ends. So a worker is dead only if it
    was seen with the same last heartbeat before, its grace ago by this process's own monotonic clock: then it
    had the time to show that it is alive.
    """

    def __init__(self, grace: float) -> None:
        """`grace` (seconds) is for those that have no row, and so no grace of their own."""
        self._grace = grace
        self._sightings: dict[UUID, _Sighting] = {}

    def forget(self) -> None:
        """Begin to look from the start: while this worker was away, the others may have been away as well."""
        self._sightings.clear()

    def look(self, peers: Iterable[Peer], now: float) -> tuple[list[UUID], float]:
        """Return those that are dead, and the seconds until the next may turn out to be dead.

        `now` is that of time.monotonic().
        """
        dead: list[UUID] = []
        next_death = math.inf
        sightings: dict[UUID, _Sighting] = {}
        for peer in peers:
            sighting = self._sightings.get(peer.id)
            if sighting is None or sighting.heartbeat != peer.heartbeat:
                sighting = _Sighting(peer.heartbeat, now)
            sightings[peer.id] = sighting
            wait = self._grace if peer.grace is None else peer.grace
            if peer.is_gone:
                wait *= GONE_SHARE_OF_GRACE
            left = max(peer.left or 0.0, sighting.since + wait - now)
            if left <= 0:
                dead.append(peer.id)
            else:
                next_death = min(next_death, left)
        self._sightings = sightings
        return dead, next_death
