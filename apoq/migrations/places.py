"""Find where apoq's tables are, if not where they are looked for."""

from __future__ import annotations

import shlex
import warnings
from typing import Final, NamedTuple

import sqlalchemy as sa

from apoq.errors import SchemaMismatch, migrate_command
from apoq.schema.preflight import RIGHTS, SCHEMA, TABLE, Problem
from apoq.schema.statements import preflight as statements

NAMED: Final = 3
"""Schemas that a message names, at most: there may be one for each tenant."""


class Place(NamedTuple):
    """A schema with apoq's task table."""

    schema: str
    quoted: str
    """Its name as to be written in SQL."""
    tables: list[str]
    """Those of apoq's tables that are in it."""
    is_visible: bool
    """Whether the search_path leads to it."""
    is_named: bool
    """Whether the search_path names it; then it is visible if it is usable, too."""
    is_usable: bool

    @property
    def is_unrecorded(self) -> bool:
        """Whether it has this library's tables; for one that is not at any version."""
        return set(RIGHTS) - {"apoq_migrations"} <= set(self.tables)


def places(connection: sa.Connection) -> list[Place]:
    """Return the schemas with apoq's tables, first those that the search_path leads to, in its order."""
    rows = connection.execute(statements.places(), {"names": list(RIGHTS)})
    return [Place(*row) for row in rows]


def home(connection: sa.Connection) -> str | None:
    """Return the schema to which tables without a schema belong, unless PostgreSQL would choose it by itself.

    That is the one in which they are now, even if the search_path names others before it.
    Raises `SchemaMismatch` if there are none, and no schema in which they could be made.
    """
    who = connection.execute(statements.session()).mappings().one()
    current: str | None = who["current_schema"]
    for place in places(connection):
        if place.is_visible:
            return None if place.schema == current else place.schema
    if current is None:
        raise SchemaMismatch(
            f"no schema in the search_path ({who['search_path']}) exists, or may be used by the role "
            f"{who['role']}: create one, set the search_path, or give the schema"
        )
    return None


def here(connection: sa.Connection, schema: str | None) -> Place | None:
    """Return the place with the tables that are used: in a schema, or by the search_path."""
    return next((place for place in places(connection) if _is_here(place, schema)), None)


def why_missing(connection: sa.Connection, schema: str | None) -> Problem | None:
    """Return what is the matter if apoq's tables have no version where they are looked for.

    None if there are none at all, or the original's.
    """
    found = places(connection)
    who = connection.execute(statements.session()).mappings().one()
    place = next((place for place in found if _is_here(place, schema)), None)
    if place is None:
        return _another_set(found, who) if schema is None else None
    if not place.is_usable:
        return _unusable(place, who["role"])
    if not place.is_unrecorded:
        return None
    where = "" if schema is None else f" in the schema {schema!r}"
    text = (
        f"apoq's tables{where} exist, but no version is recorded in apoq_migrations, as in a copy of a "
        "schema without its rows"
    )
    return Problem(TABLE, text, f"run `{migrate_command(schema)}`, which records it")


def where_looked(connection: sa.Connection, schema: str | None) -> str:
    """Say in which database the tables were looked for, and by which search_path: it may be the wrong one."""
    who = connection.execute(statements.session()).mappings().one()
    if schema is None:
        return f"the database {who['database']}, by the search_path {who['search_path']}"
    found = [place for place in places(connection) if place.schema != schema]
    return f"the database {who['database']}" + (f", which has some in {_named(found)}" if found else "")


def another_set(connection: sa.Connection) -> Problem | None:
    """Return what to do if there are tables of apoq's, but none where the search_path leads."""
    found = places(connection)
    if not found or any(place.is_visible for place in found):
        return None
    return _another_set(found, connection.execute(statements.session()).mappings().one())


def warn_of_another_set(connection: sa.Connection) -> None:
    """Warn if tables are about to be made beside those in another schema, which was perhaps meant."""
    if problem := another_set(connection):
        warnings.warn(f"another set of apoq's tables is made: {problem.text}", stacklevel=3)


def ambiguous(connection: sa.Connection) -> Problem | None:
    """Return what to do if the search_path leads to several sets of tables, of which it uses one."""
    visible = [place for place in places(connection) if place.is_visible]
    if len(visible) < 2:  # noqa: PLR2004 - more than one
        return None
    first, *others = visible
    text = (
        f"those in the schema {first.schema!r} are used; the search_path leads to others, in {_named(others)}"
    )
    fix = "if others were meant, put their schema first, or give it (--schema, Queue(schema=…))"
    return Problem(SCHEMA, text, fix)


def _is_here(place: Place, schema: str | None) -> bool:
    return place.is_visible if schema is None else place.schema == schema


def _another_set(found: list[Place], who: sa.RowMapping) -> Problem | None:
    # A schema that this role may not use is another application's, unless the search_path names it.
    named = next((place for place in found if place.is_named and not place.is_usable), None)
    if named is not None:
        return _unusable(named, who["role"])
    usable = [place for place in found if place.is_usable]
    if not usable:
        return None
    name = usable[0].schema if len(usable) == 1 else "NAME"
    text = (
        f"apoq's tables are in {_named(usable)}, and the search_path ({who['search_path']}) of the role "
        f"{who['role']} doesn't lead there"
    )
    new = shlex.quote(who["current_schema"] or "NAME")
    fix = (
        f"put the schema into the search_path (ALTER ROLE {who['role']} SET search_path = …, or in the URL "
        f"?options=-csearch_path%3D{name}), or give it (--schema {shlex.quote(name)}, "
        f"Queue(schema={name!r})); to make other tables here, `apoq migrate --schema {new}`"
    )
    return Problem(SCHEMA, text, fix)


def _unusable(place: Place, role: str) -> Problem:
    text = f"the role {role} may not use the schema {place.quoted}, in which apoq's tables are"
    return Problem(SCHEMA, text, f"GRANT USAGE ON SCHEMA {place.quoted} TO {role}")


def _named(found: list[Place]) -> str:
    names = ", ".join(repr(place.schema) for place in found[:NAMED])
    if len(found) == 1:
        return f"the schema {names}"
    more = len(found) - NAMED
    return f"the schemas {names}" + (f" and {more:,} more" if more > 0 else "")
