"""The rights of a connection's role to change tasks, pauses and schedules."""

from __future__ import annotations

from typing import Final, NamedTuple

import sqlalchemy as sa

from apoq.schema.statements.preflight import session, tables

_NEEDED: Final = {
    "tasks": ("apoq_tasks", {"SELECT", "UPDATE"}),
    "pauses": ("apoq_pauses", {"SELECT", "INSERT", "UPDATE", "DELETE"}),
    "schedules": ("apoq_schedules", {"SELECT", "UPDATE"}),
}


class Rights(NamedTuple):
    """Whether tasks can be retried and cancelled, queues paused, and schedules changed and run."""

    tasks: bool = False
    pauses: bool = False
    schedules: bool = False
    runs: bool = False


def read_rights(connection: sa.Connection, schema: str | None) -> Rights:
    """Return the rights of this connection's role. On a standby there are none."""
    if connection.execute(session()).mappings().one()["is_standby"]:
        return Rights()
    names = [name for name, _ in _NEEDED.values()]
    rows = connection.execute(tables(), {"names": names, "schema": schema}).mappings()
    found = {row["name"]: row for row in rows if row["is_reachable"]}
    has = {
        what: name in found and rights <= set(found[name]["rights"])
        for what, (name, rights) in _NEEDED.items()
    }
    return Rights(**has, runs="apoq_tasks" in found and bool(found["apoq_tasks"]["may_insert"]))
