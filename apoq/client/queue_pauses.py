"""The methods of a queue for its pauses."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import datetime, timedelta
from typing import Any, overload

from apoq.client.operations import pause, resume
from apoq.client.queue_base import QueueBase
from apoq.client.session_adapters import AsyncioSession, SyncSession, through
from apoq.client.session_first import session_first
from apoq.core.options import checked_reason, pause_end
from apoq.core.payload import check_type
from apoq.schema.statements.pauses import ALL_TYPES


class QueuePauses(QueueBase):
    """The pauses of a queue."""

    @overload
    def pause(
        self,
        session: SyncSession,
        *,
        type: str | None = ...,
        reason: str = ...,
        until: datetime | timedelta | float | None = ...,
    ) -> None: ...
    @overload
    def pause(
        self,
        session: AsyncioSession,
        *,
        type: str | None = ...,
        reason: str = ...,
        until: datetime | timedelta | float | None = ...,
    ) -> Coroutine[Any, Any, None]: ...
    @session_first
    def pause(
        self,
        session: SyncSession | AsyncioSession,
        *,
        type: str | None = None,
        reason: str = "",
        until: datetime | timedelta | float | None = None,
    ) -> Coroutine[Any, Any, None] | None:
        """Pause this queue: when you commit, no worker claims its tasks until `resume`.

        Running tasks continue. Tasks that a worker has claimed ahead and that have not begun are released
        when the worker is notified; without a notification, some of them may still begin for some seconds.
        Tasks can be added, cancelled and retried as before. The pause is in the database, so it survives
        restarts of the workers.

        If the queue is paused already, this changes the reason and the end of the pause.

        Args:
            session: A session or connection, as for `add`.
            type: Pause only tasks of this type. By default all tasks of the queue.
            reason: A text for people of at most 1,000 characters, which ``apoq stats`` shows.
            until: The time at which the pause ends by itself, with a time zone; or its length, in seconds or
                as a timedelta. By default it lasts until `resume`.

        Raises:
            InvalidTask: If an argument is invalid, such as a time in the past. Nothing was sent.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        parameters = {**self._paused(type), "reason": checked_reason(reason), **pause_end(until)}
        return through(session, lambda caller: pause(caller, self.schema, parameters))

    @overload
    def resume(self, session: SyncSession, *, type: str | None = ...) -> bool: ...
    @overload
    def resume(self, session: AsyncioSession, *, type: str | None = ...) -> Coroutine[Any, Any, bool]: ...
    @session_first
    def resume(
        self, session: SyncSession | AsyncioSession, *, type: str | None = None
    ) -> bool | Coroutine[Any, Any, bool]:
        """End a pause of this queue: when you commit, workers claim its tasks again.

        Args:
            session: A session or connection, as for `add`.
            type: The type that was paused; by default the whole queue. Each is resumed by itself.

        Returns:
            True if it was paused. With an asyncio session or connection, an awaitable of it.

        Raises:
            InvalidTask: If the type is invalid. Nothing was sent.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        parameters = self._paused(type)
        return through(session, lambda caller: resume(caller, self.schema, parameters))

    def _paused(self, type_: str | None) -> dict[str, Any]:
        return {"from_queue": self.name, "paused_type": ALL_TYPES if type_ is None else check_type(type_)}
