"""The mapped classes, and their tables."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final, Literal, TypeVar, cast
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Computed,
    Index,
    MetaData,
    Table,
    event,
    false,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import INTERVAL, JSONB, TIMESTAMP
from sqlalchemy.orm import (
    DeclarativeBase,
    InstanceState,
    Mapped,
    mapped_column,
    validates,
)
from sqlalchemy.schema import conv
from sqlalchemy.types import Boolean, Integer, SmallInteger, Text, Uuid

from apoq.core.payload import check_time, check_type, encode
from apoq.core.states import CANCELLED, COMPLETED, FAILED, PENDING, RUNNING, STATES, WAITING, alternatives

DEFAULT_QUEUE = "default"

# Written as PostgreSQL returns it, or else Alembic would consider it a different expression.
_INDEXED_STATE: Final = f"NULLIF(NULLIF(state, '{PENDING}'::text), '{RUNNING}'::text)"


LEVEL: Final = "priority * 2 + (key IS NOT NULL)::integer"
"""The level of a task, as `level` in `statements.levels`."""

HELD_KEY: Final = f"CASE WHEN slot IS NOT NULL AND state = '{RUNNING}'::text THEN key ELSE NULL::text END"
HELD_POOL_KEY: Final = (
    f"CASE WHEN pool_slot IS NOT NULL AND state = '{RUNNING}'::text THEN pool_key ELSE NULL::text END"
)
"""NULL as soon as the task is no longer running, so that each way to end an attempt gives its places back."""

WAITS_FOR_PLACE: Final = "waiting_for IN ('key', 'pool')"
IS_OF_KEY: Final = (
    f"key IS NOT NULL AND (indexed_state IS NULL OR indexed_state IN ('{WAITING}', '{FAILED}'))"
)

HOLDS_KEY: Final = "held_unique_key IS NOT NULL"
"""The predicate of the unique index."""

AddOutcome = Literal["added", "kept", "replaced", "throttled"]

ADD_OUTCOME: Final = "_add_outcome"
"""The attribute of a `Task` object that has it."""


class Base(DeclarativeBase):
    """Base of the mapped classes; the migrations are checked against its metadata.

    All names of constraints and indexes are final (`conv`): if a table is copied into other metadata, its
    naming convention doesn't change them.
    """

    metadata = MetaData(naming_convention={"pk": "%(table_name)s_pkey"})  # as PostgreSQL names it
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy needs a plain dict
        datetime: TIMESTAMP(timezone=True),
        timedelta: INTERVAL(),
        str: Text(),
        UUID: Uuid(),
    }


class Task(Base):
    """A task: a row of the task table, with its `type`, its `data` and its `state`.

    It is a mapped class like your own: you can query it, join it, reference it by foreign keys, and add it to
    a session. The table is a superset of the Node.js original's, whose eight columns come first.

    Raises:
        InvalidTask: A `type`, `data` or `process_at` that no task can have was assigned.
    """

    __tablename__ = "apoq_tasks"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    process_at: Mapped[datetime] = mapped_column(server_default=func.now())
    """The time at which the task is due; it isn't claimed earlier."""
    completed_at: Mapped[datetime | None]
    data: Mapped[Any] = mapped_column(JSONB, server_default=text("'{}'::jsonb"))
    type: Mapped[str]
    state: Mapped[str] = mapped_column(server_default=PENDING)
    fail_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """The number of failed attempts."""

    queue: Mapped[str] = mapped_column(server_default=DEFAULT_QUEUE)
    priority: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    """Within a queue, tasks of a higher priority are claimed first."""
    retry_limit: Mapped[int | None] = mapped_column(Integer)
    """The task's own limit, instead of its type's."""
    retry_delay: Mapped[timedelta | None]
    """The task's own delay, instead of its type's."""
    timeout: Mapped[timedelta | None]
    """The time that an attempt may take, instead of the type's timeout."""
    attempt: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """The number of attempts, counted by the claim. An attempt that is snoozed or released doesn't count."""
    rescue_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """The number of times that the task was rescued from a dead worker."""
    claim_token: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """Increased by each claim, never decreased: a worker can write to a task only with the current token."""
    worker_id: Mapped[UUID | None]
    """The worker that claimed the task last."""
    claimed_at: Mapped[datetime | None]
    prefetched: Mapped[bool] = mapped_column(Boolean, server_default=false())
    """Whether the attempt may not have started.

    Either the claim took more tasks than there were free slots, or the task has no attempts left and is
    claimed only to be marked `failed`.
    """
    failed_at: Mapped[datetime | None]
    """The time of the last failed attempt."""
    cancelled_at: Mapped[datetime | None]
    error: Mapped[dict[str, str] | None] = mapped_column(JSONB(none_as_null=True))
    """The last failure: its `class`, `message`, `traceback`, and the `retry_limit` that applied, as text."""
    indexed_state: Mapped[str | None] = mapped_column(Computed(_INDEXED_STATE, persisted=True))
    """The state for indexes, computed by the database; None while the task is pending or running."""
    meta: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """The application's own metadata, such as a request's id or a tenant."""

    schedule: Mapped[str | None]
    """The name of the schedule that added the task."""
    tick_at: Mapped[datetime | None]
    """The time of the schedule's tick for which the task was added; it may have been added later."""
    unique_key: Mapped[str | None]
    """The unique key that the task was added with."""
    held_unique_key: Mapped[str | None]
    """The unique key while the task holds it: in its queue, no other task can then have the key."""
    unique_until_end: Mapped[bool | None] = mapped_column(Boolean)
    """Whether the task holds its unique key until it has ended, and not only until it is claimed."""
    expires_at: Mapped[datetime | None]
    """The time from which the task doesn't start any more: it is cancelled instead."""

    result: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True))
    """The result of the processor, if it has ``keep_result=True``. Read it with `Queue.result`."""
    has_parts: Mapped[bool | None] = mapped_column(Boolean)
    """Whether other tables of apoq may have rows of this task, which are deleted with it."""
    key: Mapped[str | None]
    """The concurrency key that the task was added with."""
    slot: Mapped[int | None] = mapped_column(Integer)
    """The place of its key that the last attempt had."""
    pool_key: Mapped[str | None]
    """The type of the task if its type has a limit; an empty text if its queue has one."""
    pool_slot: Mapped[int | None] = mapped_column(Integer)
    """The place of its type or queue that the last attempt had."""
    held_key: Mapped[str | None] = mapped_column(Computed(HELD_KEY, persisted=True))
    """The concurrency key while the task is running and has a place of it."""
    held_pool_key: Mapped[str | None] = mapped_column(Computed(HELD_POOL_KEY, persisted=True))
    waiting_since: Mapped[datetime | None]
    """The time since which the task has been waiting; None if it isn't."""
    waiting_for: Mapped[str | None]
    """The reason to wait: its ``parents`` have not completed, or a place of its ``key``, or of its type
    (``pool``), must become free."""
    on_parent_failure: Mapped[str | None]
    """The rule if one of its parents fails: "cancel" (None), "run" or "hold"."""
    group_id: Mapped[int | None] = mapped_column(BigInteger)
    """The group of the task: the id of the first task that runs after the group."""
    blockers: Mapped[int | None] = mapped_column(Integer)
    """The number of parents that the task has to wait for; None if it has never had any."""
    is_followed: Mapped[bool | None] = mapped_column(Boolean)
    """Whether other tasks wait for this one, so that its end has to be written to their edges."""

    __table_args__ = (
        CheckConstraint(f"state IN {alternatives(STATES)}", name=conv("apoq_tasks_state_check")),
        # No index contains the state, or any other column that a claim changes. So a claim is a heap-only
        # update, which writes to no index. https://www.postgresql.org/docs/current/storage-hot.html
        # This index has the order in which tasks are claimed: a claim reads the rows that it takes, and the
        # running ones among them.
        Index(
            conv("apoq_tasks_open_idx"),
            "queue",
            text(f"({LEVEL}) DESC"),
            "process_at",
            "id",
            postgresql_where=text("indexed_state IS NULL"),
        ),
        Index(
            conv("apoq_tasks_waiting_idx"),
            "queue",
            "id",
            postgresql_where=text(f"indexed_state = '{WAITING}'"),
        ),
        # A plain task never enters it, and it stays small: it has only tasks that hold their unique keys.
        Index(
            conv("apoq_tasks_unique_key_idx"),
            "queue",
            "held_unique_key",
            unique=True,
            postgresql_where=text(HOLDS_KEY),
        ),
        # For expired tasks that no worker claims. A plain task never enters it either, and a claim changes
        # none of its columns.
        Index(
            conv("apoq_tasks_expires_at_idx"),
            "queue",
            "expires_at",
            postgresql_where=text(
                "expires_at IS NOT NULL AND (indexed_state IS NULL OR indexed_state = 'waiting')"
            ),
        ),
        # These make it impossible that more tasks of a key, or of a type or queue, run than there are places.
        Index(
            conv("apoq_tasks_places_idx"),
            "queue",
            "held_key",
            "slot",
            unique=True,
            postgresql_where=text("held_key IS NOT NULL"),
        ),
        Index(
            conv("apoq_tasks_pools_idx"),
            "queue",
            "held_pool_key",
            "pool_slot",
            unique=True,
            postgresql_where=text("held_pool_key IS NOT NULL"),
        ),
        # The next task that waits for a place. One that waits for a place of its key has no `pool_key`.
        Index(
            conv("apoq_tasks_blocked_idx"),
            "queue",
            "waiting_for",
            text("coalesce(pool_key, key)"),
            text("priority DESC"),
            "process_at",
            "id",
            postgresql_where=text(WAITS_FOR_PLACE),
        ),
        # The first task of a key, for a strict order, without reading its failed ones.
        Index(
            conv("apoq_tasks_key_idx"),
            "queue",
            "key",
            "indexed_state",
            "id",
            postgresql_where=text(IS_OF_KEY),
        ),
        # A plain task never enters this one either.
        Index(conv("apoq_tasks_group_idx"), "group_id", postgresql_where=text("group_id IS NOT NULL")),
        # The pruner deletes by this index and the next one, the oldest tasks first.
        Index(
            conv("apoq_tasks_completed_idx"),
            "queue",
            "completed_at",
            postgresql_where=text(f"indexed_state = '{COMPLETED}'"),
        ),
        Index(
            conv("apoq_tasks_failed_idx"),
            "queue",
            text("coalesce(cancelled_at, failed_at, process_at)"),
            # So that failed tasks are counted without reading them.
            postgresql_include=["indexed_state"],
            postgresql_where=text(f"indexed_state IN ('{FAILED}', '{CANCELLED}')"),
        ),
    )

    @validates("type")
    def _check_type(self, _key: str, value: str) -> str:
        return check_type(value)

    @validates("process_at")
    def _check_process_at(self, _key: str, value: Any) -> Any:
        return check_time(value) if isinstance(value, datetime) else value

    @validates("data")
    def _check_data(self, _key: str, value: Any) -> Any:
        encode(value)
        return value

    @property
    def add_outcome(self) -> AddOutcome | None:
        """The outcome of the call of `add` that returned this object.

        "added", "kept", "replaced" or "throttled". "kept" and "replaced" are about the task that had the
        unique key. None if no such call returned it.
        """
        outcome: AddOutcome | None = self.__dict__.get(ADD_OUTCOME)
        return outcome

    @property
    def is_new(self) -> bool:
        """Whether the call of `add` that returned this object added the task."""
        return self.add_outcome == "added"

    def __repr__(self) -> str:
        # Only loaded attributes: a repr must not query, and a detached task can't.
        shown = [
            f"{name}={self.__dict__[name]!r}" for name in ("id", "type", "state") if name in self.__dict__
        ]
        return f"<Task {' '.join(shown)}>"


