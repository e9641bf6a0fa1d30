"""Checks whether roles have the rights of their kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import sqlalchemy as sa

from apoq.monitor.check import BAD, OK, Finding
from apoq.monitor.formatting import clean
from apoq.schema import grants
from apoq.schema.grants import Options, Place


def check_roles(
    connection: sa.Connection, schema: str | None, roles: Iterable[tuple[str, str]], options: Options
) -> Iterator[Finding]:
    """Compare the rights of roles, given with their kind, with those that `apoq grants` gives."""
    place = grants.find(connection, schema)
    if place is None:
        return
    given = list(roles)
    unknown = grants.unknown(connection, [role for _, role in given])
    for kind, role in given:
        name = clean(role)
        if role in unknown:
            yield Finding(BAD, "roles", f"there is no role {name!r}", "CREATE ROLE … LOGIN")
            continue
        yield _check(connection, place, kind, role, options)


def _check(connection: sa.Connection, place: Place, kind: str, role: str, options: Options) -> Finding:
    lacked = grants.missing(connection, place, kind, role, options)
    hidden = grants.policies(connection, place, kind, role)
    name = clean(role)
    if not lacked and not hidden:
        return Finding(OK, "roles", f"{name!r} has the rights of a {kind}")
    text = f"{name!r} lacks rights of a {kind}" if lacked else f"row-level security hides tasks from {name!r}"
    return Finding(BAD, "roles", text, "; ".join([*lacked, *hidden]))
