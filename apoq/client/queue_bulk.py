"""The methods of a queue that change many tasks at once."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple, TypedDict, Unpack, overload

from apoq.client.bulk import Selection, cancel_many, retry_many
from apoq.client.queue_base import QueueBase
from apoq.client.session_adapters import AsyncioSession, SyncSession, through
from apoq.client.session_first import session_first
from apoq.core.limits import checked_key
from apoq.core.options import checked_length, checked_reason, integer
from apoq.core.outcomes import Cancel, report
from apoq.core.payload import check_name, check_time, check_type, encode
from apoq.core.retry import LONGEST_DELAY
from apoq.core.states import CANCELLABLE, FAILED, FINAL
from apoq.errors import InvalidTask, glimpse

DEFAULT_LIMIT: Final = 1_000
MAX_LIMIT: Final = 100_000

FinalState = Literal["completed", "failed", "cancelled"]
OpenState = Literal["pending", "waiting", "running"]


class RetriedMany(NamedTuple):
    """The result of `Queue.retry_many`."""

    retried: int
    """The number of tasks that will run again."""
    skipped: int
    """The number of those that can't, because they have expired, or another task holds their unique key."""


class Filters(TypedDict, total=False):
    """The tasks that are changed, by their values."""

    type: str | None
    error_class: str | None
    since: datetime | None
    key: str | int | None
    unique_key: str | None
    everything: bool
    limit: int


class RetryOptions(Filters, total=False):
    """The options of `Queue.retry_many`."""

    state: FinalState
    delay: float | timedelta
    every: float | timedelta


class CancelOptions(Filters, total=False):
    """The options of `Queue.cancel_many`."""

    state: OpenState | None
    reason: str


