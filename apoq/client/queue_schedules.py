"""The methods of a queue for its schedules."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from datetime import timedelta, tzinfo
from typing import Any, Final, Unpack, cast, overload

from apoq.client.queue_base import QueueBase
from apoq.client.schedules import read_schedules, schedule, unschedule
from apoq.client.session_adapters import AsyncioSession, SyncSession, through
from apoq.client.session_first import session_first
from apoq.client.typed_task import Call, TypedTask
from apoq.core.payload import check_type, encode
from apoq.core.schedules import (
    DEFAULT_CATCH_UP_LIMIT,
    LATEST,
    CatchUp,
    Overlap,
    ScheduleOptions,
    TaskOptions,
    Timing,
    check_schedule_name,
    checked_schedule,
    checked_task,
)
from apoq.errors import InvalidSchedule, InvalidTask, glimpse
from apoq.schema.models import Schedule
from apoq.schema.statements.schedules import ADDED

_NO_DATA: Final[dict[str, Any]] = {}


class AllOptions(ScheduleOptions, TaskOptions, total=False):
    """The options of `Queue.schedule`."""

    key: str | int | None


class QueueSchedules(QueueBase):
    """The schedules of a queue."""

    @overload
    def schedule(
        self,
        session: SyncSession,
        name: str,
        call: Call[Any] | str,
        data: Any = ...,
        **options: Unpack[AllOptions],
    ) -> Schedule: ...
    @overload
    def schedule(
        self,
        session: AsyncioSession,
        name: str,
        call: Call[Any] | str,
        data: Any = ...,
        **options: Unpack[AllOptions],
    ) -> Coroutine[Any, Any, Schedule]: ...
    @session_first
    def schedule(
        self,
        session: SyncSession | AsyncioSession,
        name: str,
        call: Call[Any] | str,
        data: Any = _NO_DATA,
        *,
        cron: str | None = None,
        timezone: str | tzinfo | None = None,
        every: float | timedelta | None = None,
        catch_up: CatchUp = LATEST,
        catch_up_limit: int = DEFAULT_CATCH_UP_LIMIT,
        not_before: float | timedelta | None = None,
        jitter: float | timedelta | None = None,
        overlap: Overlap | None = None,
        priority: int = 0,
        retry_limit: int | None = None,
        retry_delay: float | timedelta | None = None,
        timeout: float | timedelta | None = None,
        meta: Mapping[str, Any] | None = None,
        expires_in: float | timedelta | None = None,
        key: str | int | None = None,
    ) -> Schedule | Coroutine[Any, Any, Schedule]:
        """Add a schedule in the transaction of `session`, or change the one that has this name.

        From the commit on, workers of this queue add a task at each of its times, its ticks. The first one is
        after now. If only other options than the times are changed, the next tick stays as it is.

        Args:
            session: A session or connection, as for `add`.
            name: The name of the schedule, unique in the queue.
            call: The call of a typed task, as by ``send_digest.call(user_id=7)``, or the type of the tasks.
                Options of the call, such as ``send_digest.using(priority=5)``, are used unless they are
                given here. A unique key is not: `overlap` decides whether a tick becomes a task.
            data: The data of the tasks, if `call` is a type; an empty dict by default.
            cron: A cron expression with five fields, such as ``"0 9 * * MON-FRI"``, or ``"@daily"`` and the
                like.
            timezone: The time zone of `cron`, such as ``"Europe/Berlin"``. By default it is UTC.
            every: An interval of at least one second, in seconds or as a timedelta, instead of `cron`. The
                ticks are its multiples since 1970.
            catch_up: What happens to ticks that are over when a worker looks: ``"latest"`` makes a task for
                the last one, ``"all"`` one for each, and ``"skip"`` one for the last one if it is at most a
                minute old, or `not_before` if that is given.
            catch_up_limit: The most tasks that ``"all"`` makes at once: those of the last ticks.
            not_before: The age, in seconds or as a timedelta, above which such a tick becomes no task.
            jitter: The tasks are due up to this time after their ticks, in seconds or as a timedelta. The
                delay is always the same for one schedule, and differs between schedules.
            overlap: With ``"skip"``, the default, a tick becomes no task while the last tick's task has not
                ended. ``"allow"`` is the default with ``catch_up="all"``.
            priority: The priority of the tasks, as for `add`.
            retry_limit: Their number of retries, as for `add`.
            retry_delay: The time before each retry, as for `add`.
            timeout: The limit of each attempt, as for `add`.
            meta: Their `meta`, as for `add`.
            expires_in: The time, in seconds or as a timedelta, from when a task is due until it doesn't start
                any more: it is cancelled instead.
            key: Their concurrency key, as for `add`; by default the one that the limit of a typed task makes.

        Returns:
            The `Schedule`, which is in no session. With an asyncio session or connection, an awaitable of it.

        Raises:
            InvalidSchedule: If the name, the times or a rule are invalid, or if a schedule of this name has
                another type, or is declared by ``@queue.task``.
            InvalidTask: If the type, the data or an option of the tasks is invalid.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.

        Note:
            If another transaction has written the same schedule, this waits for its end.
        """
        values = checked_schedule(
            cron, timezone, every, catch_up, catch_up_limit, not_before, jitter, overlap
        )
        its_type, its_data = _split(call, data)
        options: TaskOptions = {
            "priority": priority,
            "retry_limit": retry_limit,
            "retry_delay": retry_delay,
            "timeout": timeout,
            "meta": meta,
            "expires_in": expires_in,
        }
        tasks = checked_task(_with_own_options(call, options))
        parameters = schedule_parameters(
            self.name, check_schedule_name(name), check_type(its_type), values | tasks
        )
        parameters |= {
            "schedule_data": encode(its_data, self.max_data_size),
            "schedule_origin": ADDED,
            "schedule_key": self._key_of(call, key),
        }
        timing = Timing(values["cron"], values["timezone"], values["every"])
        return through(session, lambda caller: schedule(caller, self.schema, parameters, timing))

    @overload
    def unschedule(self, session: SyncSession, name: str) -> bool: ...
    @overload
    def unschedule(self, session: AsyncioSession, name: str) -> Coroutine[Any, Any, bool]: ...
    @session_first
    def unschedule(
        self, session: SyncSession | AsyncioSession, name: str
    ) -> bool | Coroutine[Any, Any, bool]:
        """Delete a schedule of this queue in the transaction of `session`. Its tasks stay.

        A schedule that ``@queue.task`` declares is added again when the next worker starts.

        Args:
            session: A session or connection, as for `add`.
            name: The name of the schedule.

        Returns:
            True if there was one. With an asyncio session or connection, an awaitable of it.

        Raises:
            InvalidSchedule: If no schedule can have this name.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        parameters = {"schedule_queue": self.name, "schedule_name": check_schedule_name(name)}
        return through(session, lambda caller: unschedule(caller, self.schema, parameters))

    @overload
    def schedules(self, session: SyncSession) -> list[Schedule]: ...
    @overload
    def schedules(self, session: AsyncioSession) -> Coroutine[Any, Any, list[Schedule]]: ...
    @session_first
    def schedules(
        self, session: SyncSession | AsyncioSession
    ) -> list[Schedule] | Coroutine[Any, Any, list[Schedule]]:
        """Return the schedules of this queue, by name, as the transaction of `session` sees them.

        Args:
            session: A session or connection, as for `add`.

        Returns:
            `Schedule` objects, which are in no session. With an asyncio session or connection, an awaitable
            of them.

        Raises:
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        parameters = {"schedule_queue": self.name}
        return through(session, lambda caller: read_schedules(caller, self.schema, parameters))


def schedule_parameters(queue: str, name: str, type_: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of `write_schedule`, except for the data, the origin and the next tick."""
    given = {"queue": queue, "name": name, "type": type_, "release": None, **values}
    return {f"schedule_{key}": value for key, value in given.items()}


