"""The mapped classes, and their tables."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final, cast
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
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, JSONB, TIMESTAMP
from sqlalchemy.orm import (
    DeclarativeBase,
    InstanceState,
    Mapped,
    make_transient_to_detached,
    mapped_column,
    validates,
)
from sqlalchemy.schema import conv
from sqlalchemy.types import Boolean, Integer, SmallInteger, Text, Uuid

from apoq.core.payload import check_time, check_type, encode
from apoq.core.states import CANCELLED, COMPLETED, FAILED, PENDING, RUNNING, STATES, WAITING, alternatives

DEFAULT_QUEUE = "default"

# In PostgreSQL's own words, or else Alembic takes what it answers for another expression.
_INDEXED_STATE: Final = f"NULLIF(NULLIF(state, '{PENDING}'::text), '{RUNNING}'::text)"


class Base(DeclarativeBase):
    """apoq's own registry; its metadata is what the migrations are checked against.

    All names of constraints and indexes are final (`conv`): a naming convention of the metadata into which a
    table is copied doesn't change them.
    """

    metadata = MetaData(naming_convention={"pk": "%(table_name)s_pkey"})  # as PostgreSQL names it
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it as it stands
        datetime: TIMESTAMP(timezone=True),
        timedelta: INTERVAL(),
        str: Text(),
        UUID: Uuid(),
    }


class Task(Base):
    """A task: work of a `type`, with its `data`, and how far it has come.

    A mapped class like your own: query it, join it, point foreign keys at it, ``session.add()`` it.
    The table is a superset of the Node.js original's, whose eight columns come first.
    """

    __tablename__ = "apoq_tasks"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    process_at: Mapped[datetime] = mapped_column(server_default=func.now())
    """When it is due: it isn't claimed before."""
    completed_at: Mapped[datetime | None]
    data: Mapped[Any] = mapped_column(JSONB, server_default=text("'{}'::jsonb"))
    type: Mapped[str]
    state: Mapped[str] = mapped_column(server_default=PENDING)
    fail_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """How many attempts have failed."""

    queue: Mapped[str] = mapped_column(server_default=DEFAULT_QUEUE)
    priority: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    """Within a queue, what is higher is claimed first."""
    retry_limit: Mapped[int | None] = mapped_column(Integer)
    """This task's own, instead of its type's."""
    retry_delay: Mapped[timedelta | None]
    """This task's own, instead of its type's."""
    timeout: Mapped[timedelta | None]
    """How long an attempt may take: this task's own, instead of its type's."""
    attempt: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """Attempts begun, counted at the claim; a snooze or a release takes its own back."""
    rescue_count: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    """How often it was taken from a worker that had died."""
    claim_token: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """Grows with each claim and never shrinks: what a worker must show to write to the task."""
    worker_id: Mapped[UUID | None]
    """The worker that claimed it last."""
    claimed_at: Mapped[datetime | None]
    prefetched: Mapped[bool] = mapped_column(Boolean, server_default=false())
    """Whether it may not have begun: more were claimed with it than found a slot at once, or it was spent."""
    failed_at: Mapped[datetime | None]
    """When an attempt last failed."""
    cancelled_at: Mapped[datetime | None]
    error: Mapped[dict[str, str] | None] = mapped_column(JSONB(none_as_null=True))
    """The last failure: its `class`, `message`, `traceback`, and the `retry_limit` that applied, as text."""
    indexed_state: Mapped[str | None] = mapped_column(Computed(_INDEXED_STATE, persisted=True))
    """The state, for indexes to find it by; None while it is pending or running. Kept by the database."""
    meta: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """The application's own notes about the task, such as a request's id or a tenant."""

    # The columns of features to come: a plain task leaves them NULL. Each row is written three times, and a
    # column that holds something, or is generated, costs each of them more than one that is NULL.
    unique_key: Mapped[str | None]
    held_unique_key: Mapped[str | None]
    key: Mapped[str | None]
    slot: Mapped[int | None] = mapped_column(Integer)
    pool_key: Mapped[str | None]
    pool_slot: Mapped[int | None] = mapped_column(Integer)
    waiting_since: Mapped[datetime | None]
    waiting_for: Mapped[str | None]
    on_parent_failure: Mapped[str | None]
    group_id: Mapped[int | None] = mapped_column(BigInteger)
    schedule: Mapped[str | None]
    tick_at: Mapped[datetime | None]
    result: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True))
    unique_until_end: Mapped[bool | None] = mapped_column(Boolean)
    blockers: Mapped[int | None] = mapped_column(Integer)
    is_followed: Mapped[bool | None] = mapped_column(Boolean)
    has_parts: Mapped[bool | None] = mapped_column(Boolean)

    __table_args__ = (
        CheckConstraint(f"state IN {alternatives(STATES)}", name=conv("apoq_tasks_state_check")),
        # No index names the state, nor anything else that a claim changes. So a claim is a heap-only update,
        # and writes to none of them. https://www.postgresql.org/docs/current/storage-hot.html
        # This one is in the order in which a claim takes them: it reads the rows that it takes, and those
        # that are running.
        Index(
            conv("apoq_tasks_open_idx"),
            "queue",
            text("priority DESC"),
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
        # What the pruner deletes from, the oldest first.
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

    def __repr__(self) -> str:
        # Only what is loaded: a repr must not query, and a detached task can't.
        shown = [
            f"{name}={self.__dict__[name]!r}" for name in ("id", "type", "state") if name in self.__dict__
        ]
        return f"<Task {' '.join(shown)}>"


@event.listens_for(Task, "expire", propagate=True, raw=True)
def _keep_id(state: InstanceState[Task], _attributes: object) -> None:
    # A worker may delete the row before the caller reads the id, and an AsyncSession could not load it then.
    if state.identity is not None:
        state.dict["id"] = state.identity[0]


class WorkerRow(Base):
    """A worker that is at work: for people to read, and for other workers to see that it lives."""

    __tablename__ = "apoq_workers"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    """Fresh for each start of a worker."""
    host: Mapped[str]
    pid: Mapped[int] = mapped_column(Integer)
    version: Mapped[str]
    queues: Mapped[list[str]] = mapped_column(ARRAY(Text))
    concurrency: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    last_heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    """Its last heartbeat, by the database's clock."""
    expires_at: Mapped[datetime]
    """When its lease ends: until then it counts as alive, as long as its connection is there."""
    grace: Mapped[timedelta]
    """How long after its last heartbeat it counts as alive once its connection is gone."""
    backend_pid: Mapped[int | None] = mapped_column(Integer)
    backend_start: Mapped[datetime | None]
    """The server's process that its heartbeat speaks to; None behind a pooler, which hides it."""


class ClaimRow(Base):
    """What one claim took, written with it: for other workers to find what a dead one held.

    It goes with a later claim of the worker's, when all of it is settled. To find running tasks by an index
    of them instead, each claim and each completion would write to all indexes of the task table.
    """

    __tablename__ = "apoq_claims"

    worker_id: Mapped[UUID] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """Counted by the worker."""
    task_ids: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))


