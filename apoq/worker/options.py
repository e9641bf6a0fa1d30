"""The options of a worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib import import_module

from sqlalchemy import URL

from apoq.core.imported import Importable
from apoq.core.recycling import StopReason, read_max_age, read_max_memory, read_max_tasks
from apoq.core.retention import Keep, keep, retention
from apoq.core.retry import duration
from apoq.errors import glimpse
from apoq.tracing import CHILD, LINK, Tracer


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """The options of a `Worker`. Durations may be given in seconds, and are stored as timedeltas.

    Raises ValueError or TypeError if an option is invalid.
    """

    concurrency: int
    """Number of tasks that run at once."""
    poll_interval: timedelta
    """Time between two polls of an idle worker."""
    lease: timedelta
    """Time after which other workers take over the tasks of a worker that has died."""
    keep_completed: timedelta | Keep | None
    """Time after which completed tasks are deleted, and how many are kept; None: no limit."""
    keep_failed: timedelta | Keep | None
    """The same for failed and cancelled tasks."""
    release: datetime
    """When the worker's code was deployed."""
    listen_url: str | URL | None = field(repr=False)
    """URL of the connection for notifications. Not in the repr, because it may contain a password."""
    max_tasks: int | None = None
    """Number of attempts after which the process should be replaced; None: no limit."""
    max_memory: int | None = None
    """Bytes of memory at which it should be replaced; a text such as "512M" is read."""
    max_age: timedelta | None = None
    """Time after which it should be replaced."""
    isolated_engine: Importable | None = None
    """The function that makes the engine in a process of isolated tasks."""

    def __post_init__(self) -> None:
        read_concurrency(self.concurrency)
        for name in ("poll_interval", "lease"):
            object.__setattr__(self, name, read_interval(getattr(self, name), name))
        if not isinstance(self.release, datetime) or self.release.utcoffset() is None:
            raise TypeError(
                "release must be the time of the deployment, a datetime with a time zone, got "
                f"{glimpse(self.release)}"
            )
        for name in ("keep_completed", "keep_failed"):
            object.__setattr__(self, name, retention(getattr(self, name), name))
        for name, read in (
            ("max_tasks", read_max_tasks),
            ("max_memory", read_max_memory),
            ("max_age", read_max_age),
        ):
            object.__setattr__(self, name, read(getattr(self, name)))

    @property
    def limits(self) -> dict[StopReason, float]:
        """The limits of the process that were given."""
        given = {
            StopReason.MAX_TASKS: self.max_tasks,
            StopReason.MAX_MEMORY: self.max_memory,
            StopReason.MAX_AGE: None if self.max_age is None else self.max_age.total_seconds(),
        }
        return {limit: most for limit, most in given.items() if most is not None}

    @property
    def keeps_completed(self) -> bool:
        """Whether a completed task is kept for some time, instead of being deleted at once."""
        return keep(self.keep_completed).length != timedelta()


def read_concurrency(number: int, name: str = "concurrency") -> int:
    """Return a number of tasks; ValueError if it is not one. `name` is the option or the setting."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{name} must be a number of tasks, 1 or more, got {number!r}")
    return number


def read_interval(value: float | timedelta, name: str) -> timedelta:
    """Return a positive duration as a timedelta; TypeError or ValueError if it is not one."""
    interval = duration(value, name)
    if not interval:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return interval


def check_metrics(metrics: object, name: str = "metrics") -> None:
    """Raise `TypeError` if metrics can't go there, and `MissingExtra` without prometheus-client.

    `name` is the option or the setting, for the message.
    """
    if metrics is not False:
        # Imported here, because prometheus-client is an extra.
        import_module("apoq.metrics.worker").check(metrics, name)


def make_tracer(tracing: object, name: str = "tracing") -> Tracer | None:
    """Return what begins the spans of attempts, or None if `tracing` is False.

    Raises `ValueError` for any other value than True, "link" or "child", and `MissingExtra` without
    opentelemetry-api. `name` is the option or the setting, for the message.
    """
    match tracing:
        case False:
            return None
        case True | "link":
            return Tracer(LINK)
        case "child":
            return Tracer(CHILD)
    raise ValueError(f'{name} must be True, False, "link" or "child", got {glimpse(tracing)}')
