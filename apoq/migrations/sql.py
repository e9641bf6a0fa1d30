"""The same steps as SQL, for histories that Alembic doesn't keep: Django's, Flyway's or sqitch's."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import Any

from apoq.migrations.steps import downgrade, upgrade


def upgrade_sql(*, version: int, schema: str | None = None) -> str:
    """Answer the statements that bring apoq's tables to a version from the one before.

    They belong in one transaction. In a migration of Django's:

        operations = [
            migrations.RunSQL(
                apoq.migrations.upgrade_sql(version=1), apoq.migrations.downgrade_sql(version=0)
            ),
        ]
    """
    return _written(upgrade, version=version, schema=schema)


def downgrade_sql(*, version: int, schema: str | None = None) -> str:
    """Answer the statements that take apoq's tables back to a version from the one after; 0 drops them."""
    return _written(downgrade, version=version, schema=schema)


def _written(step: Callable[..., None], **options: Any) -> str:
    # Here, for `import apoq` shall not import Alembic.
    from alembic.migration import MigrationContext  # noqa: PLC0415
    from alembic.operations import Operations  # noqa: PLC0415

    script = StringIO()
    opts = {"as_sql": True, "literal_binds": True, "output_buffer": script}
    step(Operations(MigrationContext.configure(dialect_name="postgresql", opts=opts)), **options)
    return script.getvalue()