UPCOMING: Final = frozenset(
    (
        *("unique_key", "held_unique_key", "unique_until_end", "key", "slot", "pool_key", "pool_slot"),
        *("waiting_since", "waiting_for", "blockers", "on_parent_failure", "is_followed", "has_parts"),
        *("group_id", "schedule", "tick_at", "result"),
    )
)
"""Columns that nobody needs to see yet: those of features to come."""


@cache
def task_class(schema: str | None) -> type[Task]:
    """Answer the class mapped to the task table of a schema: `Task` itself for the connection's own."""
    if schema is None:
        return Task
    table = tasks_table(None).to_metadata(MetaData(), schema=schema)
    mapped = type(
        f"Task_in_{schema}",
        (Task,),
        {"__table__": table, "__mapper_args__": {"concrete": True}, "__doc__": f"`Task`, in {schema}."},
    )
    return cast("type[Task]", mapped)


def tasks_table(schema: str | None) -> Table:
    """Answer the task table of a schema, for Core statements."""
    return cast("Table", task_class(schema).__table__)


@cache
def workers_table(schema: str | None) -> Table:
    """Answer the worker table of a schema, for Core statements."""
    return _in_schema(WorkerRow, schema)


@cache
def claims_table(schema: str | None) -> Table:
    """Answer the table of claims of a schema, for Core statements."""
    return _in_schema(ClaimRow, schema)


def _in_schema(mapped: type[Base], schema: str | None) -> Table:
    table = cast("Table", mapped.__table__)
    return table if schema is None else table.to_metadata(MetaData(), schema=schema)


def detached(schema: str | None, row: Mapping[Any, Any]) -> Task:
    """Make a `Task` of a row of its table: loaded, and in no session."""
    mapped = task_class(schema)
    task = mapped.__new__(mapped)
    # As if loaded: the validators guard what comes in, not what stands in the database.
    mapped.__init__(task)
    task.__dict__.update(row)
    make_transient_to_detached(task)
    return task
