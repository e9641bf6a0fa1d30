"""The settings of an application, in its ini file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from typing import Any, Final, TypeVar

from pyramid.exceptions import ConfigurationError
from pyramid.settings import aslist, truthy

from apoq.client.queue import Queue
from apoq.core.durations import read_duration
from apoq.core.recycling import read_max_memory
from apoq.core.retention import MOST, Keep
from apoq.errors import ApoqError, glimpse
from apoq.postgres.urls import database_url
from apoq.tracing import CHILD, LINK
from apoq.worker.options import check_metrics, make_tracer

PREFIX: Final = "apoq."

T = TypeVar("T")


class Misconfigured(ApoqError, ConfigurationError):  # type: ignore[misc]  # Pyramid has no types
    """An invalid application, setting or processor. The message says how to fix it."""


_FALSY: Final = {"f", "false", "n", "no", "off", "0", ""}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings whose names begin with ``apoq.``."""

    session: str = "dbsession"
    """The name of the request's attribute that is the SQLAlchemy session."""
    queue: str = "default"
    """The queue that `request.apoq.add` adds to."""
    queues: tuple[str, ...] = ()
    """The queues that the worker works on; empty: only `queue`."""
    schema: str | None = None
    """The schema of apoq's tables; None: the connection's own."""
    base_url: str | None = None
    """The start of the URLs that `request.route_url` returns in a processor."""
    in_process_worker: bool = False
    """Whether each process that serves requests also runs a worker."""
    worker: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Other arguments of `Worker`. Not in the repr, because `listen_url` may contain a password."""

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Settings:
        """Read and check an application's settings; raise `Misconfigured` if one is unknown or invalid."""
        given = {
            name.removeprefix(PREFIX): value for name, value in settings.items() if name.startswith(PREFIX)
        }
        known = {name: _read(name, given.pop(name), read) for name, read in READERS.items() if name in given}
        for unknown in given:
            raise Misconfigured(f"{PREFIX}{unknown} is not a setting of apoq{_suggestion(unknown)}")
        own = {name.name for name in fields(cls)}
        return cls(
            **{name: value for name, value in known.items() if name in own},
            worker={name: value for name, value in known.items() if name not in own},
        )

    def make_queue(self) -> Queue:
        """Create the queue that requests add to."""
        return Queue(self.queue, schema=self.schema)

    def make_queues(self) -> list[Queue]:
        """Create the queues that a worker works on."""
        return [Queue(name, schema=self.schema) for name in self.queues or [self.queue]]


def _suggestion(unknown: str) -> str:
    for name in get_close_matches(unknown, READERS, 1):
        return f": did you mean {PREFIX}{name}?"
    return f": it must be one of {', '.join(PREFIX + name for name in READERS)}"


def _read(name: str, value: Any, read: Callable[[Any], T]) -> T:
    try:
        return read(value)
    except ApoqError as error:
        raise Misconfigured(f"{PREFIX}{name}: {error}") from None
    except ValueError as error:
        raise Misconfigured(f"{PREFIX}{name} {error}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must not be empty: remove it, or give it a value")
    return value.strip()


def _attribute(value: Any) -> str:
    if not (isinstance(value, str) and value.isidentifier()):
        raise ValueError(f"must be the name of a request's attribute, such as dbsession, got {value!r}")
    return value


def _names(value: Any) -> tuple[str, ...]:
    names = [name for part in aslist(value) for name in part.split(",") if name]
    if not names:
        raise ValueError("must not be empty: remove it, or list the queues that the worker works on")
    for name in names:
        Queue(name)
    return tuple(names)


def _queue(value: Any) -> str:
    return Queue(_text(value)).name


def _schema(value: Any) -> str | None:
    return Queue(schema=_text(value)).schema


def _boolean(value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in truthy and text not in _FALSY:
        raise ValueError(f"must be true or false, got {value!r}")
    return text in truthy


def _number(value: Any) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"\s*[1-9]\d{0,8}\s*", str(value)):
        raise ValueError(f"must be a number of tasks, 1 or more, got {value!r}")
    return int(value)


def _duration(value: Any) -> timedelta:
    if isinstance(value, timedelta):
        if value < timedelta():
            raise ValueError(f"must not be negative, got {value!r}")
        return value
    try:
        return read_duration(str(value).lower())
    except (ValueError, OverflowError):
        raise ValueError(
            f"must be a duration, such as 30 s, 10 minutes, 12 h or 7 days, got {value!r}"
        ) from None


def _interval(value: Any) -> timedelta:
    duration = _duration(value)
    if duration <= timedelta():
        raise ValueError(f"must be positive, got {value!r}")
    return duration


def _retention(value: Any) -> timedelta | Keep | None:
    """Read a time, such as 7 days or forever, and perhaps a number: 7 days, at most 100,000."""
    if isinstance(value, Keep):
        return value
    time, comma, number = str(value).strip().lower().partition(", at most ")
    length = None if value is None or time.strip() == "forever" else _duration(time if comma else value)
    if not comma:
        return length
    try:
        return Keep(length, int(re.sub(r"[\s,]", "", number)))
    except ValueError:
        raise ValueError(
            f"must have a number of tasks from 1 to {MOST:,}, such as 7 days, at most 100,000, got {value!r}"
        ) from None


def _memory(value: Any) -> int | None:
    try:
        return read_max_memory(value)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error).removeprefix("max_memory ")) from None


def _base_url(value: Any) -> str:
    if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", _text(value)):
        raise ValueError(f"must be the start of your site's URLs, such as https://example.com, got {value!r}")
    return _text(value).rstrip("/")


def _metrics(value: Any) -> Any:
    """Read whether the worker has metrics; a program may also pass the registry that they are added to."""
    found = _boolean(value) if isinstance(value, str | bool) else value
    try:
        check_metrics(found)
    except TypeError:
        raise ValueError(
            f"must be true or false, or a CollectorRegistry in the Configurator's settings, got "
            f"{glimpse(value)}"
        ) from None
    return found


def _tracing(value: Any) -> bool | str:
    text = str(value).strip().lower()
    if text not in {LINK, CHILD, *truthy, *_FALSY}:
        raise ValueError(f"must be link, child, true or false, got {value!r}")
    found = text if text in {LINK, CHILD} else text in truthy
    make_tracer(found)
    return found


def _database_url(value: Any) -> str:
    return database_url(_text(value)).render_as_string(hide_password=False)


READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "session": _attribute,
    "queue": _queue,
    "queues": _names,
    "schema": _schema,
    "base_url": _base_url,
    "in_process_worker": _boolean,
    "concurrency": _number,
    "poll_interval": _interval,
    "lease": _interval,
    "keep_completed": _retention,
    "keep_failed": _retention,
    "listen_url": _database_url,
    "max_tasks": _number,
    "max_memory": _memory,
    "max_age": _interval,
    "metrics": _metrics,
    "tracing": _tracing,
}
"""The functions that read the settings, by name."""
