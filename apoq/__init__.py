"""A PostgreSQL Queue for processing background tasks, with a focus on simplicity and reliability."""

from apoq.databases import database_url
from apoq.errors import (
    ApoqError,
    InvalidData,
    InvalidProcessor,
    InvalidTask,
    InvalidURL,
    MismatchedData,
    NotPrepared,
    SessionMisused,
    UnsupportedDatabase,
    UnsupportedSession,
)
from apoq.migrations import prepare
from apoq.model import Task
from apoq.outcomes import Cancel, Retry, Snooze
from apoq.queue import Queue
from apoq.retry import exponential_backoff
from apoq.typed import TypedTask
from apoq.worker import AsyncRunningTask, RunningTask, Worker

__all__ = [
    "ApoqError",
    "AsyncRunningTask",
    "Cancel",
    "InvalidData",
    "InvalidProcessor",
    "InvalidTask",
    "InvalidURL",
    "MismatchedData",
    "NotPrepared",
    "Queue",
    "Retry",
    "RunningTask",
    "SessionMisused",
    "Snooze",
    "Task",
    "TypedTask",
    "UnsupportedDatabase",
    "UnsupportedSession",
    "Worker",
    "database_url",
    "exponential_backoff",
    "prepare",
]
