"""Wake workers: a hint that a queue has something new, which may be lost and does no harm twice."""

from __future__ import annotations

from functools import cache
from typing import Final

from sqlalchemy import Select, Text, bindparam, func, select

CHANNEL: Final = "apoq"


def payload(schema: str | None, queue: str) -> str:
    """Name a queue, as hints do."""
    return queue if schema is None else f"{schema}.{queue}"


@cache
def hint() -> Select[tuple[object, ...]]:
    """Notify the workers of a queue; on another `channel` than theirs, only whoever listens there.

    Not to be executed in a caller's transaction: a commit that notifies takes a lock that the
    whole server has once. Nothing is written but the notification, so there is nothing to flush either.
    """
    return select(
        func.set_config("synchronous_commit", "off", True),
        func.pg_notify(bindparam("channel", CHANNEL, type_=Text), bindparam("payload", type_=Text)),
    )
