"""The metrics that one exporter reads from the database."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.metrics.reader import REASONS, Reader
from apoq.monitor.stats import Figures, QueueFigures
from apoq.postgres.urls import check_engine, check_untranslated, sync_side
from apoq.schema.statements.count import COUNTED

TIMEOUT_SECONDS: Final = 2.0
"""Seconds that a scrape waits for the database."""

STATES: Final = (
    *("ready", "scheduled", "retrying", "waiting", "running"),
    *("completed", "failed", "cancelled"),
)
"""Pending tasks are ready, scheduled or retrying, as in `apoq stats`."""

_COUNTED_TOGETHER: Final = (("scheduled", "retrying"), ("failed", "cancelled"))

MAX_REMEMBERED: Final = 1_000
"""Queues that are exported as 0 after their last task was deleted."""


class DatabaseMetrics(Collector):
    """Metrics of the queues, the tasks and the workers of a database.

    Counts end at 10,000, so a scrape reads a bounded number of index entries, however large the tables are.
    """

    def __init__(
        self, engine: Engine | AsyncEngine, schema: str | None = None, *, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        """Create the metrics. Each scrape opens a connection, and closes it.

        Args:
            engine: The engine of the database.
            schema: The schema of apoq's tables; None for the connection's own.
            timeout: Seconds that a scrape waits for the database. If the database doesn't respond by then,
                there is only ``apoq_database_up 0``.
        """
        if not isinstance(engine, Engine | AsyncEngine):
            raise TypeError(f"engine must be an Engine or an AsyncEngine, got {type(engine).__qualname__}")
        check_engine(engine)
        check_untranslated(engine.get_execution_options(), schema)
        self._reader = Reader(sync_side(engine), schema, timeout)
        self._queues: dict[str, None] = {}
        self._lock = threading.Lock()

    def describe(self) -> list[Metric]:
        """Return nothing, so that the registry doesn't read the database when this is added."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read the database, and return what was read within the timeout."""
        reading = self._reader.read()
        yield GaugeMetricFamily(
            "apoq_database_up",
            "Whether everything could be read from the database.",
            float(reading.is_complete),
        )
        if reading.figures is not None:
            yield from self._queue_metrics(reading.figures, reading.waiting)
            yield from _other_metrics(reading.figures)
        if reading.schedule_late is not None:
            text = "How late the latest schedule is."
            yield GaugeMetricFamily("apoq_schedule_late_seconds", text, reading.schedule_late)
        if reading.dead_tuples is not None:
            text = "Dead rows of the task table, about."
            yield GaugeMetricFamily("apoq_dead_tuples", text, reading.dead_tuples)

    def _queue_metrics(self, found: Figures, waiting: dict[str, dict[str, int]]) -> Iterator[Metric]:
        known = {queue.name: queue for queue in found.queues}
        tasks = _gauge("apoq_tasks", "Tasks, counted up to 10,000.", "queue", "state")
        bounded = _gauge(
            "apoq_tasks_bounded", "Whether there may be more tasks than were counted.", "queue", "state"
        )
        lag = _gauge("apoq_lag_seconds", "For how long the oldest ready task has been due.", "queue")
        waits = _gauge("apoq_waiting", "Waiting tasks, by the reason.", "queue", "reason")
        paused = _gauge("apoq_queue_paused", "Whether the whole queue is paused.", "queue")
        are_paused = {pause.queue for pause in found.pauses if pause.type is None}
        for name in self._remembered(found):
            queue = known.get(name)
            for state in STATES:
                tasks.add_metric([name, state], min(_count(queue, state), COUNTED))
                bounded.add_metric([name, state], float(_is_bounded(queue, state)))
            lag.add_metric([name], 0.0 if queue is None else queue.lag or 0.0)
            for reason in REASONS:
                waits.add_metric([name, reason], waiting.get(name, {}).get(reason, 0))
            paused.add_metric([name], float(name in are_paused))
        yield from (tasks, bounded, lag, waits, paused)

    def _remembered(self, found: Figures) -> list[str]:
        """Return also queues of which nothing is left, because they are at 0, not at their last value.

        If not all queues were read, those that are not among them may have tasks.
        """
        with self._lock:
            if found.has_more_queues:
                self._queues.clear()
            for queue in found.queues:
                self._queues.pop(queue.name, None)
                self._queues[queue.name] = None
            while len(self._queues) > MAX_REMEMBERED:
                del self._queues[next(iter(self._queues))]
            return list(self._queues)


def database_registry(
    engine: Engine | AsyncEngine, schema: str | None = None, *, timeout: float = TIMEOUT_SECONDS
) -> CollectorRegistry:
    """Return a new registry with the database's metrics, for `exposition`.

    Args:
        engine: The engine of the database. Each scrape opens a connection of its own, and closes it.
        schema: The schema of apoq's tables; None for the connection's own.
        timeout: Seconds that a scrape waits for the database.
    """
    registry = CollectorRegistry()
    registry.register(DatabaseMetrics(engine, schema, timeout=timeout))
    return registry


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=labels)


def _other_metrics(found: Figures) -> Iterator[Metric]:
    alive = sum(worker.is_alive for worker in found.workers)
    yield GaugeMetricFamily("apoq_workers_alive", "Workers that are alive.", alive)
    text = "Size of the task table and its indexes on disk."
    yield GaugeMetricFamily("apoq_table_bytes", text, found.bytes)


def _count(queue: QueueFigures | None, state: str) -> int:
    count: int = 0 if queue is None else getattr(queue, state)
    return count


def _is_bounded(queue: QueueFigures | None, state: str) -> bool:
    together = next((states for states in _COUNTED_TOGETHER if state in states), (state,))
    return sum(_count(queue, each) for each in together) > COUNTED
