"""The migrations as SQL, for tools other than Alembic, such as Django, Flyway or sqitch."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import Any

from apoq.migrations.steps import downgrade, upgrade


def upgrade_sql(*, version: int, schema: str | None = None) -> str:
    """Return the SQL that migrates apoq's tables to a version from the one before it.

    Run its statements in one transaction. In a Django migration:

        operations = [
            migrations.RunSQL(
                apoq.migrations.upgrade_sql(version=1), apoq.migrations.downgrade_sql(version=0)
            ),
        ]

    Args:
        version: The version to migrate to; 1 creates the tables.
        schema: The schema of the tables; by default, the search_path is used.

    Raises:
        SchemaMismatch: This library doesn't know the version.
    """
    return _as_script(upgrade, version=version, schema=schema)


def downgrade_sql(*, version: int, schema: str | None = None) -> str:
    """Return the SQL that migrates apoq's tables back to a version from the one after it.

    Args:
        version: The version to migrate to; 0 drops the tables with all tasks.
        schema: The schema of the tables; by default, the search_path is used.

    Raises:
        SchemaMismatch: This library doesn't know the version.
    """
    return _as_script(downgrade, version=version, schema=schema)


def _as_script(step: Callable[..., None], **options: Any) -> str:
    # Imported here, so that `import apoq` doesn't import Alembic.
    from alembic.migration import MigrationContext  # noqa: PLC0415
    from alembic.operations import Operations  # noqa: PLC0415

    script = StringIO()
    opts = {"as_sql": True, "literal_binds": True, "output_buffer": script}
    step(Operations(MigrationContext.configure(dialect_name="postgresql", opts=opts)), **options)
    return script.getvalue()