@event.listens_for(Task, "expire", propagate=True, raw=True)
def _keep_id(state: InstanceState[Task], _attributes: object) -> None:
    # A worker may delete the row before the caller reads the id, and an AsyncSession could not load it then.
    if state.identity is not None:
        state.dict["id"] = state.identity[0]


class Schedule(Base):
    """A schedule: a row of the table of schedules, whose times (ticks) become tasks.

    Made by ``@queue.task(cron=…)`` or `Queue.schedule`. Read it with `Queue.schedules`, or with a query of
    your own; change it only by `Queue.schedule`, which checks the values and computes `next_at`.
    """

    __tablename__ = "apoq_schedules"

    queue: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    type: Mapped[str]
    """The type of its tasks."""
    data: Mapped[Any] = mapped_column(JSONB, server_default=text("'{}'::jsonb"))
    """The data of its tasks."""
    cron: Mapped[str | None]
    timezone: Mapped[str] = mapped_column(server_default="UTC")
    every: Mapped[timedelta | None]
    catch_up: Mapped[str] = mapped_column(server_default="latest")
    catch_up_limit: Mapped[int] = mapped_column(Integer, server_default=text("100"))
    not_before: Mapped[timedelta | None]
    """The age from which a missed tick becomes no task."""
    jitter: Mapped[timedelta | None]
    overlap: Mapped[str] = mapped_column(server_default="skip")
    priority: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    retry_limit: Mapped[int | None] = mapped_column(Integer)
    retry_delay: Mapped[timedelta | None]
    timeout: Mapped[timedelta | None]
    meta: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    expires_in: Mapped[timedelta | None]
    """The time after which a task that has not started expires, from when it is due."""
    key: Mapped[str | None]
    """The concurrency key of its tasks."""
    origin: Mapped[str] = mapped_column(server_default="added")
    """``code`` if ``@queue.task`` declares it, ``added`` if `Queue.schedule` has added it."""
    release: Mapped[datetime | None]
    """The `release` of the worker that declared it last; None if it was added."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    next_at: Mapped[datetime]
    """The time of the next tick; in the past if it is due, or was while the schedule was paused."""
    last_tick_at: Mapped[datetime | None]
    """The time of the last tick, whether or not it became a task."""
    last_task_id: Mapped[int | None] = mapped_column(BigInteger)
    """The id of the last tick's task, for ``overlap="skip"``."""
    skipped_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """The number of ticks that became no task because the last one's had not ended."""
    paused_at: Mapped[datetime | None]

    __table_args__ = (
        # Only due schedules are read, however many there are.
        Index(
            conv("apoq_schedules_due_idx"),
            "queue",
            "next_at",
            postgresql_where=text("paused_at IS NULL"),
        ),
    )

    def __repr__(self) -> str:
        names = ("queue", "name", "cron", "every", "next_at")
        shown = [f"{name}={self.__dict__[name]!r}" for name in names if self.__dict__.get(name) is not None]
        return f"<Schedule {' '.join(shown)}>"


