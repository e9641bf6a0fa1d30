"""Notifies workers. A notification may be lost, and it is harmless to send one twice."""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

from sqlalchemy import Select, Text, bindparam, func, literal_column, select, text, true

CHANNEL: Final = "apoq"
CANCELLED: Final = "apoq_cancelled"


class Notification(NamedTuple):
    """A message to all sessions that listen to a channel."""

    channel: str
    payload: str


def has_tasks(schema: str | None, queue: str) -> Notification:
    """Return the notification that a queue has new tasks."""
    return Notification(CHANNEL, payload(schema, queue))


def was_cancelled(task_id: int) -> Notification:
    """Return the notification that a task was cancelled; a worker that runs a task of this id looks it up."""
    return Notification(CANCELLED, str(task_id))


def payload(schema: str | None, queue: str) -> str:
    """Return the name of a queue in notifications."""
    return queue if schema is None else f"{schema}.{queue}"


@cache
def notify() -> Select[tuple[object, ...]]:
    """Notify the sessions that listen to `channel`.

    It must not be executed in a caller's transaction, because a commit with a notification takes a lock of
    the whole server. The transaction writes nothing else, so its commit doesn't need to wait for the disk.
    """
    flush_nothing = func.set_config(literal_column("'synchronous_commit'"), literal_column("'off'"), true())
    return select(flush_nothing, *notify_only().selected_columns)


@cache
def notify_only() -> Select[tuple[object, ...]]:
    """Notify in a session with `FLUSH_NOTHING`, which is slightly faster than `notify`."""
    return select(func.pg_notify(bindparam("channel", type_=Text), bindparam("payload", type_=Text)))


FLUSH_NOTHING: Final = text("SET synchronous_commit = off")
"""Lets the commits of a session not wait for the disk."""
