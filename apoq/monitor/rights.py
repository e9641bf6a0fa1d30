"""The rights of a connection's role to change tasks, pauses, schedules and limits."""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa

from apoq.schema.statements.changes import may_change


class Rights(NamedTuple):
    """Whether tasks, pauses, schedules and limits can be changed, and schedules run."""

    tasks: bool = False
    pauses: bool = False
    schedules: bool = False
    runs: bool = False
    limits: bool = False


def read_rights(connection: sa.Connection, schema: str | None) -> Rights:
    """Return the rights of this connection's role. On a standby there are none."""
    row = connection.execute(may_change(schema)).one()
    return Rights(*map(bool, row))
