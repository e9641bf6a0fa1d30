"""Queues, which add, cancel and retry tasks in the caller's transaction."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Concatenate, TypeVar, Unpack, overload

from typing_extensions import ParamSpec

from apoq.client import dependencies as linked
from apoq.client import throttled_tasks, unique_tasks
from apoq.client.operations import add, add_many, cancel, retry
from apoq.client.queue_bulk import QueueBulk
from apoq.client.queue_graphs import QueueGraphs
from apoq.client.queue_limits import QueueLimits
from apoq.client.queue_pauses import QueuePauses
from apoq.client.queue_results import QueueResults
from apoq.client.queue_schedules import QueueSchedules
from apoq.client.session_adapters import AsyncioSession, SyncSession, through
from apoq.client.session_first import session_first
from apoq.client.typed_task import Anything, Decorator, TypedTask, UniqueRule
from apoq.core.dependencies import OnParentFailure, checked_dependencies
from apoq.core.failures import OnFailure
from apoq.core.limits import ConcurrencyKey, Limit, key_for
from apoq.core.options import Options, checked, checked_options, checked_reason
from apoq.core.outcomes import Cancel, report
from apoq.core.payload import check_name, check_type, encode
from apoq.core.registry import Running
from apoq.core.retry import DEFAULT_RETRY_LIMIT, RetryDelay, exponential_backoff
from apoq.core.schedules import ScheduleOptions
from apoq.core.unique import NOT_UNIQUE, SKIP, OnConflict, Unique, UniqueKey, UniqueUntil
from apoq.errors import InvalidTask, glimpse
from apoq.schema.models import Task
from apoq.tracing import with_trace

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound=Running)


class Queue(QueueSchedules, QueuePauses, QueueLimits, QueueGraphs, QueueBulk, QueueResults):
    """A named queue of tasks.

    It has a name and a schema, but no connection: each call uses the caller's session or connection.

    Queues with the same name and schema are equal, and share their typed tasks: a worker of the one runs the
    tasks that were defined with ``@queue.task`` on the other.

    Attributes:
        name (str): The queue's name.
        schema (str | None): The schema of apoq's tables, or None for the connection's own (its search_path).
        max_data_size (int): The limit of a task's data, in bytes of JSON.
    """

    @overload
    def add(
        self,
        session: SyncSession,
        type: str,
        data: Any = ...,
        **options: Unpack[Options],
    ) -> Task: ...
    @overload
    def add(
        self,
        session: AsyncioSession,
        type: str,
        data: Any = ...,
        **options: Unpack[Options],
    ) -> Coroutine[Any, Any, Task]: ...
    @session_first
    def add(
        self,
        session: SyncSession | AsyncioSession,
        type: str,
        data: Any = {},  # noqa: B006 - never changed
        *,
        delay: float | timedelta | None = None,
        process_at: datetime | None = None,
        priority: int = 0,
        retry_limit: int | None = None,
        retry_delay: float | timedelta | None = None,
        timeout: float | timedelta | None = None,
        meta: Mapping[str, Any] | None = None,
        expires_at: datetime | None = None,
        expires_in: float | timedelta | None = None,
        unique_key: UniqueKey | None = None,
        unique_until: UniqueUntil | None = None,
        on_conflict: OnConflict | None = None,
        debounce: float | timedelta | None = None,
        max_wait: float | timedelta | None = None,
        throttle: float | timedelta | None = None,
        key: ConcurrencyKey | None = None,
        after: Iterable[Task | int] = (),
        on_parent_failure: OnParentFailure | None = None,
    ) -> Task | Coroutine[Any, Any, Task]:
        """Add a task in the transaction of `session`, and return it.

        The task exists when the caller commits, and doesn't exist if the caller rolls back.

        Args:
            session: A SQLAlchemy session, `scoped_session`, Core connection, or psycopg 3 connection, or the
                asyncio variant of one of these.
            type: The task's type, by which a worker finds its processor; at most 255 characters.
            data: The task's data: anything that JSON can represent. An empty dict by default.
            delay: Time until the task is due, in seconds or as a timedelta. By default it is due at once.
            process_at: Time when the task is due, with a time zone. Not together with `delay`.
            priority: From -32,768 to 32,767. Among the due tasks of a queue, higher ones are claimed first.
            retry_limit: Number of retries after a failure. By default the processor's.
            retry_delay: Time before each retry, in seconds or as a timedelta. By default the processor's.
            timeout: Limit of each attempt, in seconds or as a timedelta. By default the processor's.
            meta: A dict for your own use, such as a request id or a tenant, of at most 4 KB of JSON. A
                processor reads it as ``task.meta``. The keys `traceparent` and `tracestate` are reserved.
            expires_at: Time, with a time zone, from which the task doesn't start any more, not even to be
                retried: it is cancelled instead. By default it doesn't expire.
            expires_in: The same as a time from this call, in seconds or as a timedelta.
            unique_key: A text of at most 255 characters. While a task of this queue holds the key, no other
                task is added with it. It may be a function that returns the key for the data, or None.
            unique_until: ``"started"``, the default: a task holds its key until a worker claims it.
                ``"ended"``: until it has completed, failed for good or was cancelled.
            on_conflict: What happens if a task has the key. ``"skip"``, the default: nothing, that task is
                returned. ``"replace"``: it gets this call's type, data and options, unless it is running.
                ``"raise"``: `DuplicateTask`.
            debounce: Replace the task that has the key, and let it be due this time after the last call, in
                seconds or as a timedelta. Not together with `delay`, `process_at` or `on_conflict`.
            max_wait: With `debounce`, the time after the first call at which the task is due at the latest.
            throttle: With a unique key, add nothing if a task was added with the key and this option less
                than this time ago, in seconds or as a timedelta, even if that task has ended. Not together
                with `debounce` or `on_conflict`.
            key: The concurrency key: what the task is limited by, such as a tenant. A text of at most 255
                characters, a whole number, or a function that returns one of these for the data, or None.
                It has an effect only together with a `Limit`.
            after: Tasks of this schema, or their ids, at most 1,000. The new task waits until all of them
                have completed; if it has a later time, it is due then.
            on_parent_failure: What happens if one of these fails for good, is cancelled or is deleted.
                ``"cancel"``, the default: the task is cancelled, and the tasks that wait for it, too.
                ``"run"``: the task doesn't wait for it any more. ``"hold"``: the task waits until you have
                retried that task, and it has completed.

        Returns:
            The new `Task`, with its id. With an asyncio session or connection, an awaitable of it. Added
            through an ORM session, the object is in that session; otherwise it is in none.
            With a unique key, it may be another task that has the key: `Task.is_new` and
            `Task.add_outcome` say what happened. If it is "throttled", the object is not in the database, and
            its id is None.

        Raises:
            InvalidTask: If the type or an option is invalid. Nothing was sent.
            InvalidData: If the data can't be stored, or is too large. Nothing was sent.
            DuplicateTask: If another task has the unique key, with ``on_conflict="raise"``.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.

        Note:
            Executes one INSERT in the caller's transaction. It doesn't commit, retry, flush, or open a
            savepoint. Workers are notified after the commit, from another connection. With a unique key that
            is held, it executes more statements, and it waits for the end of another transaction that has
            added the key. Above READ COMMITTED, it may raise a serialization failure.
        """
        options, unique = checked_options(
            delay=delay,
            process_at=process_at,
            priority=priority,
            retry_limit=retry_limit,
            retry_delay=retry_delay,
            timeout=timeout,
            meta=meta,
            expires_at=expires_at,
            expires_in=expires_in,
            unique_key=unique_key,
            unique_until=unique_until,
            on_conflict=on_conflict,
            debounce=debounce,
            max_wait=max_wait,
            throttle=throttle,
            after=after,
        )
        dependencies = checked_dependencies(after, on_parent_failure, self._parent_id) if after else None
        parameters = {"task_queue": self.name, "task_type": check_type(type), **with_trace(options)}
        parameters["task_data"] = encode(data, self.max_data_size)
        parameters["task_key"] = key_for(key, data)
        held_key = unique.key_of(data) if unique else None
        if unique is None or held_key is None:
            if dependencies is not None:
                return through(
                    session, lambda caller: linked.add(caller, self.schema, parameters, dependencies)
                )
            return through(session, lambda caller: add(caller, self.schema, parameters))
        parameters |= {"task_unique_key": held_key, **unique.parameters}
        if (window := unique.throttle) is not None:
            return through(
                session, lambda caller: throttled_tasks.add(caller, self.schema, parameters, window)
            )
        if dependencies is not None:
            conflict = unique.on_conflict
            return through(
                session, lambda caller: linked.add(caller, self.schema, parameters, dependencies, conflict)
            )
        how = unique.on_conflict, unique.max_wait
        return through(session, lambda caller: unique_tasks.add(caller, self.schema, parameters, *how))

    @overload
    def add_many(
        self,
        session: SyncSession,
        type: str,
        items: Iterable[Any],
        **options: Unpack[Options],
    ) -> int: ...
    @overload
    def add_many(
        self,
        session: AsyncioSession,
        type: str,
        items: Iterable[Any],
        **options: Unpack[Options],
    ) -> Coroutine[Any, Any, int]: ...
    @session_first
    def add_many(
        self,
        session: SyncSession | AsyncioSession,
        type: str,
        items: Iterable[Any],
        *,
        delay: float | timedelta | None = None,
        process_at: datetime | None = None,
        priority: int = 0,
        retry_limit: int | None = None,
        retry_delay: float | timedelta | None = None,
        timeout: float | timedelta | None = None,
        meta: Mapping[str, Any] | None = None,
        expires_at: datetime | None = None,
        expires_in: float | timedelta | None = None,
        unique_key: UniqueKey | None = None,
        unique_until: UniqueUntil | None = None,
        on_conflict: OnConflict | None = None,
        debounce: float | timedelta | None = None,
        max_wait: float | timedelta | None = None,
        throttle: float | timedelta | None = None,
        key: ConcurrencyKey | None = None,
        after: Iterable[Task | int] = (),
        on_parent_failure: OnParentFailure | None = None,
    ) -> int | Coroutine[Any, Any, int]:
        """Add a task for each of `items` in the transaction of `session`.

        Batches are sent while `items` is iterated, so a generator of a million tasks needs little memory. A
        list or a tuple is fastest: after the first batch, one COPY sends the rest.

        Args:
            session: A session or connection, as for `add`.
            type: The type of all these tasks.
            items: The data of each task.
            delay: Time until the tasks are due, in seconds or as a timedelta. By default they are due at
                once.
            process_at: Time when the tasks are due, with a time zone. Not together with `delay`.
            priority: From -32,768 to 32,767. Among the due tasks of a queue, higher ones are claimed first.
            retry_limit: Number of retries after a failure. By default the processor's.
            retry_delay: Time before each retry, in seconds or as a timedelta. By default the processor's.
            timeout: Limit of each attempt, in seconds or as a timedelta. By default the processor's.
            meta: The `meta` of all these tasks, as for `add`.
            expires_at: Time from which the tasks don't start any more, as for `add`.
            expires_in: The same as a time from this call, in seconds or as a timedelta.
            unique_key: A function that returns the unique key for an item, or None; or one key for all items,
                of which then only one is added. See `add`. With it, all of `items` are read first, and no
                COPY is used.
            unique_until: As for `add`.
            on_conflict: As for `add`. Of items with the same key, the first is added, or the last with
                ``"replace"``.
            debounce: As for `add`.
            max_wait: As for `add`.
            throttle: As for `add`.
            key: A function that returns the concurrency key for an item, or one key for all. With a function,
                all of `items` are read first, and no COPY is used.
            after: As for `add`; each of the tasks waits for all of these. Not together with a unique key.
            on_parent_failure: As for `add`.

        Returns:
            The number of tasks that were added. With an asyncio session or connection, an awaitable of it.

        Raises:
            InvalidTask: If the type or an option is invalid, or `items` is not an iterable of data. Nothing
                was sent.
            InvalidData: If one of the items can't be stored. Earlier items may already be inserted.
            DuplicateTask: If a unique key is held or given twice, with ``on_conflict="raise"``. Earlier items
                may already be inserted.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.

        Note:
            After an exception, roll back the transaction or a savepoint, because earlier batches may be
            inserted, and a failed COPY aborts the transaction. On a psycopg connection in autocommit mode,
            each batch is committed separately.
        """
        options, unique = checked_options(
            delay=delay,
            process_at=process_at,
            priority=priority,
            retry_limit=retry_limit,
            retry_delay=retry_delay,
            timeout=timeout,
            meta=meta,
            expires_at=expires_at,
            expires_in=expires_in,
            unique_key=unique_key,
            unique_until=unique_until,
            on_conflict=on_conflict,
            debounce=debounce,
            max_wait=max_wait,
            throttle=throttle,
            after=after,
        )
        dependencies = checked_dependencies(after, on_parent_failure, self._parent_id) if after else None
        parameters = {"task_queue": self.name, "task_type": check_type(type), **with_trace(options)}
        if isinstance(items, str | bytes | dict) or not isinstance(items, Iterable):
            raise InvalidTask(
                f"items must be the data of many tasks, such as a list of dicts, got {glimpse(items)}"
            )
        parameters["task_key"] = None if callable(key) else key_for(key, None)
        if dependencies is not None:
            if unique is not None or callable(key):
                raise InvalidTask(
                    "after must not be given to add_many with a unique key, or a function as `key`: add each "
                    "task by `add`"
                )
            return through(
                session,
                lambda caller: linked.add_many(
                    caller, self.schema, parameters, self._documents(items), dependencies
                ),
            )
        if unique is not None or callable(key):
            found = list(self._items(items, unique, key))
            parameters |= unique.parameters if unique else NOT_UNIQUE
            if unique is not None and (window := unique.throttle) is not None:
                return through(
                    session,
                    lambda caller: throttled_tasks.add_many(caller, self.schema, parameters, found, window),
                )
            how = (unique.on_conflict, unique.max_wait) if unique else (SKIP, None)
            return through(
                session,
                lambda caller: unique_tasks.add_many(caller, self.schema, parameters, found, *how).number,
            )
        total = len(items) if isinstance(items, list | tuple) else None
        return through(
            session,
            lambda caller: add_many(caller, self.schema, parameters, self._documents(items), total),
        )

    @overload
    def cancel(self, session: SyncSession, task: Task | int, *, reason: str = ...) -> bool: ...
    @overload
    def cancel(self, session: SyncSession, *, unique_key: str, reason: str = ...) -> bool: ...
    @overload
    def cancel(
        self, session: AsyncioSession, task: Task | int, *, reason: str = ...
    ) -> Coroutine[Any, Any, bool]: ...
    @overload
    def cancel(
        self, session: AsyncioSession, *, unique_key: str, reason: str = ...
    ) -> Coroutine[Any, Any, bool]: ...
    @session_first
    def cancel(
        self,
        session: SyncSession | AsyncioSession,
        task: Task | int | None = None,
        *,
        unique_key: str | None = None,
        reason: str = "",
    ) -> bool | Coroutine[Any, Any, bool]:
        """Cancel a task of this queue in the transaction of `session`.

        A task that has not started will not run. Tasks that wait for it are cancelled, too, unless they were
        added with another `on_parent_failure`. A running task is stopped when you commit: a coroutine
        is cancelled, and for a plain function `task.should_stop` becomes True. Its result is discarded, and
        its writes to ``task.session`` are rolled back. Its worker notices the cancellation at once if a
        notification arrives, and otherwise within a few heartbeats.

        Args:
            session: A session or connection, as for `add`.
            task: The task, or its id.
            unique_key: Instead of `task`, the unique key of a task that holds it.
            reason: A text of at most 1,000 characters that is stored in the task's `error`.

        Returns:
            True if the task was cancelled; False if it had already ended, or is not in this queue, or no task
            holds the key. With an asyncio session or connection, an awaitable of it.

        Raises:
            InvalidTask: If `task` is not a task of this schema or an id, `unique_key` can't be one, both
                are given, or `reason` is not text.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.

        Note:
            If a worker is completing the task at the same moment, this waits for the worker's transaction.
        """
        parameters = {
            **self._task_or_key(task, unique_key),
            "from_queue": self.name,
            "reason": encode(report(Cancel(checked_reason(reason)))),
        }
        return through(session, lambda caller: cancel(caller, self.schema, parameters))

    @overload
    def retry(
        self,
        session: SyncSession,
        task: Task | int,
        *,
        delay: float | timedelta | None = ...,
        with_cancelled: bool = ...,
    ) -> bool: ...
    @overload
    def retry(
        self,
        session: AsyncioSession,
        task: Task | int,
        *,
        delay: float | timedelta | None = ...,
        with_cancelled: bool = ...,
    ) -> Coroutine[Any, Any, bool]: ...
    @session_first
    def retry(
        self,
        session: SyncSession | AsyncioSession,
        task: Task | int,
        *,
        delay: float | timedelta | None = None,
        with_cancelled: bool = False,
    ) -> bool | Coroutine[Any, Any, bool]:
        """Run an ended task of this queue again.

        When you commit, the task is pending, whether it had failed, was cancelled or was completed. It has
        all its attempts again, and keeps its last error until the next one.
        A task with a unique key holds its key again, and if another task has it by now, nothing is changed.
        If it was added with `after`, and one of these tasks has not completed, it waits for that instead.

        Args:
            session: A session or connection, as for `add`.
            task: The task, or its id.
            delay: Time until the task is due, in seconds or as a timedelta. By default it is due at once.
            with_cancelled: Also the tasks that were cancelled because this one had not completed, and those
                that were cancelled with them: they wait for it again.

        Returns:
            True if the task will run again; False if it has not ended, has expired, its unique key is held by
            another task, or it is not in this queue. With an asyncio session or connection, an awaitable of
            it.

        Raises:
            InvalidTask: If `task` is not a task of this schema or an id, or `delay` is invalid.
            UnsupportedSession: If `session` is not a session or connection, or has no usable engine.
            UnsupportedDatabase: If it is not on PostgreSQL through psycopg 3, or translates apoq's schema.
            SchemaMismatch: If apoq's tables are missing or at another version.
        """
        parameters = {
            "task_id": self._id_of(task),
            "from_queue": self.name,
            "task_delay": checked(delay)["task_delay"],
        }
        return through(
            session, lambda caller: retry(caller, self.schema, parameters, with_cancelled=with_cancelled)
        )

    @overload
    def task(self, function: Callable[Concatenate[Anything, ...], R], /) -> TypedTask[..., R, ...]: ...
    @overload
    def task(self, function: Callable[Concatenate[T, P], R], /) -> TypedTask[P, R, Concatenate[T, P]]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> TypedTask[P, R, P]: ...
    @overload
    def task(
        self,
        function: None = None,
        /,
        *,
        type: str | None = ...,
        aliases: Iterable[str] = ...,
        retry_limit: int = ...,
        retry_delay: RetryDelay = ...,
        timeout: float | timedelta | None = ...,
        keep_result: bool = ...,
        max_result_size: int | None = ...,
        unique: UniqueRule = ...,
        unique_until: UniqueUntil | None = ...,
        on_conflict: OnConflict | None = ...,
        on_failure: OnFailure | None = ...,
        limit: Limit | None = ...,
        isolated: bool = ...,
        **schedule: Unpack[ScheduleOptions],
    ) -> Decorator: ...
    def task(
        self,
        function: Any = None,
        /,
        *,
        type: str | None = None,
        aliases: Iterable[str] = (),
        retry_limit: int = DEFAULT_RETRY_LIMIT,
        retry_delay: RetryDelay = exponential_backoff,
        timeout: float | timedelta | None = None,
        keep_result: bool = False,
        max_result_size: int | None = None,
        unique: UniqueRule = False,
        unique_until: UniqueUntil | None = None,
        on_conflict: OnConflict | None = None,
        on_failure: OnFailure | None = None,
        limit: Limit | None = None,
        isolated: bool = False,
        **schedule: Unpack[ScheduleOptions],
    ) -> Any:
        """Make a function a typed task: ``@queue.task``, or ``@queue.task(retry_limit=3)``.

        The result can still be called like the function, and ``.add(session, …)`` adds a call as a task.
        Workers of this queue run it. If the first parameter is annotated with `RunningTask`, or with
        `AsyncRunningTask` for a coroutine function, it receives the running task.

        Args:
            function: The function, when used without parentheses.
            type: The type of its tasks. By default the function's dotted path.
            aliases: Other types that the function also processes, such as its earlier names.
            retry_limit: Number of retries after a failure.
            retry_delay: Time before a retry, in seconds or as a timedelta, or a function that returns it for
                the number of failures so far.
            timeout: Limit of each attempt, in seconds or as a timedelta; see `Worker.use`. None: no limit.
            keep_result: Whether the value that the function returns is stored with the task, as JSON, by the
                function's return annotation. Read it with `TypedTask.result`. By default it is ignored.
            max_result_size: The limit of a result, in bytes of JSON: 64 KiB by default, 1 MiB at most.
            unique: True for tasks that are unique by their type and arguments; or a function that takes the
                arguments, by name, and returns a text for the key, or None for a task without a key. The type
                is a part of the key. See `add`.
            unique_until: As for `add`, if the tasks are unique.
            on_conflict: As for `add`, if the tasks are unique.
            on_failure: A typed task whose only argument is a `TaskFailure`. It is added in the transaction
                that marks a task as failed, after its last attempt. Or its type, as for `Worker.use`.
            limit: How many of its tasks may run at once, over all workers: a `Limit`.
            isolated: Whether each attempt runs in a process of its own; see `Worker.use`.
            **schedule: `cron` or `every`, and the other times and rules of `schedule`. Workers of this queue
                declare a schedule with the task's type as its name, and from then on add a task at each of
                its times. The function must be callable without arguments.

        Returns:
            A `TypedTask`, or a decorator that returns one.

        Raises:
            InvalidProcessor: If the type already has a processor, an annotation can't be represented in JSON,
                or an option is invalid.
            InvalidLimit: If the limit is invalid.
            InvalidSchedule: If the times or rules of the schedule are invalid.
        """

        def decorate(function: Callable[..., Any]) -> TypedTask[..., Any]:
            task: TypedTask[..., Any] = TypedTask(
                self,
                function,
                type=type,
                aliases=aliases,
                retry_limit=retry_limit,
                retry_delay=retry_delay,
                timeout=timeout,
                keep_result=keep_result,
                max_result_size=max_result_size,
                unique=unique,
                unique_until=unique_until,
                on_conflict=on_conflict,
                on_failure=on_failure,
                limit=limit,
                isolated=isolated,
                schedule=schedule,
            )
            self._register(task)
            return task

        return decorate if function is None else decorate(function)

    def _documents(self, items: Iterable[Any]) -> Iterator[str]:
        for index, data in enumerate(items):
            yield encode(data, self.max_data_size, f"items[{index}]")

    def _items(
        self, items: Iterable[Any], unique: Unique | None, key: ConcurrencyKey | None
    ) -> Iterator[unique_tasks.Item]:
        for index, data in enumerate(items):
            unique_key = unique.key_of(data, f"the unique key of items[{index}]") if unique else None
            concurrency_key = key_for(key, data, f"the key of items[{index}]")
            document = encode(data, self.max_data_size, f"items[{index}]")
            yield unique_tasks.Item(unique_key, document, concurrency_key)

    def _task_or_key(self, task: Task | int | None, unique_key: str | None) -> dict[str, Any]:
        if unique_key is None:
            return {"task_id": self._id_of(task)}
        if task is not None:
            raise InvalidTask("task and unique_key can't both be given: pass one of them")
        return {"task_unique_key": check_name(unique_key, "a unique key")}
