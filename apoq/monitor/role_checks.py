"""Checks whether roles have the rights of their kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import sqlalchemy as sa

from apoq.monitor.check import BAD, OK, Finding
from apoq.monitor.formatting import clean
from apoq.schema import grants, row_security
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
    name = clean(role)
    lacked = grants.missing(connection, place, kind, role, options)
    hidden = row_security.hidden_rows(connection, place, kind, role, options)
    tables = ", ".join(its.table for its in hidden)
    if lacked or not all(its.is_allowed for its in hidden):
        text = (
            f"{name!r} lacks rights of a {kind}"
            if lacked
            else f"row-level security hides rows of {tables} from {name!r}"
        )
        (quoted,) = grants.quoted(connection, [role])
        restrictions = (row_security.restrictions(its, quoted) for its in hidden)
        policies = row_security.policies(connection, place, kind, role, options)
        cure = [*lacked, *policies, *filter(None, restrictions)]
        return Finding(BAD, "roles", text, "; ".join(cure))
    limited = f"; by row-level security, it sees only some rows of {tables}" if hidden else ""
    return Finding(OK, "roles", f"{name!r} has the rights of a {kind}{limited}")
