"""Version 1: the tables of tasks (a superset of the Node.js original's), and apoq's own.

Each step is harmless if it has been done already. So a database made by the original (at either of its two
versions) becomes the same as a new one, with its tasks kept, online and offline. The same goes for a database
that has the tables without a recorded version, such as a copy of a schema without its rows.

All names are final (`op.f`): the naming convention of a user's metadata doesn't change them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, JSONB, TIMESTAMP
from sqlalchemy.ext.compiler import compiles

from apoq.schema.citus import shards

if TYPE_CHECKING:  # importing Alembic takes 0.2 s, and a worker doesn't need it
    from alembic.operations import Operations

TIME = TIMESTAMP(timezone=True)
NOW = sa.func.now()
ZERO = sa.text("0")
LEVEL = "priority * 2 + (key IS NOT NULL)::integer"
HELD_KEY = "CASE WHEN slot IS NOT NULL AND state = 'running'::text THEN key ELSE NULL::text END"
HELD_POOL_KEY = (
    "CASE WHEN pool_slot IS NOT NULL AND state = 'running'::text THEN pool_key ELSE NULL::text END"
)
INDEXED_STATE = "NULLIF(NULLIF(state, 'pending'::text), 'running'::text)"

STORAGE = {
    # Leave room on each page for the new row versions that a claim writes: without it, each update would
    # write to every index.
    "fillfactor": "45",
    # Every task is updated twice, so vacuum after a number of changes, not after a share of the table.
    "autovacuum_vacuum_scale_factor": "0.01",
    "autovacuum_vacuum_threshold": "1000",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0.05",
}

CLAIMS_STORAGE = {
    # The table is always small, and each of its rows is deleted within seconds.
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "1000",
    "toast.autovacuum_vacuum_scale_factor": "0",
    "toast.autovacuum_vacuum_threshold": "1000",
}

LINKS_STORAGE = {
    # An edge is updated twice; see STORAGE.
    "fillfactor": "45",
    "autovacuum_vacuum_scale_factor": "0.01",
    "autovacuum_vacuum_threshold": "1000",
    "autovacuum_analyze_scale_factor": "0.05",
}

SCHEDULES_STORAGE = {
    # A schedule is updated at each of its ticks, however few rows there are.
    "autovacuum_vacuum_scale_factor": "0.01",
    "autovacuum_vacuum_threshold": "1000",
}

PROGRESS_STORAGE = {
    # Each row is updated up to once a second, in place if its page has room.
    "fillfactor": "50",
    "autovacuum_vacuum_scale_factor": "0.01",
    "autovacuum_vacuum_threshold": "1000",
}

UNCOMPRESSED = "ALTER task_ids SET STORAGE EXTERNAL"
"""To compress a thousand ids would take most of the time of a claim."""


def upgrade(op: Operations, schema: str | None = None) -> None:
    """Create the tables, or change those of the Node.js original."""
    if schema is not None and not _has_schema(op, schema):
        op.execute(sa.schema.CreateSchema(schema, if_not_exists=True))
    is_sharded = not op.get_context().as_sql and shards(op.get_bind(), schema)
    _create_tasks(op, schema)
    _create_indexes_of_tasks(op, schema)
    _alter(op, "apoq_tasks", schema, _set(STORAGE))
    _create_workers(op, schema)
    _create_claims(op, schema, is_sharded=is_sharded)
    _create_schedules(op, schema)
    _create_pauses(op, schema)
    _create_throttles(op, schema)
    _create_progress(op, schema)
    _create_limits(op, schema)
    _create_links(op, schema)


def downgrade(op: Operations, schema: str | None = None) -> None:
    """Drop the tables, with every task in them. A schema that was created for them stays."""
    op.drop_table("apoq_links", schema=schema)
    op.drop_table("apoq_throttles", schema=schema)
    op.drop_table("apoq_progress", schema=schema)
    op.drop_table("apoq_limits", schema=schema)
    op.drop_table("apoq_pauses", schema=schema)
    op.drop_table("apoq_schedules", schema=schema)
    op.drop_table("apoq_claims", schema=schema)
    op.drop_table("apoq_workers", schema=schema)
    op.drop_table("apoq_tasks", schema=schema)


def _create_tasks(op: Operations, schema: str | None) -> None:
    op.create_table(
        "apoq_tasks",
        sa.Column("id", sa.BigInteger, nullable=False),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.Column("process_at", TIME, server_default=NOW, nullable=False),
        sa.Column("completed_at", TIME),
        sa.Column("data", JSONB, server_default=sa.text("'{}'::jsonb"), nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("state", sa.Text, server_default="pending", nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("apoq_tasks_pkey")),
        schema=schema,
        if_not_exists=True,
    )
    for column in (
        sa.Column("fail_count", sa.Integer, server_default=ZERO, nullable=False),
        sa.Column("queue", sa.Text, server_default="default", nullable=False),
        sa.Column("priority", sa.SmallInteger, server_default=ZERO, nullable=False),
        sa.Column("retry_limit", sa.Integer),
        sa.Column("retry_delay", INTERVAL),
        sa.Column("timeout", INTERVAL),
        sa.Column("attempt", sa.Integer, server_default=ZERO, nullable=False),
        sa.Column("rescue_count", sa.Integer, server_default=ZERO, nullable=False),
        sa.Column("claim_token", sa.BigInteger, server_default=ZERO, nullable=False),
        sa.Column("worker_id", sa.Uuid),
        sa.Column("claimed_at", TIME),
        sa.Column("prefetched", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("failed_at", TIME),
        sa.Column("cancelled_at", TIME),
        sa.Column("error", JSONB),
        sa.Column("indexed_state", sa.Text, sa.Computed(INDEXED_STATE, persisted=True)),
        sa.Column("meta", JSONB),
        sa.Column("schedule", sa.Text),
        sa.Column("tick_at", TIME),
        sa.Column("unique_key", sa.Text),
        sa.Column("held_unique_key", sa.Text),
        sa.Column("unique_until_end", sa.Boolean),
        sa.Column("expires_at", TIME),
        sa.Column("result", JSONB),
        sa.Column("has_parts", sa.Boolean),
        sa.Column("key", sa.Text),
        sa.Column("slot", sa.Integer),
        sa.Column("pool_key", sa.Text),
        sa.Column("pool_slot", sa.Integer),
        sa.Column("held_key", sa.Text, sa.Computed(HELD_KEY, persisted=True)),
        sa.Column("held_pool_key", sa.Text, sa.Computed(HELD_POOL_KEY, persisted=True)),
        sa.Column("waiting_since", TIME),
        sa.Column("waiting_for", sa.Text),
        sa.Column("on_parent_failure", sa.Text),
        sa.Column("group_id", sa.BigInteger),
        sa.Column("blockers", sa.Integer),
        sa.Column("is_followed", sa.Boolean),
    ):
        op.add_column("apoq_tasks", column, schema=schema, if_not_exists=True)
    check = op.f("apoq_tasks_state_check")
    op.drop_constraint(check, "apoq_tasks", schema=schema, if_exists=True)  # there is no ADD … IF NOT EXISTS
    op.create_check_constraint(
        check,
        "apoq_tasks",
        "state IN ('pending', 'waiting', 'running', 'completed', 'failed', 'cancelled')",
        schema=schema,
    )


def _create_indexes_of_tasks(op: Operations, schema: str | None) -> None:
    # Two of the original's indexes that no statement of apoq uses. A third one stays, because the original's
    # workers may still run.
    for name in ("apoq_tasks_type_idx", "apoq_tasks_state_idx"):
        op.drop_index(op.f(name), "apoq_tasks", schema=schema, if_exists=True)
    op.create_index(
        op.f("apoq_tasks_open_idx"),
        "apoq_tasks",
        ["queue", sa.text(f"({LEVEL}) DESC"), "process_at", "id"],
        schema=schema,
        postgresql_where=sa.text("indexed_state IS NULL"),
        if_not_exists=True,
    )
    op.create_index(
        op.f("apoq_tasks_waiting_idx"),
        "apoq_tasks",
        ["queue", "id"],
        schema=schema,
        postgresql_where=sa.text("indexed_state = 'waiting'"),
        if_not_exists=True,
    )
    op.create_index(
        op.f("apoq_tasks_unique_key_idx"),
        "apoq_tasks",
        ["queue", "held_unique_key"],
        unique=True,
        schema=schema,
        postgresql_where=sa.text("held_unique_key IS NOT NULL"),
        if_not_exists=True,
    )
    for name, columns in (("places", ["held_key", "slot"]), ("pools", ["held_pool_key", "pool_slot"])):
        op.create_index(
            op.f(f"apoq_tasks_{name}_idx"),
            "apoq_tasks",
            ["queue", *columns],
            unique=True,
            schema=schema,
            postgresql_where=sa.text(f"{columns[0]} IS NOT NULL"),
            if_not_exists=True,
        )
    op.create_index(
        op.f("apoq_tasks_blocked_idx"),
        "apoq_tasks",
        [
            "queue",
            "waiting_for",
            sa.text("coalesce(pool_key, key)"),
            sa.text("priority DESC"),
            "process_at",
            "id",
        ],
        schema=schema,
        postgresql_where=sa.text("waiting_for IN ('key', 'pool')"),
        if_not_exists=True,
    )
    op.create_index(
        op.f("apoq_tasks_key_idx"),
        "apoq_tasks",
        ["queue", "key", "indexed_state", "id"],
        schema=schema,
        postgresql_where=sa.text(
            "key IS NOT NULL AND (indexed_state IS NULL OR indexed_state IN ('waiting', 'failed'))"
        ),
        if_not_exists=True,
    )
    op.create_index(
        op.f("apoq_tasks_expires_at_idx"),
        "apoq_tasks",
        ["queue", "expires_at"],
        schema=schema,
        postgresql_where=sa.text(
            "expires_at IS NOT NULL AND (indexed_state IS NULL OR indexed_state = 'waiting')"
        ),
        if_not_exists=True,
    )
    op.create_index(
        op.f("apoq_tasks_group_idx"),
        "apoq_tasks",
        ["group_id"],
        schema=schema,
        postgresql_where=sa.text("group_id IS NOT NULL"),
        if_not_exists=True,
    )
    op.create_index(
        op.f("apoq_tasks_completed_idx"),
        "apoq_tasks",
        ["queue", "completed_at"],
        schema=schema,
        postgresql_where=sa.text("indexed_state = 'completed'"),
        if_not_exists=True,
    )
    op.create_index(
        op.f("apoq_tasks_failed_idx"),
        "apoq_tasks",
        ["queue", sa.text("coalesce(cancelled_at, failed_at, process_at)")],
        schema=schema,
        postgresql_include=["indexed_state"],
        postgresql_where=sa.text("indexed_state IN ('failed', 'cancelled')"),
        if_not_exists=True,
    )


def _create_workers(op: Operations, schema: str | None) -> None:
    op.create_table(
        "apoq_workers",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("queues", ARRAY(sa.Text), nullable=False),
        sa.Column("concurrency", sa.Integer, nullable=False),
        sa.Column("started_at", TIME, server_default=sa.func.clock_timestamp(), nullable=False),
        sa.Column("last_heartbeat_at", TIME, server_default=sa.func.clock_timestamp(), nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.Column("grace", INTERVAL, nullable=False),
        sa.Column("backend_pid", sa.Integer),
        sa.Column("backend_start", TIME),
        sa.Column("release", TIME),
        sa.PrimaryKeyConstraint("id", name=op.f("apoq_workers_pkey")),
        schema=schema,
        if_not_exists=True,
    )


def _create_claims(op: Operations, schema: str | None, *, is_sharded: bool) -> None:
    op.create_table(
        "apoq_claims",
        sa.Column("worker_id", sa.Uuid, nullable=False),
        sa.Column("number", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("task_ids", _ids(op, is_sharded=is_sharded), nullable=False),
        sa.PrimaryKeyConstraint("worker_id", "number", name=op.f("apoq_claims_pkey")),
        schema=schema,
        if_not_exists=True,
    )
    _alter(op, "apoq_claims", schema, _set(CLAIMS_STORAGE))
    if not is_sharded:
        _alter(op, "apoq_claims", schema, UNCOMPRESSED)


def _create_schedules(op: Operations, schema: str | None) -> None:
    op.create_table(
        "apoq_schedules",
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("data", JSONB, server_default=sa.text("'{}'::jsonb"), nullable=False),
        sa.Column("cron", sa.Text),
        sa.Column("timezone", sa.Text, server_default="UTC", nullable=False),
        sa.Column("every", INTERVAL),
        sa.Column("catch_up", sa.Text, server_default="latest", nullable=False),
        sa.Column("catch_up_limit", sa.Integer, server_default=sa.text("100"), nullable=False),
        sa.Column("not_before", INTERVAL),
        sa.Column("jitter", INTERVAL),
        sa.Column("overlap", sa.Text, server_default="skip", nullable=False),
        sa.Column("priority", sa.SmallInteger, server_default=ZERO, nullable=False),
        sa.Column("retry_limit", sa.Integer),
        sa.Column("retry_delay", INTERVAL),
        sa.Column("timeout", INTERVAL),
        sa.Column("meta", JSONB),
        sa.Column("expires_in", INTERVAL),
        sa.Column("key", sa.Text),
        sa.Column("origin", sa.Text, server_default="added", nullable=False),
        sa.Column("release", TIME),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.Column("next_at", TIME, nullable=False),
        sa.Column("last_tick_at", TIME),
        sa.Column("last_task_id", sa.BigInteger),
        sa.Column("skipped_count", sa.Integer, server_default=ZERO, nullable=False),
        sa.Column("paused_at", TIME),
        sa.PrimaryKeyConstraint("queue", "name", name=op.f("apoq_schedules_pkey")),
        schema=schema,
        if_not_exists=True,
    )
    op.create_index(
        op.f("apoq_schedules_due_idx"),
        "apoq_schedules",
        ["queue", "next_at"],
        schema=schema,
        postgresql_where=sa.text("paused_at IS NULL"),
        if_not_exists=True,
    )
    _alter(op, "apoq_schedules", schema, _set(SCHEDULES_STORAGE))


def _create_pauses(op: Operations, schema: str | None) -> None:
    op.create_table(
        "apoq_pauses",
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("paused_at", TIME, nullable=False),
        sa.Column("paused_by", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("resume_at", TIME),
        sa.PrimaryKeyConstraint("queue", "type", name=op.f("apoq_pauses_pkey")),
        schema=schema,
        if_not_exists=True,
    )


def _create_throttles(op: Operations, schema: str | None) -> None:
    op.create_table(
        "apoq_throttles",
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("until", TIME, nullable=False),
        sa.PrimaryKeyConstraint("queue", "key", name=op.f("apoq_throttles_pkey")),
        schema=schema,
        if_not_exists=True,
    )
    op.create_index(
        op.f("apoq_throttles_until_idx"), "apoq_throttles", ["until"], schema=schema, if_not_exists=True
    )


def _create_progress(op: Operations, schema: str | None) -> None:
    op.create_table(
        "apoq_progress",
        sa.Column("task_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("done", sa.Double, nullable=False),
        sa.Column("total", sa.Double),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("task_id", name=op.f("apoq_progress_pkey")),
        schema=schema,
        if_not_exists=True,
    )
    _alter(op, "apoq_progress", schema, _set(PROGRESS_STORAGE))


def _create_limits(op: Operations, schema: str | None) -> None:
    op.create_table(
        "apoq_limits",
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("at_most", sa.Integer),
        sa.Column("declared", sa.Integer),
        sa.Column("is_of_key", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("is_strict", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("holds", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("release", TIME),
        sa.Column("changed_at", TIME, nullable=False),
        sa.Column("changed_by", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("queue", "type", "key", name=op.f("apoq_limits_pkey")),
        schema=schema,
        if_not_exists=True,
    )


def _create_links(op: Operations, schema: str | None) -> None:
    op.create_table(
        "apoq_links",
        sa.Column("parent_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("child_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer, server_default=ZERO, nullable=False),
        sa.Column("is_done", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("is_counted", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("needs_check", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("added_count", sa.Integer),
        sa.Column("result", JSONB),
        sa.Column("error", JSONB),
        sa.PrimaryKeyConstraint("parent_id", "child_id", name=op.f("apoq_links_pkey")),
        schema=schema,
        if_not_exists=True,
    )
    op.create_index(
        op.f("apoq_links_child_idx"),
        "apoq_links",
        ["child_id", "position", "parent_id"],
        schema=schema,
        if_not_exists=True,
    )
    op.create_index(
        op.f("apoq_links_check_idx"),
        "apoq_links",
        ["child_id"],
        schema=schema,
        postgresql_where=sa.text("needs_check"),
        if_not_exists=True,
    )
    _alter(op, "apoq_links", schema, _set(LINKS_STORAGE))


def _set(settings: dict[str, str]) -> str:
    return f"SET ({', '.join(f'{name} = {value}' for name, value in settings.items())})"


def _alter(op: Operations, name: str, schema: str | None, change: str) -> None:
    ddl = sa.DDL(f"ALTER TABLE %(fullname)s {change}")  # type: ignore[no-untyped-call]
    op.execute(ddl.against(sa.Table(name, sa.MetaData(), schema=schema)))


class _UncompressedArray(ARRAY[int]):
    """An array column that is created as `UNCOMPRESSED`."""

    cache_ok = True


@compiles(_UncompressedArray, "postgresql")
def _write_uncompressed(type_: _UncompressedArray, compiler: Any, **options: Any) -> str:
    return f"{compiler.visit_ARRAY(type_, **options)} STORAGE EXTERNAL"


def _ids(op: Operations, *, is_sharded: bool) -> ARRAY[int]:
    """Return the type of a column of ids.

    Citus refuses to change the storage of a table that it has sharded. Before PostgreSQL 16, it can't be set
    when a table is created either: there, the ids are compressed.
    """
    version: Any = op.get_bind().dialect.server_version_info if is_sharded else None
    return _UncompressedArray(sa.BigInteger) if is_sharded and version >= (16,) else ARRAY(sa.BigInteger)


def _has_schema(op: Operations, schema: str) -> bool:
    # Even with IF NOT EXISTS, creating a schema that exists needs the right to create schemas.
    return not op.get_context().as_sql and sa.inspect(op.get_bind()).has_schema(schema)
