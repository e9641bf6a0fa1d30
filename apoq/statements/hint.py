"""Tell workers something: a hint, which may be lost and does no harm twice."""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

from sqlalchemy import Select, Text, bindparam, func, literal_column, select, true

CHANNEL: Final = "apoq"
CANCELLED: Final = "apoq_cancelled"


class Hint(NamedTuple):
    """What is told to whoever listens to a channel."""

    channel: str
    payload: str


def has_tasks(schema: str | None, queue: str) -> Hint:
    """Tell that a queue has something new."""
    return Hint(CHANNEL, payload(schema, queue))


def was_cancelled(task_id: int) -> Hint:
    """Tell that a task was cancelled; who runs one of this id looks it up."""
    return Hint(CANCELLED, str(task_id))


def payload(schema: str | None, queue: str) -> str:
    """Name a queue, as hints do."""
    return queue if schema is None else f"{schema}.{queue}"


@cache
def hint() -> Select[tuple[object, ...]]:
    """Notify whoever listens to `channel`.

    Not to be executed in a caller's transaction: a commit that notifies takes a lock that the
    whole server has once. Nothing is written but the notification, so there is nothing to flush either.
    """
    return select(
        func.set_config(literal_column("'synchronous_commit'"), literal_column("'off'"), true()),
        func.pg_notify(bindparam("channel", type_=Text), bindparam("payload", type_=Text)),
    )
