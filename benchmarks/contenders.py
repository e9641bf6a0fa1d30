"""The contenders by name; each module is imported only in the processes that need it."""

from __future__ import annotations

from importlib import import_module

from benchmarks.contender import Contender

_PLACES = {
    "apoq": ("benchmarks.ours", "Apoq"),
    "floor": ("benchmarks.floor", "Floor"),
    "PgQueuer asyncpg": ("benchmarks.rivals.pgqueuer", "PgQueuerAsyncpg"),
    "PgQueuer psycopg": ("benchmarks.rivals.pgqueuer", "PgQueuerPsycopg"),
    "Procrastinate": ("benchmarks.rivals.procrastinate", "Procrastinate"),
    "Graphile Worker": ("benchmarks.rivals.graphile", "GraphileWorker"),
    "apoq, 200 queues": ("benchmarks.many", "ManyQueues"),
    "apoq, 200 schemas": ("benchmarks.many", "ManySchemas"),
    "plain ORM": ("benchmarks.baselines", "Orm"),
    "plain psycopg": ("benchmarks.baselines", "Plain"),
    "psycopg + NOTIFY": ("benchmarks.baselines", "Notifying"),
    "plain loop": ("benchmarks.baselines", "Loop"),
}
NAMES = ("apoq", "floor", "PgQueuer asyncpg", "PgQueuer psycopg", "Procrastinate", "Graphile Worker")
FAST = tuple(name for name in NAMES if name != "Procrastinate")
"""The contenders that can keep up with such a load on two cores."""


def contender(name: str) -> type[Contender]:
    """Return the class of a contender."""
    module, attribute = _PLACES[name]
    found: type[Contender] = getattr(import_module(module), attribute)
    return found


def chosen(words: list[str]) -> list[str]:
    """Return the contenders that are given on the command line, by a name or its beginning."""
    names = [name for name in NAMES if any(name.lower().startswith(word.lower()) for word in words)]
    for word in words:
        if not any(name.lower().startswith(word.lower()) for name in NAMES):
            raise ValueError(f"unknown contender {word!r}: choose from {', '.join(NAMES)}")
    return names
