"""The methods of a queue for its limits."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, NamedTuple, overload

from apoq.client.operations import limits, set_limit
from apoq.client.queue_base import QueueBase
from apoq.client.session_adapters import AsyncioSession, SyncSession, through
from apoq.client.session_first import session_first
from apoq.core.limits import check_at_most, checked_key
from apoq.core.payload import check_type
from apoq.errors import InvalidLimit


class LimitInForce(NamedTuple):
    """A limit of a queue, as it is in the database.

    Attributes:
        type (str | None): The type whose tasks are limited; None for the limit of a queue or a single key.
        key (str | None): The single key that is limited.
        at_most (int | None): How many tasks may run at once; None if the limit is no longer in force.
        declared (int | None): The number that the code declares, for which another one may have been set.
        is_of_key (bool): Whether the number counts for each key.
        is_strict (bool): Whether the tasks of each key run in the order in which they were added.
        holds (bool): Whether a failed task holds up the others of its key.
    """

    type: str | None
    key: str | None
    at_most: int | None
    declared: int | None
    is_of_key: bool
    is_strict: bool
    holds: bool


class QueueLimits(QueueBase):
    """The limits of a queue."""

    @overload
    def limit(
        self,
        session: SyncSession,
        at_most: int | None,
        *,
        type: str | None = ...,
        key: str | int | None = ...,
    ) -> None: ...
    @overload
    def limit(
        self,
        session: AsyncioSession,
        at_most: int | None,
        *,
        type: str | None = ...,
        key: str | int | None = ...,
    ) -> Coroutine[Any, Any, None]: ...
    @session_first
    def limit(
        self,
        session: SyncSession | AsyncioSession,
        at_most: int | None,
        *,
        type: str | None = None,
        key: str | int | None = None,
    ) -> Coroutine[Any, Any, None] | None:
        """Limit how many tasks of this queue, of a type or of one key run at once, over all workers.

        From your commit on, no task begins while so many run. Running tasks continue, so after a limit was
        lowered, more may run for a while. The limit is in the database: it survives restarts of the workers,
        and takes precedence over what the code declares.

        Args:
            session: A session or connection, as for `add`.
            at_most: The number of tasks; 0 to let none begin, and None to remove the limit that was set, so
                that the one of the code is in force again, if there is one.
            type: Limit the tasks of this type. If the code declares a limit of each key for it, this is the
                number for each key.
            key: Limit the tasks of this key, whether or not their types have a limit. It takes precedence
                over the limits of each key that types have.

        Raises:
            InvalidLimit: If `at_most` is invalid, or both a type and a key are given. Nothing was sent.
            InvalidTask: If the type or the key is invalid. Nothing was sent.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        if type is not None and key is not None:
            raise InvalidLimit("type and key can't both be given: pass one of them")
        parameters = {
            "from_queue": self.name,
            "limited_type": "" if type is None else check_type(type),
            "limited_key": checked_key(key) or "",
            "at_most": None if at_most is None else check_at_most(at_most, is_of_key=key is not None),
        }
        return through(session, lambda caller: set_limit(caller, self.schema, parameters))

    @overload
    def limits(self, session: SyncSession) -> list[LimitInForce]: ...
    @overload
    def limits(self, session: AsyncioSession) -> Coroutine[Any, Any, list[LimitInForce]]: ...
    @session_first
    def limits(
        self, session: SyncSession | AsyncioSession
    ) -> list[LimitInForce] | Coroutine[Any, Any, list[LimitInForce]]:
        """Return the limits of this queue: what the workers' code declares, and what `limit` has set.

        Args:
            session: A session or connection, as for `add`.

        Returns:
            The limits, those of the queue and of single keys first. With an asyncio session or connection, an
            awaitable of them.

        Raises:
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        return through(
            session,
            lambda caller: [
                LimitInForce(
                    row["type"] or None,
                    row["key"] or None,
                    row["in_force"],
                    row["declared"],
                    row["is_of_key"],
                    row["is_strict"],
                    row["holds"],
                )
                for row in limits(caller, self.schema, self.name)
            ],
        )
