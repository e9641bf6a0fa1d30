"""Versions of apoq's tables, applied by Alembic's `Operations`.

There are four ways to create the same tables: ``alembic upgrade head`` in apoq's own repository, `prepare` in
a program, `upgrade` in a revision of your project, and `upgrade_sql` if your project doesn't use Alembic.
"""

from __future__ import annotations

from apoq.migrations.differences import differences
from apoq.migrations.prepare import check, prepare
from apoq.migrations.sql import downgrade_sql, upgrade_sql
from apoq.migrations.steps import (
    LATEST,
    VERSION_TABLE,
    adopt,
    current,
    downgrade,
    include_object,
    lock,
    upgrade,
)

__all__ = [
    "LATEST",
    "VERSION_TABLE",
    "adopt",
    "check",
    "current",
    "differences",
    "downgrade",
    "downgrade_sql",
    "include_object",
    "lock",
    "prepare",
    "upgrade",
    "upgrade_sql",
]
