"""The settings of an application."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from sqlalchemy import URL

from apoq.client.queue import Queue
from apoq.core.recycling import read_max_age, read_max_memory, read_max_tasks
from apoq.core.retention import retention
from apoq.errors import ApoqError
from apoq.postgres.urls import database_url
from apoq.schema.models import DEFAULT_QUEUE
from apoq.worker.options import check_metrics, make_tracer, read_concurrency, read_interval

PREFIX: Final = "APOQ_"


def _listen_url(value: Any, name: str) -> URL | None:
    try:
        return None if value is None else database_url(value)
    except (ApoqError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from None


def _metrics(value: Any, name: str) -> Any:
    check_metrics(value, name)
    return value


def _tracing(value: Any, name: str) -> Any:
    make_tracer(value, name)
    return value


_READERS: Final[Mapping[str, Callable[[Any, str], object]]] = {
    "concurrency": read_concurrency,
    "poll_interval": read_interval,
    "lease": read_interval,
    "keep_completed": retention,
    "keep_failed": retention,
    "listen_url": _listen_url,
    "max_tasks": read_max_tasks,
    "max_memory": read_max_memory,
    "max_age": read_max_age,
    "metrics": _metrics,
    "tracing": _tracing,
}
"""The functions that read the worker's options. The worker reads them, too, but perhaps on a thread."""


@dataclass(frozen=True)
class Settings:
    """The settings ``APOQ_…`` in ``app.config``."""

    queue: str | None = None
    """The name of the queue that tasks are added to and that the worker works on."""
    schema: str | None = None
    """The schema of apoq's tables; None: the connection's own."""
    bind: str | None = None
    """The bind of apoq's tables in Flask-SQLAlchemy, or their engine in Flask-SQLAlchemy-Lite."""
    in_process_worker: bool = False
    """Whether each process that serves requests also runs a worker."""
    worker: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Other arguments of `Worker`. Not in the repr, because `listen_url` may contain a password."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """Read and check the settings. Durations may be in seconds or timedeltas, and retentions a `Keep`.

        Raises `MissingExtra` for metrics or traces whose library is not installed.
        """
        own = _given(config, ("queue", "schema", "bind", "in_process_worker"))
        worker = {
            name: _READERS[name](value, PREFIX + name.upper())
            for name, value in _given(config, _READERS).items()
        }
        settings = cls(**own, worker=worker)
        if not isinstance(settings.in_process_worker, bool):
            raise TypeError(
                f"APOQ_IN_PROCESS_WORKER must be True or False, got {settings.in_process_worker!r}"
            )
        return settings

    def make_queue(self, given: Queue | None) -> Queue:
        """Return the application's queue: `given`, or the one that the settings name."""
        if given is None:
            return Queue(DEFAULT_QUEUE if self.queue is None else self.queue, schema=self.schema)
        if self.queue is not None or self.schema is not None:
            raise ValueError(
                f"the queue must be given once, got {given!r} and also APOQ_QUEUE or APOQ_SCHEMA: remove the "
                "one or the other"
            )
        return given


def _given(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    keys = {name: PREFIX + name.upper() for name in names}
    return {name: config[key] for name, key in keys.items() if key in config}
