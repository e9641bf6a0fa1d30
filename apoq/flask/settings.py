"""An application's settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Self

from apoq.client.queue import Queue
from apoq.core.retry import seconds
from apoq.schema.models import DEFAULT_QUEUE

PREFIX: Final = "APOQ_"

_DURATIONS: Final = ("poll_interval", "lease", "keep_completed", "keep_failed")


@dataclass(frozen=True)
class Settings:
    """What ``app.config`` says under ``APOQ_…``."""

    queue: str | None = None
    """The name of the queue that tasks are added to, and worked from."""
    schema: str | None = None
    """Where apoq's tables are, if not where the search_path leads."""
    bind: str | None = None
    """In which of Flask-SQLAlchemy's binds, or Lite's engines, they are."""
    in_process_worker: bool = False
    """Whether each process that serves requests works tasks, too."""
    worker: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What else a `Worker` is told; its `listen_url` may have a password in it."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """Read them; a duration may be in seconds, as the environment has it."""
        own = _given(config, ("queue", "schema", "bind", "in_process_worker"))
        worker = _given(config, ("concurrency", "listen_url"))
        for name, value in _given(config, _DURATIONS).items():
            key = PREFIX + name.upper()
            worker[name] = None if value is None else timedelta(seconds=seconds(value, key))
        settings = cls(**own, worker=worker)
        if not isinstance(settings.in_process_worker, bool):
            raise TypeError(f"APOQ_IN_PROCESS_WORKER is True or False, not {settings.in_process_worker!r}")
        return settings

    def make_queue(self, given: Queue | None) -> Queue:
        """Answer the application's queue: the one that was given, or the one that is named here."""
        if given is None:
            return Queue(DEFAULT_QUEUE if self.queue is None else self.queue, schema=self.schema)
        if self.queue is not None or self.schema is not None:
            raise ValueError(f"Apoq has {given!r} already: leave out that one, or APOQ_QUEUE and APOQ_SCHEMA")
        return given


def _given(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    keys = {name: PREFIX + name.upper() for name in names}
    return {name: config[key] for name, key in keys.items() if key in config}
