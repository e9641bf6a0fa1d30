"""A PostgreSQL queue for processing background tasks, with a focus on simplicity and reliability.

Public are the names in `__all__` here and the modules `apoq.events`, `apoq.metrics`, `apoq.migrations`,
`apoq.testing`, `apoq.embedded`, `apoq.dashboard`, `apoq.flask`, `apoq.pyramid` and `apoq.fastapi`. All other
modules are private.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Final

NO_LIBPQ: Final = (
    "psycopg can't be imported, because PostgreSQL's client library (libpq) is missing: "
    'pip install "apoq[binary]", or install libpq on this system'
)

try:
    import psycopg as _psycopg  # noqa: F401
except ImportError as error:
    HAS_LIBPQ = False  # the command line can still be imported, and reports what is missing
    _cause = error

    def __getattr__(name: str) -> object:
        """Raise ImportError for the names that need libpq."""
        if name in __all__:
            raise ImportError(NO_LIBPQ) from _cause
        raise AttributeError(name)
else:
    HAS_LIBPQ = True
    from apoq.client.groups import Group
    from apoq.client.progress import Progress
    from apoq.client.queue import Queue
    from apoq.client.queue_bulk import RetriedMany
    from apoq.client.results import Result
    from apoq.client.typed_task import TypedTask
    from apoq.core.failures import TaskFailure
    from apoq.core.limits import Limit
    from apoq.core.outcomes import Cancel, Fail, Retry, Snooze
    from apoq.core.recycling import StopReason
    from apoq.core.retention import Keep
    from apoq.core.retry import exponential_backoff
    from apoq.errors import (
        ApoqError,
        DuplicateTask,
        InvalidArguments,
        InvalidData,
        InvalidLimit,
        InvalidProcessor,
        InvalidSchedule,
        InvalidTask,
        InvalidURL,
        MissingExtra,
        NoResult,
        SchemaMismatch,
        SessionMisused,
        TaskGone,
        UnsupportedDatabase,
        UnsupportedSession,
        WaitTimeout,
    )
    from apoq.migrations import prepare
    from apoq.postgres.urls import database_url
    from apoq.schema.models import Schedule, Task

    if TYPE_CHECKING:
        from apoq.worker import AsyncRunningTask, RunningTask, Worker

    def __getattr__(name: str) -> object:
        """Import the worker when it is first used: a program that only adds tasks doesn't need it."""
        if name not in {"AsyncRunningTask", "RunningTask", "Worker"}:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found: object = getattr(import_module("apoq.worker"), name)
        globals()[name] = found
        return found


__all__ = [
    "ApoqError",
    "AsyncRunningTask",
    "Cancel",
    "DuplicateTask",
    "Fail",
    "Group",
    "InvalidArguments",
    "InvalidData",
    "InvalidLimit",
    "InvalidProcessor",
    "InvalidSchedule",
    "InvalidTask",
    "InvalidURL",
    "Keep",
    "Limit",
    "MissingExtra",
    "NoResult",
    "Progress",
    "Queue",
    "Result",
    "RetriedMany",
    "Retry",
    "RunningTask",
    "Schedule",
    "SchemaMismatch",
    "SessionMisused",
    "Snooze",
    "StopReason",
    "Task",
    "TaskFailure",
    "TaskGone",
    "TypedTask",
    "UnsupportedDatabase",
    "UnsupportedSession",
    "WaitTimeout",
    "Worker",
    "database_url",
    "exponential_backoff",
    "prepare",
]
