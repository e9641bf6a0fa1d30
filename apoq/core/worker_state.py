"""The state of a worker, for its metrics."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class WorkerState(NamedTuple):
    """The state of a worker."""

    series: Collection[tuple[str, str]]
    """The queues and types that it has processors for."""
    slots: int
    """How many tasks it can run at once."""
    busy: int
    """How many it runs now."""
    heartbeat_age: float
    """Seconds since its last heartbeat; 0 before the first."""
    place_conflicts: int
    """How often another worker had given away the same place of a key or pool."""
    is_connected: bool
    """Whether it reaches the database."""
