"""The interface of something that counts a worker's tasks, such as its metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from apoq.worker.execution.attempt import Claimed


class Observer(Protocol):
    """Counts what a worker does; called on the worker's threads, so each call must be quick."""

    def ran(self, row: Claimed, seconds: float, number: int) -> None:
        """Note that an attempt has just ended, after so many seconds.

        It stands for a `number` of them: if there are thousands per second, only some are observed.
        """

    def settled(self, outcome: str, rows: Sequence[Claimed]) -> None:
        """Note that the outcome of these attempts is committed."""

    def reset(self) -> None:
        """Begin at zero, in a forked child, where another thread may have held a lock at the fork."""

    def claimed(self, seconds: float) -> None:
        """Note that tasks were claimed within so many seconds."""


class MetricsRegistry(Protocol):
    """A registry of metrics: prometheus-client's `CollectorRegistry`."""

    def register(self, collector: Any) -> None:
        """Add a collector of metrics."""

    def collect(self) -> Iterable[Any]:
        """Return all metrics."""
