"""Notifies workers. A notification may be lost, and it is harmless to send one twice."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Final, NamedTuple

from sqlalchemy import Select, Text, bindparam, func, literal_column, select, text, true
from sqlalchemy.dialects.postgresql import ARRAY

CHANNEL: Final = "apoq"
CANCELLED: Final = "apoq_cancelled"
PAUSED: Final = "apoq_paused"
LIMITED: Final = "apoq_limited"
LINKED: Final = "apoq_linked"


class Notification(NamedTuple):
    """A message to all sessions that listen to a channel."""

    channel: str
    payload: str


def has_tasks(schema: str | None, queue: str) -> Notification:
    """Return the notification that a queue has new tasks."""
    return Notification(CHANNEL, payload(schema, queue))


def was_paused(schema: str | None, queue: str) -> Notification:
    """Return the notification that a queue was paused; a worker releases its tasks that have not begun."""
    return Notification(PAUSED, payload(schema, queue))


def was_limited(schema: str | None, queue: str) -> Notification:
    """Return the notification that a limit of a queue was changed."""
    return Notification(LIMITED, payload(schema, queue))


def has_links(schema: str | None) -> Notification:
    """Return the notification that a schema has edges that a worker must look at."""
    return Notification(LINKED, schema or "")


def was_cancelled(task_id: int) -> Notification:
    """Return the notification that a task was cancelled; a worker that runs a task of this id looks it up."""
    return Notification(CANCELLED, str(task_id))


def payload(schema: str | None, queue: str) -> str:
    """Return the name of a queue in notifications."""
    return queue if schema is None else f"{schema}.{queue}"


@cache
def notify() -> Select[tuple[object, ...]]:
    """Send the notifications of `channels` and `payloads`; see `arrays`.

    It must not be executed in a caller's transaction, because a commit with a notification takes a lock of
    the whole server. The transaction writes nothing else, so its commit doesn't need to wait for the disk.
    """
    flush_nothing = func.set_config(literal_column("'synchronous_commit'"), literal_column("'off'"), true())
    texts = (bindparam(name, type_=ARRAY(Text)) for name in ("channels", "payloads"))
    sent = func.unnest(*texts).table_valued("channel", "payload").render_derived("sent")
    return select(flush_nothing, func.pg_notify(sent.c.channel, sent.c.payload)).select_from(sent)


def arrays(notifications: Iterable[Notification]) -> dict[str, list[str]]:
    """Return the parameters of `notify`."""
    channels, payloads = zip(*notifications, strict=True)
    return {"channels": list(channels), "payloads": list(payloads)}


@cache
def notify_only() -> Select[tuple[object, ...]]:
    """Send one notification in a session with `FLUSH_NOTHING`, which is slightly faster than `notify`."""
    return select(func.pg_notify(bindparam("channel", type_=Text), bindparam("payload", type_=Text)))


FLUSH_NOTHING: Final = text("SET synchronous_commit = off")
"""Lets the commits of a session not wait for the disk."""
