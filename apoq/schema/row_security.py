"""The policies that each kind of role needs on tables with row-level security."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from sqlalchemy import Connection

from apoq.schema.grants import OPERATOR, TABLES, WORKER, Options, Place, grants, quoted
from apoq.schema.statements.preflight import existing_policies, row_security

SEES_ALL: Final = {WORKER, OPERATOR}
"""The kinds of roles that do wrong if they see only some of the rows."""

MAX_NAME_BYTES: Final = 63
"""The length of a name in PostgreSQL; it truncates longer ones."""


class Hidden(NamedTuple):
    """The rows of a table that row-level security hides from a role."""

    table: str
    """The table, as an identifier in SQL."""
    commands: tuple[str, ...]
    """The commands for which the role needs another policy."""
    restrictive: tuple[str, ...]
    """The policies that hide rows that others let through, as identifiers in SQL."""
    is_allowed: bool
    """Whether a role of this kind can work nevertheless, with those rows that it sees."""


def hidden_rows(connection: Connection, place: Place, kind: str, role: str, options: Options) -> list[Hidden]:
    """Return the tables of which a role doesn't see all rows that it has rights on.

    Producers and readers may see some of the rows only, such as those of a tenant.
    """
    wanted = [
        (grant.table, grant.privilege) for grant in grants(kind, options) if grant.table in place.guarded
    ]
    parameters = {
        "role": role,
        "names": [place.tables[table] for table, _ in wanted],
        "commands": [command for _, command in wanted],
    }
    rows = connection.execute(row_security(), parameters).mappings().all() if wanted else ()
    found = []
    for table in (place.tables[name] for name in TABLES):
        its = [row for row in rows if row["name"] == table]
        if all(row["is_open"] and not row["restrictive"] for row in its):
            continue
        sufficient = "is_open" if kind in SEES_ALL else "is_partial"
        commands = tuple(row["command"] for row in its if not row[sufficient])
        restrictive = tuple(dict.fromkeys(policy for row in its for policy in row["restrictive"]))
        is_allowed = not commands and not (restrictive and kind in SEES_ALL)
        found.append(Hidden(table, commands, restrictive, is_allowed))
    return found


def restrictions(hidden: Hidden, role: str) -> str | None:
    """Return what to do about restrictive policies, if there are any; the role is an identifier in SQL."""
    if hidden.is_allowed or not hidden.restrictive:
        return None
    names = ", ".join(hidden.restrictive)
    return f"change the restrictive policies {names} of {hidden.table}, or ALTER ROLE {role} BYPASSRLS"


def policies(connection: Connection, place: Place, kind: str, role: str, options: Options) -> list[str]:
    """Return the statements for the policies that a role lacks.

    They don't help against restrictive policies.
    """
    (name,) = quoted(connection, [role])
    return [
        statement
        for hidden in hidden_rows(connection, place, kind, role, options)
        for statement in _policies_of(connection, hidden, kind, role, name)
    ]


def _policies_of(connection: Connection, hidden: Hidden, kind: str, role: str, name: str) -> Iterator[str]:
    wanted = {command: _definition(command) for command in hidden.commands}
    if kind in SEES_ALL and wanted:
        wanted = {"all": "TO {} USING (true)"}
    titles = {_title(kind, command, role): definition for command, definition in wanted.items()}
    parameters = {"name": hidden.table, "names": list(titles)}
    present = connection.execute(existing_policies(), parameters).scalar_one()
    for title, quoted_title in zip(titles, quoted(connection, list(titles)), strict=True):
        if title in present:  # it has been changed since
            yield f"DROP POLICY {quoted_title} ON {hidden.table}"
        yield f"CREATE POLICY {quoted_title} ON {hidden.table} {titles[title].format(name)}"


def _definition(command: str) -> str:
    check = "WITH CHECK (true)" if command == "INSERT" else "USING (true)"
    return f"FOR {command} TO {{}} {check}"


def _title(kind: str, command: str, role: str) -> str:
    title = f"apoq_{kind}_{command.lower()}_{role}"
    if len(title.encode()) <= MAX_NAME_BYTES:
        return title
    return f"apoq_{kind}_{command.lower()}_{hashlib.sha256(role.encode()).hexdigest()[:16]}"