class QueueBulk(QueueBase):
    """Changes of many tasks of a queue."""

    @overload
    def retry_many(self, session: SyncSession, **options: Unpack[RetryOptions]) -> RetriedMany: ...
    @overload
    def retry_many(
        self, session: AsyncioSession, **options: Unpack[RetryOptions]
    ) -> Coroutine[Any, Any, RetriedMany]: ...
    @session_first
    def retry_many(
        self,
        session: SyncSession | AsyncioSession,
        *,
        type: str | None = None,
        error_class: str | None = None,
        since: datetime | None = None,
        key: str | int | None = None,
        unique_key: str | None = None,
        everything: bool = False,
        state: FinalState = FAILED,
        limit: int = DEFAULT_LIMIT,
        delay: float | timedelta = 0,
        every: float | timedelta = 0,
    ) -> RetriedMany | Coroutine[Any, Any, RetriedMany]:
        """Run many failed tasks of this queue again, as `retry` does with one.

        At least one filter must be given, or ``everything=True``. Tasks that failed first come first. A task
        that matches all filters is retried unless it has expired, or another task holds its unique key: then
        it stays as it is.

        Args:
            session: A session or connection, as for `add`.
            type: Only tasks of this type.
            error_class: Only tasks whose last error is of this class, such as ``"ConnectionError"``.
            since: Only tasks that have ended since then: a datetime with a time zone.
            key: Only tasks with this concurrency key.
            unique_key: Only tasks that were added with this unique key.
            everything: True to retry all of them, without a filter.
            state: ``"failed"``, ``"cancelled"`` or ``"completed"``: the state that the tasks are in.
            limit: The most tasks that are retried, up to 100,000.
            delay: Time until the first of them is due, in seconds or as a timedelta. By default it is due at
                once.
            every: Time from one task to the next, in seconds or as a timedelta, so that they are not all due
                at the same time.

        Returns:
            The number of tasks that are `retried`, and of those that are `skipped`. With an asyncio session
            or connection, an awaitable of it.

        Raises:
            InvalidTask: If there is no filter, or an option is invalid.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.

        Note:
            Tasks that another transaction has locked are left out, so two calls never wait for each other's
            tasks. For more tasks than a thousand or so, call it in several transactions.
        """
        filters = _filters(type, error_class, since, key, unique_key, everything=everything, verb="retry")
        at_most = integer("limit", limit, 1, MAX_LIMIT)
        selection = Selection(self.name, (_state(state, FINAL),), filters, at_most)
        first, step = checked_length(delay, "delay"), checked_length(every, "every")
        if first.total_seconds() + step.total_seconds() * at_most > LONGEST_DELAY.total_seconds():
            raise InvalidTask(
                f"the last task must be due within a century, got every={step} for up to {at_most} tasks"
            )

        def result(ids: list[int], skipped: int) -> RetriedMany:
            return RetriedMany(len(ids), skipped)

        return through(
            session, lambda caller: result(*retry_many(caller, self.schema, selection, first, step))
        )

    @overload
    def cancel_many(self, session: SyncSession, **options: Unpack[CancelOptions]) -> int: ...
    @overload
    def cancel_many(
        self, session: AsyncioSession, **options: Unpack[CancelOptions]
    ) -> Coroutine[Any, Any, int]: ...
    @session_first
    def cancel_many(
        self,
        session: SyncSession | AsyncioSession,
        *,
        type: str | None = None,
        error_class: str | None = None,
        since: datetime | None = None,
        key: str | int | None = None,
        unique_key: str | None = None,
        everything: bool = False,
        state: OpenState | None = None,
        limit: int = DEFAULT_LIMIT,
        reason: str = "",
    ) -> int | Coroutine[Any, Any, int]:
        """Cancel many tasks of this queue that have not ended, as `cancel` does with one.

        At least one filter must be given, or ``everything=True``. Pending tasks are cancelled before waiting
        and running ones, in the order in which they would run.

        Args:
            session: A session or connection, as for `add`.
            type: Only tasks of this type.
            error_class: Only tasks that have failed before, and whose last error is of this class.
            since: Only tasks that were added since then, or, if they are running, that were claimed since
                then: a datetime with a time zone.
            key: Only tasks with this concurrency key.
            unique_key: Only tasks that were added with this unique key.
            everything: True to cancel all of them, without a filter.
            state: ``"pending"``, ``"waiting"`` or ``"running"``: only tasks in this state.
            limit: The most tasks that are cancelled, up to 100,000.
            reason: A text of at most 1,000 characters that is stored in the tasks' `error`.

        Returns:
            The number of tasks that were cancelled. With an asyncio session or connection, an awaitable of
            it.

        Raises:
            InvalidTask: If there is no filter, or an option is invalid.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.

        Note:
            Tasks that another transaction has locked are left out, such as those that a worker is claiming
            or completing at the same moment. Call it again, in another transaction, until it returns 0.
        """
        filters = _filters(type, error_class, since, key, unique_key, everything=everything, verb="cancel")
        states = CANCELLABLE if state is None else (_state(state, CANCELLABLE),)
        selection = Selection(self.name, states, filters, integer("limit", limit, 1, MAX_LIMIT))
        error = encode(report(Cancel(checked_reason(reason))))
        return through(session, lambda caller: len(cancel_many(caller, self.schema, selection, error)))


def _filters(
    type: str | None,
    error_class: str | None,
    since: datetime | None,
    key: str | int | None,
    unique_key: str | None,
    *,
    everything: bool,
    verb: str,
) -> dict[str, Any]:
    """Return the given filters as parameters; `InvalidTask` if there is none, or one is invalid."""
    if not isinstance(everything, bool):
        raise InvalidTask(f"everything must be True or False, got {glimpse(everything)}")
    filters: dict[str, Any] = {}
    if type is not None:
        filters["of_type"] = check_type(type)
    if error_class is not None:
        filters["error_class"] = _class_name(error_class)
    if since is not None:
        filters["since"] = check_time(since, "since")
    if key is not None:
        filters["of_key"] = checked_key(key)
    if unique_key is not None:
        filters["of_unique_key"] = check_name(unique_key, "a unique key")
    if not filters and not everything:
        raise InvalidTask(
            "at least one of type, error_class, since, key and unique_key must be given, got none: pass "
            f"everything=True to {verb} all tasks of the queue"
        )
    return filters


def _class_name(error_class: object) -> str:
    if not isinstance(error_class, str) or not error_class:
        hint = f": pass {error_class.__name__!r}" if isinstance(error_class, type) else ""
        raise InvalidTask(
            f"error_class must be the name of a class, such as 'ConnectionError', got "
            f"{glimpse(error_class)}{hint}"
        )
    return error_class


def _state(state: Any, allowed: tuple[str, ...]) -> str:
    if state not in allowed:
        listed = f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}"
        raise InvalidTask(f"state must be {listed}, got {glimpse(state)}")
    return str(state)
