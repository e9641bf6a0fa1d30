"""Finds the schemas that have apoq's tables, to explain why they are not found."""

from __future__ import annotations

import shlex
import warnings
from typing import Final, NamedTuple

import sqlalchemy as sa

from apoq.errors import SchemaMismatch, migrate_command
from apoq.schema.grants import RIGHTS
from apoq.schema.preflight import SCHEMA, TABLE, Problem
from apoq.schema.statements import preflight as statements

NAMED: Final = 3
"""Maximum number of schemas in a message, because there may be one per tenant."""


class Place(NamedTuple):
    """A schema with apoq's task table."""

    schema: str
    quoted: str
    """The name as an identifier in SQL."""
    tables: list[str]
    """Those of apoq's tables that are in the schema."""
    is_visible: bool
    """Whether the search_path includes the schema and the role may use it."""
    is_named: bool
    """Whether the search_path names the schema; it is visible only if it is also usable."""
    is_usable: bool
    """Whether the role may use the schema."""

    @property
    def is_unrecorded(self) -> bool:
        """Whether all of apoq's tables are there; for a place without a recorded version."""
        return set(RIGHTS) - {"apoq_migrations"} <= set(self.tables)


def places(connection: sa.Connection) -> list[Place]:
    """Return the schemas with apoq's tables, first the visible ones in the order of the search_path."""
    rows = connection.execute(statements.places(), {"names": list(RIGHTS)})
    return [Place(*row) for row in rows]


def home(connection: sa.Connection) -> str | None:
    """Return the schema of the tables if none is given; None if PostgreSQL chooses the right one by itself.

    It is the schema that has the tables already, even if the search_path names another one before it.
    Raises `SchemaMismatch` if there are no tables, and no schema in which they could be created.
    """
    who = connection.execute(statements.session()).mappings().one()
    current: str | None = who["current_schema"]
    for place in places(connection):
        if place.is_visible:
            return None if place.schema == current else place.schema
    if current is None:
        raise SchemaMismatch(
            f"the search_path ({who['search_path']}) must include an existing schema that the role "
            f"{who['role']} may use: create one, change the search_path, or pass the schema"
        )
    return None


def here(connection: sa.Connection, schema: str | None) -> Place | None:
    """Return the place whose tables are used: in the given schema, or the first one by the search_path."""
    return next((place for place in places(connection) if _is_here(place, schema)), None)


def why_missing(connection: sa.Connection, schema: str | None) -> Problem | None:
    """Return the reason why no version of apoq's tables was found.

    None if there are no tables at all, or only those of the Node.js original.
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
    return Problem(TABLE, text, f"run `{migrate_command(schema)}` to record it")


def where_looked(connection: sa.Connection, schema: str | None) -> str:
    """Describe where the tables were searched, because the database or the search_path may be wrong."""
    who = connection.execute(statements.session()).mappings().one()
    if schema is None:
        return f"the database {who['database']}, by the search_path {who['search_path']}"
    found = [place for place in places(connection) if place.schema != schema]
    return f"the database {who['database']}" + (f", which has some in {_named(found)}" if found else "")


def another_set(connection: sa.Connection) -> Problem | None:
    """Return a problem if apoq's tables exist, but in no schema of the search_path."""
    found = places(connection)
    if not found or any(place.is_visible for place in found):
        return None
    return _another_set(found, connection.execute(statements.session()).mappings().one())


def warn_of_another_set(connection: sa.Connection) -> None:
    """Warn if tables are about to be created although another schema has some: it may be the wrong place."""
    if problem := another_set(connection):
        warnings.warn(f"creating another set of apoq's tables: {problem.text}", stacklevel=3)


def ambiguous(connection: sa.Connection) -> Problem | None:
    """Return a problem if several schemas of the search_path have apoq's tables; only the first is used."""
    visible = [place for place in places(connection) if place.is_visible]
    if len(visible) < 2:  # noqa: PLR2004 - more than one
        return None
    first, *others = visible
    text = (
        f"the tables in the schema {first.schema!r} are used; the search_path also leads to others, "
        f"in {_named(others)}"
    )
    fix = "to use others, put their schema first, or pass it (--schema, Queue(schema=…))"
    return Problem(SCHEMA, text, fix)


def _is_here(place: Place, schema: str | None) -> bool:
    return place.is_visible if schema is None else place.schema == schema


def _another_set(found: list[Place], who: sa.RowMapping) -> Problem | None:
    # A schema that this role may not use belongs to another application, unless the search_path names it.
    named = next((place for place in found if place.is_named and not place.is_usable), None)
    if named is not None:
        return _unusable(named, who["role"])
    usable = [place for place in found if place.is_usable]
    if not usable:
        return None
    name = usable[0].schema if len(usable) == 1 else "NAME"
    text = (
        f"apoq's tables are in {_named(usable)}, but the search_path ({who['search_path']}) of the role "
        f"{who['role']} doesn't lead there"
    )
    new = shlex.quote(who["current_schema"] or "NAME")
    fix = (
        f"add the schema to the search_path (ALTER ROLE {who['role']} SET search_path = …, or in the URL "
        f"?options=-csearch_path%3D{name}), or pass it (--schema {shlex.quote(name)}, "
        f"Queue(schema={name!r})); to create other tables here, run `apoq migrate --schema {new}`"
    )
    return Problem(SCHEMA, text, fix)


def _unusable(place: Place, role: str) -> Problem:
    text = f"the role {role} may not use the schema {place.quoted}, which has apoq's tables"
    return Problem(SCHEMA, text, f"GRANT USAGE ON SCHEMA {place.quoted} TO {role}")


def _named(found: list[Place]) -> str:
    names = ", ".join(repr(place.schema) for place in found[:NAMED])
    if len(found) == 1:
        return f"the schema {names}"
    more = len(found) - NAMED
    return f"the schemas {names}" + (f" and {more:,} more" if more > 0 else "")
