"""Targets of the benchmark: ratios of medians within one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Median = Callable[[str, str, str], float | None]


@dataclass(frozen=True)
class Target:
    """A figure and its bound; the figure is divided by the best one of the contenders `against`."""

    title: str
    bound: float
    scenario: str
    figure: str
    against: tuple[str, ...] = ()
    at_least: bool = True
    over: str = ""
    """Another figure of apoq, by which the figure is divided."""

    def value(self, median: Median) -> float | None:
        mine = median(self.scenario, self.figure, "apoq")
        if mine is None:
            return None
        if self.over:
            below = median(self.scenario, self.over, "apoq")
            return mine / below if below else None
        if not self.against:
            return mine
        others = [found for name in self.against if (found := median(self.scenario, self.figure, name))]
        return mine / max(others) if others else None


_PGQUEUER = ("PgQueuer asyncpg", "PgQueuer psycopg")
_FLOOR = ("floor",)
_LEAST = False

TARGETS = (
    Target("drain, one process / the floor's", 1.0, "drain", "rate", _FLOOR),
    Target("drain, one process / PgQueuer's best", 4.0, "drain", "rate", _PGQUEUER),
    Target("drain, two processes / the floor's two", 0.85, "drain_two", "rate", _FLOOR),
    Target("task.session, 1 slot / a plain loop", 0.8, "drain_sessions", "1 slots", ("plain loop",)),
    Target(
        "task.session, 4 slots / a plain loop in 4 threads", 0.8, "drain_sessions", "4 slots", ("plain loop",)
    ),
    Target("enqueue one per transaction / plain ORM", 0.95, "enqueue", "rate", ("plain ORM",)),
    Target("32 clients with a worker / plain ORM inserts", 0.9, "enqueue_clients", "rate", ("plain ORM",)),
    Target(
        "32 clients with a worker / plain psycopg inserts", 0.9, "enqueue_clients", "rate", ("plain psycopg",)
    ),
    Target("add_many / the floor's COPY", 0.5, "enqueue_bulk", "rate", _FLOOR),
    Target("add_many / PgQueuer's best", 3.0, "enqueue_bulk", "rate", _PGQUEUER),
    Target("idle latency, p50 / the floor's", 1.5, "latency", "p50", _FLOOR, _LEAST),
    Target("idle latency, p99, ms", 5.0, "latency", "p99", (), _LEAST),
    Target("a million due tasks / without", 0.9, "backlog", "rate", over="without"),
    Target("a million tasks of other types / without", 0.9, "others_in_front", "rate", over="without"),
    Target("a million future tasks / without", 0.9, "future_in_front", "rate", over="without"),
    Target("a million finished rows / without", 0.9, "finished_rows", "rate", over="without"),
    Target("full load with the pruner / without", 0.95, "retention", "rate", over="without"),
    Target("held snapshot: last p99 / first p99", 1.5, "held_snapshot", "p99 last", (), _LEAST, "p99 first"),
    Target("idle: statements per second", 1.0, "idle", "statements", (), _LEAST),
    Target("idle: CPU, % of a core", 0.5, "idle", "CPU", (), _LEAST),
    Target("memory at rest, MB", 80.0, "memory", "at rest", (), _LEAST),
    Target(
        "memory, growth over a million tasks after warm-up, MB", 5.0, "memory", "growth, the rest", (), _LEAST
    ),
)
