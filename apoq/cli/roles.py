"""The kind of role that the current command needs, and what the role that calls it lacks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import click
import psycopg
import sqlalchemy as sa
import sqlalchemy.exc

from apoq.schema import grants
from apoq.schema.grants import OPERATOR, PRODUCER, READER, WORKER, Options

Needed = tuple[str, Options]
"""A kind of role, and its additional rights."""

_NEEDED: Final[Mapping[str, Needed]] = {
    "worker": (WORKER, Options()),
    "add": (PRODUCER, Options()),
    **dict.fromkeys(
        ("list", "show", "failures", "schedules", "groups"),
        (READER, Options(with_data=True)),
    ),
    **dict.fromkeys(("stats", "check", "health", "metrics", "keys", "limits"), (READER, Options())),
    **dict.fromkeys(("cancel", "retry", "pause", "resume", "prune"), (OPERATOR, Options())),
}
"""The rights that each command needs. With an action, such as `schedules remove`, it needs an operator."""


def needed() -> Needed:
    """Return what the current command needs."""
    context = click.get_current_context(silent=True)
    while context is not None and context.info_name not in _NEEDED:
        context = context.parent
    if context is None:
        return _NEEDED["worker"]
    if context.params.get("action") is not None:
        return OPERATOR, Options()
    if context.info_name == "add" and context.params.get("unique_key") is not None:
        return PRODUCER, Options(may_cancel=True)
    return _NEEDED[str(context.info_name)]


def as_options(kind: str, options: Options) -> str:
    """Return the options of `apoq grants` for a kind of role."""
    flags = (f"--{name.replace('_', '-')}" for name, given in options._asdict().items() if given)
    return " ".join((f"--{kind} ROLE", *flags))


def lacking(engine: sa.Engine, schema: str | None, message: str) -> list[str]:
    """Return the statements that give this connection's role what it lacks for the current command.

    Those for the object that the server's `message` names, on a connection of its own.
    """
    kind, options = needed()
    # Such as if it may not use the schema, by which nothing more can be found out.
    with suppress(sqlalchemy.exc.SQLAlchemyError, psycopg.Error), engine.connect() as connection:
        place = grants.find(connection, schema)
        if place is not None and set(grants.TABLES) <= set(place.tables):
            role = connection.execute(sa.select(sa.func.current_user())).scalar_one()
            found = grants.missing(connection, place, kind, role, options)
            denied = re.findall(r"\bapoq_\w+", message)
            return [statement for statement in found if any(f".{its} TO " in statement for its in denied)]
    return []
