"""The tables that only apoq reads and writes; those of tasks and schedules are in `models`."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import cache
from typing import Final
from uuid import UUID

from sqlalchemy import BigInteger, Column, Index, MetaData, Table, false, func, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.schema import conv
from sqlalchemy.types import Boolean, Double, Integer, Text

from apoq.schema.models import Base, in_schema


class WorkerRow(Base):
    """A started worker: for people to look at, and for other workers to check that it is alive."""

    __tablename__ = "apoq_workers"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    """A new id for each start of a worker."""
    host: Mapped[str]
    pid: Mapped[int] = mapped_column(Integer)
    version: Mapped[str]
    queues: Mapped[list[str]] = mapped_column(ARRAY(Text))
    concurrency: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    last_heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    """The time of its last heartbeat, by the database's clock."""
    expires_at: Mapped[datetime]
    """The end of its lease: until then it counts as alive if its connection exists."""
    grace: Mapped[timedelta]
    """The time after its last heartbeat for which it counts as alive if its connection is gone."""
    backend_pid: Mapped[int | None] = mapped_column(Integer)
    backend_start: Mapped[datetime | None]
    """Identifies, with `backend_pid`, the server process of its heartbeat; both are None behind a pooler."""
    release: Mapped[datetime | None]
    """When the worker's code was deployed: schedules that older code declares don't replace its own."""


class ClaimRow(Base):
    """The tasks of one claim, recorded by the claim, so that other workers can find a dead worker's tasks.

    A later claim of the worker deletes the row when all of its tasks are settled. With an index of running
    tasks instead, each claim and each completion would write to all indexes of the task table.
    """

    __tablename__ = "apoq_claims"

    worker_id: Mapped[UUID] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """The number of the claim, counted by the worker."""
    task_ids: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))


_links: Final = Table(
    "apoq_links",
    Base.metadata,
    # Without foreign keys, which would make deleting plain tasks slower. The edges to a task's parents are
    # deleted with the task; those to its children stay until the children are deleted.
    Column("parent_id", BigInteger, primary_key=True, autoincrement=False),
    Column("child_id", BigInteger, primary_key=True, autoincrement=False),
    Column("position", Integer, nullable=False, server_default=text("0")),  # of the parent in `after`
    # Whether the child need no longer wait for the parent; written when the parent completes.
    Column("is_done", Boolean, nullable=False, server_default=false()),
    # Whether the edge is no longer in the child's `blockers`.
    Column("is_counted", Boolean, nullable=False, server_default=false()),
    # Whether a worker must look at the edge, because the transaction that wrote it could not do it all.
    Column("needs_check", Boolean, nullable=False, server_default=false()),
    # The number of edges to the same child that the parent has added: they count with this edge.
    Column("added_count", Integer),
    Column("result", JSONB(none_as_null=True)),  # the parent's, from when it completed
    Column("error", JSONB(none_as_null=True)),  # the end of the parent, if it did not complete
    Index(conv("apoq_links_child_idx"), "child_id", "position", "parent_id"),
    # Nearly always empty. No index contains `is_done` or `is_counted`, which are written for each edge.
    Index(conv("apoq_links_check_idx"), "child_id", postgresql_where=text("needs_check")),
)
"""The edges of graphs: each is a task that waits for another one."""

_pauses: Final = Table(
    "apoq_pauses",
    Base.metadata,
    Column("queue", Text, primary_key=True),
    Column("type", Text, primary_key=True),  # an empty text for all tasks of the queue
    Column("paused_at", TIMESTAMP(timezone=True), nullable=False),
    Column("paused_by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("resume_at", TIMESTAMP(timezone=True)),  # NULL: the pause doesn't end by itself
)
"""The pauses of queues, and of types of their tasks: each from `Queue.pause` to `Queue.resume`."""

_throttles: Final = Table(
    "apoq_throttles",
    Base.metadata,
    Column("queue", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("until", TIMESTAMP(timezone=True), nullable=False),
    Index(conv("apoq_throttles_until_idx"), "until"),  # for the pruner
)
"""The windows of throttled tasks: until then, no other task is added with this unique key."""

_progress: Final = Table(
    "apoq_progress",
    Base.metadata,
    # Without a foreign key to the task, which would make the deletion of every task slower.
    Column("task_id", BigInteger, primary_key=True, autoincrement=False),
    Column("token", BigInteger, nullable=False),  # of the claim by which the task ran
    Column("done", Double, nullable=False),
    Column("total", Double),
    Column("note", Text, nullable=False),
    Column("at", TIMESTAMP(timezone=True), nullable=False),
)
"""The progress of tasks that have reported one: the last report of each."""

_limits: Final = Table(
    "apoq_limits",
    Base.metadata,
    Column("queue", Text, primary_key=True),
    Column("type", Text, primary_key=True),  # an empty text for the whole queue, or for a single key
    Column("key", Text, primary_key=True),  # an empty text for a limit that isn't of a single key
    Column("at_most", Integer),  # set by `Queue.limit`; NULL: what the code declares
    Column("declared", Integer),  # NULL: no code has declared it
    Column("is_of_key", Boolean, nullable=False, server_default=false()),
    Column("is_strict", Boolean, nullable=False, server_default=false()),
    Column("holds", Boolean, nullable=False, server_default=false()),
    Column("release", TIMESTAMP(timezone=True)),
    Column("changed_at", TIMESTAMP(timezone=True), nullable=False),
    Column("changed_by", Text, nullable=False),
)
"""The limits of queues, of types, and of single keys."""


@cache
def workers_table(schema: str | None) -> Table:
    """Return the worker table of a schema, for Core statements."""
    return in_schema(WorkerRow, schema)


@cache
def claims_table(schema: str | None) -> Table:
    """Return the table of claims of a schema, for Core statements."""
    return in_schema(ClaimRow, schema)


@cache
def limits_table(schema: str | None) -> Table:
    """Return the table of limits of a schema, for Core statements."""
    return _in(schema, _limits)


@cache
def links_table(schema: str | None) -> Table:
    """Return the table of edges of a schema, for Core statements."""
    return _in(schema, _links)


@cache
def pauses_table(schema: str | None) -> Table:
    """Return the table of pauses of a schema, for Core statements."""
    return _in(schema, _pauses)


@cache
def throttles_table(schema: str | None) -> Table:
    """Return the table of the windows of throttled tasks of a schema, for Core statements."""
    return _in(schema, _throttles)


@cache
def progress_table(schema: str | None) -> Table:
    """Return the table of progress of a schema, for Core statements."""
    return _in(schema, _progress)


def _in(schema: str | None, table: Table) -> Table:
    return table if schema is None else table.to_metadata(MetaData(), schema=schema)
