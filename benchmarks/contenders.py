"""Who takes part, by name; each module is imported only in the processes that need it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from benchmarks.contender import Contender

_PLACES = {
    "apoq": ("benchmarks.ours", "Apoq"),
    "floor": ("benchmarks.floor", "Floor"),
    "PgQueuer asyncpg": ("benchmarks.rivals.pgqueuer", "PgQueuerAsyncpg"),
    "PgQueuer psycopg": ("benchmarks.rivals.pgqueuer", "PgQueuerPsycopg"),
    "Procrastinate": ("benchmarks.rivals.procrastinate", "Procrastinate"),
    "plain ORM": ("benchmarks.baselines", "Orm"),
    "plain psycopg": ("benchmarks.baselines", "Plain"),
    "psycopg + NOTIFY": ("benchmarks.baselines", "Notifying"),
    "plain loop": ("benchmarks.baselines", "Loop"),
}
NAMES = ("apoq", "floor", "PgQueuer asyncpg", "PgQueuer psycopg", "Procrastinate")


def contender(name: str) -> type[Contender]:
    """Answer the class of a contender."""
    module, attribute = _PLACES[name]
    found: type[Contender] = getattr(import_module(module), attribute)
    return found


def missing(name: str) -> list[str]:
    """Answer the modules for want of which a contender can't take part."""
    return [module for module in contender(name).needs if find_spec(module) is None]


def chosen(words: list[str]) -> list[str]:
    """Answer the contenders that the words of a command line mean; a beginning of a name will do."""
    names = [name for name in NAMES if any(name.lower().startswith(word.lower()) for word in words)]
    for word in words:
        if not any(name.lower().startswith(word.lower()) for name in NAMES):
            raise ValueError(f"no contender is called {word!r}: there are {', '.join(NAMES)}")
    return names
