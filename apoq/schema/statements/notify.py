"""Tell workers something: a notification, which may be lost and does no harm twice."""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

from sqlalchemy import Select, Text, bindparam, func, literal_column, select, text, true

CHANNEL: Final = "apoq"
CANCELLED: Final = "apoq_cancelled"


class Notification(NamedTuple):
    """What is told to whoever listens to a channel."""

    channel: str
    payload: str


def has_tasks(schema: str | None, queue: str) -> Notification:
    """Tell that a queue has something new."""
    return Notification(CHANNEL, payload(schema, queue))


def was_cancelled(task_id: int) -> Notification:
    """Tell that a task was cancelled; who runs one of this id looks it up."""
    return Notification(CANCELLED, str(task_id))


def payload(schema: str | None, queue: str) -> str:
    """Name a queue, as notifications do."""
    return queue if schema is None else f"{schema}.{queue}"


@cache
def notify() -> Select[tuple[object, ...]]:
    """Notify whoever listens to `channel`.

    Not to be executed in a caller's transaction: a commit that notifies takes a lock that the
    whole server has once. Nothing is written but the notification, so there is nothing to flush either.
    """
    flush_nothing = func.set_config(literal_column("'synchronous_commit'"), literal_column("'off'"), true())
    return select(flush_nothing, *notify_only().selected_columns)


@cache
def notify_only() -> Select[tuple[object, ...]]:
    """Do the same in a session that flushes nothing anyway: it is heard a little sooner."""
    return select(func.pg_notify(bindparam("channel", type_=Text), bindparam("payload", type_=Text)))


FLUSH_NOTHING: Final = text("SET synchronous_commit = off")
"""Makes a session such a one."""
