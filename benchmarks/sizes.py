"""The sizes of all scenarios, with one scale for all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Numbers of tasks, and seconds."""

    each: int = 3_000
    clients: int = 32
    client_processes: int = 4
    client_seconds: float = 5.0
    bulk: int = 50_000
    add_times: int = 2_000
    drain: int = 100_000
    sessions: int = 5_000
    busy_seconds: float = 4.0
    idle_adds: int = 500
    idle_interval: float = 0.02
    load_seconds: float = 8.0
    steady_seconds: float = 15.0
    many_adds: int = 200
    many_interval: float = 0.1
    front: int = 1_000_000
    first: int = 20_000
    held_seconds: float = 600.0
    others_held_seconds: float = 90.0
    held_rate: float = 1_000.0
    idle_seconds: float = 20.0
    memory: int = 1_000_000
    cost: int = 20_000
    cost_each: int = 1_000

    def scaled(self, scale: float) -> Sizes:
        """Return sizes for about `scale` times the duration."""

        def tasks(count: int, least: int) -> int:
            return max(least, round(count * scale))

        return Sizes(
            each=tasks(self.each, 50),
            clients=self.clients,
            client_processes=self.client_processes,
            client_seconds=max(0.5, self.client_seconds * scale),
            bulk=tasks(self.bulk, 500),
            add_times=tasks(self.add_times, 50),
            drain=tasks(self.drain, 1_000),
            sessions=tasks(self.sessions, 100),
            busy_seconds=max(0.3, self.busy_seconds * scale),
            idle_adds=tasks(self.idle_adds, 20),
            idle_interval=self.idle_interval,
            load_seconds=max(1.0, self.load_seconds * scale),
            steady_seconds=max(1.0, self.steady_seconds * scale),
            many_adds=tasks(self.many_adds, 20),
            many_interval=self.many_interval,
            front=tasks(self.front, 2_000),
            first=tasks(self.first, 1_000),
            held_seconds=max(2.0, self.held_seconds * scale),
            others_held_seconds=max(2.0, self.others_held_seconds * scale),
            held_rate=self.held_rate,
            idle_seconds=max(4.0, self.idle_seconds * scale),
            memory=tasks(self.memory, 2_000),
            cost=tasks(self.cost, 500),
            cost_each=tasks(self.cost_each, 50),
        )