M = TypeVar("M", bound=Base)

INTERNAL: Final = frozenset({"has_parts", "is_followed"})
"""Columns that only say where a worker has to look."""


@cache
def task_class(schema: str | None) -> type[Task]:
    """Return the class mapped to the task table of a schema; `Task` itself for the default schema."""
    return Task if schema is None else _class_in_schema(Task, schema)


@cache
def schedule_class(schema: str | None) -> type[Schedule]:
    """Return the class mapped to the table of schedules of a schema; `Schedule` itself for the default."""
    return Schedule if schema is None else _class_in_schema(Schedule, schema)


def _class_in_schema(mapped: type[M], schema: str) -> type[M]:
    with _making:  # two threads may ask at once, and SQLAlchemy warns of a second class of this name
        return cast("type[M]", _make_class(mapped, schema))


_making: Final = threading.Lock()


@cache
def _make_class(mapped: type[Base], schema: str) -> type[Base]:
    name = mapped.__name__
    return type(
        f"{name}_in_{schema}",
        (mapped,),
        {
            "__table__": in_schema(mapped, schema),
            "__mapper_args__": {"concrete": True},
            "__doc__": f"`{name}`, in {schema}.",
        },
    )


def schedules_table(schema: str | None) -> Table:
    """Return the table of schedules of a schema, for Core statements."""
    return cast("Table", schedule_class(schema).__table__)


def tasks_table(schema: str | None) -> Table:
    """Return the task table of a schema, for Core statements."""
    return cast("Table", task_class(schema).__table__)


def in_schema(mapped: type[Base], schema: str | None) -> Table:
    """Return the table of a mapped class, in a schema."""
    table = cast("Table", mapped.__table__)
    return table if schema is None else table.to_metadata(MetaData(), schema=schema)
