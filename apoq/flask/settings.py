"""An application's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Self

from sqlalchemy import URL

from apoq.model import DEFAULT_QUEUE
from apoq.queue import Queue
from apoq.retry import seconds

PREFIX: Final = "APOQ_"

_DURATIONS: Final = {"poll_interval", "lease", "keep_completed", "keep_failed"}


@dataclass(frozen=True)
class Settings:
    """What ``app.config`` says under ``APOQ_…``; the options of `Worker`, unless said otherwise."""

    queue: str | None = None
    """The name of the queue that tasks are added to, and worked from."""
    schema: str | None = None
    """Where apoq's tables are, if not where the search_path leads."""
    bind: str | None = None
    """In which of Flask-SQLAlchemy's binds, or Lite's engines, they are."""
    concurrency: int = 4
    poll_interval: timedelta = timedelta(seconds=2)
    lease: timedelta = timedelta(seconds=15)
    keep_completed: timedelta | None = timedelta(days=1)
    keep_failed: timedelta | None = timedelta(days=7)
    listen_url: str | URL | None = None
    embedded_worker: bool = False
    """Whether each process that serves requests works tasks, too."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """Read them; a duration may be in seconds, as the environment has it."""
        given: dict[str, Any] = {}
        for name in cls.__annotations__:
            key = PREFIX + name.upper()
            if key in config:
                value = config[key]
                is_number = name in _DURATIONS and value is not None
                given[name] = timedelta(seconds=seconds(value, key)) if is_number else value
        settings = cls(**given)
        if not isinstance(settings.embedded_worker, bool):
            raise TypeError(f"APOQ_EMBEDDED_WORKER is True or False, not {settings.embedded_worker!r}")
        return settings

    def make_queue(self, given: Queue | None) -> Queue:
        """Answer the application's queue: the one that was given, or the one that is named here."""
        if given is None:
            return Queue(DEFAULT_QUEUE if self.queue is None else self.queue, schema=self.schema)
        if self.queue is not None or self.schema is not None:
            raise ValueError(f"Apoq has {given!r} already: leave out that one, or APOQ_QUEUE and APOQ_SCHEMA")
        return given
