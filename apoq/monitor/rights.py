"""The rights of a connection's role to change tasks, pauses and schedules."""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sa

from apoq.schema.statements.changes import may_change


class Rights(NamedTuple):
    """Whether tasks can be retried and cancelled, queues paused, and schedules changed and run."""

    tasks: bool = False
    pauses: bool = False
    schedules: bool = False
    runs: bool = False


def read_rights(connection: sa.Connection, schema: str | None) -> Rights:
    """Return the rights of this connection's role. On a standby there are none."""
    row = connection.execute(may_change(schema)).one()
    return Rights(*map(bool, row))
