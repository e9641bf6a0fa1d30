"""Migrates the tables from one version to another, and records the version."""

from __future__ import annotations

import time
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from apoq.core.payload import check_schema
from apoq.errors import SchemaMismatch
from apoq.migrations import v0001
from apoq.migrations.differences import differences
from apoq.migrations.places import home, warn_of_another_set
from apoq.postgres.urls import check_untranslated
from apoq.schema.statements.preflight import has_column, lock_holder, lock_timeout

if TYPE_CHECKING:
    from alembic.operations import Operations

STEPS: Final[dict[int, ModuleType]] = {1: v0001}
LATEST: Final = max(STEPS)

VERSION_TABLE: Final = "apoq_migrations"
"""Alembic's version table, with the name that the Node.js original uses."""

OWN: Final = (
    "apoq_workers",
    "apoq_claims",
    "apoq_schedules",
    "apoq_pauses",
    "apoq_limits",
    "apoq_throttles",
    "apoq_progress",
    "apoq_links",
)
"""Tables that the Node.js original doesn't have."""

TABLES: Final = frozenset({"apoq_tasks", *OWN, VERSION_TABLE})

LOCK_KEY: Final = 97112111113
"""The original's key: the bytes of "apoq" in decimal."""

LOCK_WAIT_SECONDS: Final = 60.0
"""Seconds to wait for the lock; limited, because any role can take and keep it."""

LOCK_POLL_SECONDS: Final = 0.05
"""Seconds between two attempts to take the lock."""

_KEY: Final[sa.ColumnElement[int]] = sa.literal_column(str(LOCK_KEY))


def upgrade(op: Operations | ModuleType, *, version: int = LATEST, schema: str | None = None) -> None:
    """Migrate apoq's tables to a version, in a revision of your own project.

        from alembic import op
        import apoq.migrations

        def upgrade() -> None:
            apoq.migrations.upgrade(op, version=1)

    It does nothing if the tables are at this version or a later one. With ``--sql``, it can't read the
    version of the tables and starts from the one before. It warns if it creates a second set of tables
    because no schema in the search_path has apoq's tables, but another schema has.

    Args:
        op: ``alembic.op``, or an `Operations` object.
        version: The version to migrate to; by default, the latest one. Give it in a revision, so that the
            revision always does the same.
        schema: The schema of the tables, created if it is missing; by default, the search_path is used.

    Raises:
        SchemaMismatch: This library doesn't know the version; or another session holds the migration lock for
            too long; or the tables exist without a recorded version and are not apoq's.

    Note:
        It runs in the transaction of the revision.
    """
    operations: Any = op
    schema = _quoted(schema)
    _check_version(version, lowest=1)
    has_some = False
    if operations.get_context().as_sql:
        operations.execute(_lock_statement())
        start = version - 1
    else:
        connection = operations.get_bind()
        check_untranslated(connection.get_execution_options(), schema)
        lock(connection)
        is_unnamed = schema is None
        if is_unnamed and (found := home(connection)) is not None:
            schema = _quoted(found)
        adopt(connection, schema)
        start = current(connection, schema)
        if start < version:
            if is_unnamed:
                warn_of_another_set(connection)
            has_some = not start and any(
                sa.inspect(connection).has_table(each, schema=schema) for each in OWN
            )
    if start >= version:
        return
    for step in range(start + 1, version + 1):
        STEPS[step].upgrade(operations, schema)
    _record(operations, version, schema)
    if has_some and version == LATEST and (wrong := differences(operations.get_bind(), schema)):
        raise SchemaMismatch(
            "tables with the names of apoq's exist, but without a version, and differ from apoq's: "
            f"{'; '.join(wrong)}. Drop or rename them, and try again"
        )


def downgrade(op: Operations | ModuleType, *, version: int = 0, schema: str | None = None) -> None:
    """Migrate apoq's tables back to a version, in a revision of your own project.

    It does nothing if the tables are at this version or an earlier one. With ``--sql``, it can't read the
    version of the tables and starts from the one after.

    Args:
        op: ``alembic.op``, or an `Operations` object.
        version: The version to migrate to; 0 drops the tables with all tasks.
        schema: The schema of the tables; by default, the search_path is used.

    Raises:
        SchemaMismatch: This library doesn't know the version, or that of the tables; or another session holds
            the migration lock for too long.

    Note:
        It runs in the transaction of the revision.
    """
    operations: Any = op
    schema = _quoted(schema)
    _check_version(version, lowest=0)
    if operations.get_context().as_sql:
        operations.execute(_lock_statement())
        start = version + 1
    else:
        connection = operations.get_bind()
        check_untranslated(connection.get_execution_options(), schema)
        lock(connection)
        start = current(connection, schema)
        if start > LATEST:
            raise SchemaMismatch(newer(start))
    if start <= version:
        return
    for step in range(start, version, -1):
        STEPS[step].downgrade(operations, schema)
    _record(operations, version, schema)