def _with_own_options(call: Call[Any] | str, given: TaskOptions) -> TaskOptions:
    """Return the options that are given with a call, and those of its own that they don't override."""
    own: Mapping[str, Any] = call.options if isinstance(call, Call) else {}
    if refused := sorted(name for name in _TIMES if own.get(name) is not None):
        raise InvalidTask(
            f"a call for a schedule must not have {' and '.join(refused)}, because the ticks decide when its "
            "tasks are due: call the task without it"
        )
    options: dict[str, Any] = {**given}
    defaults = {"priority": 0}
    for name in options.keys() & own.keys():
        if options[name] == defaults.get(name):
            options[name] = own[name]
    return cast("TaskOptions", options)


_TIMES: Final = frozenset({"delay", "process_at", "expires_at", "after"})
"""Options of a task that mean nothing for the tasks of a schedule."""


def _split(call: Call[Any] | str, data: Any) -> tuple[str, Any]:
    """Return the type and the data of the tasks."""
    if isinstance(call, TypedTask):
        raise InvalidSchedule(f"call must be a call, such as task.call(…), got the task itself: {call!r}")
    if isinstance(call, Call):
        if data is not _NO_DATA:
            raise InvalidSchedule(f"data must be given with a type only, got a call and {glimpse(data)}")
        return call.type, call.data
    return call, data