def current(connection: sa.Connection, schema: str | None = None) -> int:
    """Return the version of apoq's tables in a database; 0 if there are none, or only the original's."""
    check_untranslated(connection.get_execution_options(), check_schema(schema))
    if not _is_ours(connection, schema):
        return 0
    found = connection.scalar(sa.select(_table(schema).c.version_num))
    return int(found) if found else 0


def lock(connection: sa.Connection) -> None:
    """Wait for other migrations, and hold the migration lock until the end of the transaction.

    Raises `SchemaMismatch` if another session holds it for longer than the session's `lock_timeout`, or, if
    that is not set, for longer than `LOCK_WAIT_SECONDS`.
    """
    # It polls, because a wait that PostgreSQL ends would abort the transaction, which could then no longer
    # query who holds the lock.
    began = time.monotonic()
    patience = 0.0
    while not connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(_KEY))):
        patience = patience or connection.scalar(lock_timeout()) or LOCK_WAIT_SECONDS
        if time.monotonic() - began > patience:
            holder = connection.execute(lock_holder(), {"key": LOCK_KEY}).mappings().first()
            raise SchemaMismatch(_held(holder, patience))
        connection.execute(
            sa.select(sa.func.pg_sleep(LOCK_POLL_SECONDS))
        )  # sleeps in the server: `time.sleep` would block an event loop


def adopt(connection: sa.Connection, schema: str | None = None) -> bool:
    """Drop the version table of the Node.js original, if there is one; return whether it did.

    It has the name of Alembic's version table, but other columns. Its content isn't needed, because version 1
    looks at the tables themselves. Call it in the transaction of the upgrade, after `lock`.
    """
    if not sa.inspect(connection).has_table(VERSION_TABLE, schema=schema) or _is_ours(connection, schema):
        return False
    connection.execute(sa.schema.DropTable(_table(schema)))
    return True


def newer(version: int) -> str:
    """Return the message for tables that are newer than this library, with what to do."""
    return (
        f"apoq's tables are at version {version}, but this library knows only versions up to {LATEST}: "
        "upgrade the library (pip install --upgrade apoq)"
    )


def include_object(
    object: Any,
    name: str | None,
    type_: str,
    reflected: bool,  # noqa: ARG001
    compare_to: Any,  # noqa: ARG001
) -> bool:
    """Hide apoq's tables from autogenerate; pass it to ``context.configure(include_object=…)`` in env.py.

    Returns:
        False for apoq's tables and their columns, indexes and constraints; True for everything else.
    """
    table = name if type_ == "table" else getattr(getattr(object, "table", None), "name", None)
    return table not in TABLES


def _quoted(schema: str | None) -> str | None:
    """Return the schema's name for Alembic, which would read a name with a dot as two names."""
    return None if schema is None else sa.quoted_name(str(check_schema(schema)), quote=True)


def _is_ours(connection: sa.Connection, schema: str | None) -> bool:
    asked = {"name": VERSION_TABLE, "column": "version_num", "schema": schema}
    return bool(connection.scalar(has_column(), asked))


def _table(schema: str | None) -> sa.Table:
    # The same table that Alembic creates, including the name of its primary key.
    return sa.Table(
        VERSION_TABLE,
        sa.MetaData(),
        sa.Column("version_num", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("version_num", name=f"{VERSION_TABLE}_pkc"),
        schema=schema,
    )


def _record(operations: Any, version: int, schema: str | None) -> None:
    table = _table(schema)
    if not version:
        operations.execute(sa.schema.DropTable(table, if_exists=True))
        return
    operations.execute(sa.schema.CreateTable(table, if_not_exists=True))
    operations.execute(sa.delete(table))
    operations.execute(sa.insert(table).values(version_num=f"{version:04d}"))


def _lock_statement() -> sa.Select[tuple[Any]]:
    return sa.select(sa.func.pg_advisory_xact_lock(_KEY))


def _held(holder: sa.RowMapping | None, patience: float) -> str:
    text = f"waited {patience:g} s for the lock that lets only one migration of apoq run, but "
    if holder is None:
        return f"{text}another session still holds it: try again when that session has ended"
    pid, role, name = holder["pid"], holder["usename"], holder["application_name"]
    return (
        f"{text}process {pid} (role {role}, {name!r}) still holds it: if that is a migration, try again "
        f"later; otherwise run SELECT pg_terminate_backend({pid})"
    )


def _check_version(version: int, *, lowest: int) -> None:
    if not lowest <= version <= LATEST:
        known = f"from {lowest} to {LATEST}" if lowest < LATEST else f"{LATEST}"
        raise SchemaMismatch(
            f"version must be {known}, got {version}: this apoq knows no others; pass another version, or "
            "upgrade apoq"
        )
