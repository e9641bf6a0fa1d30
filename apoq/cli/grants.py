"""``apoq grants``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, Final

import click
import sqlalchemy as sa

from apoq.cli.exits import BadUsage, Failure, NotReady
from apoq.cli.target import Target
from apoq.schema import grants, row_security
from apoq.schema.grants import KINDS, OPERATOR, PRODUCER, READER, WORKER, Options, Place

_ROLES: Final = (
    click.option(f"--{PRODUCER}", multiple=True, metavar="ROLE", help="A role that adds tasks."),
    click.option(f"--{WORKER}", multiple=True, metavar="ROLE", help="A role that runs tasks."),
    click.option(f"--{READER}", multiple=True, metavar="ROLE", help="A role that reads statistics."),
    click.option(
        f"--{OPERATOR}",
        multiple=True,
        metavar="ROLE",
        help="A role that reads everything, and cancels, retries, pauses and deletes.",
    ),
    click.option("--may-cancel", is_flag=True, help="Producers also cancel and retry, and use unique keys."),
    click.option(
        "--may-link", is_flag=True, help="Producers also add tasks that wait for others, chains and groups."
    ),
    click.option("--may-wait", is_flag=True, help="Producers also read the results and progress of tasks."),
    click.option(
        "--may-schedule", is_flag=True, help="Producers also schedule tasks, and pause and limit queues."
    ),
    click.option(
        "--with-data", is_flag=True, help="Readers also see the data, the errors and the results of tasks."
    ),
)


def role_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options with the roles to a command."""
    return reduce(lambda decorated, option: option(decorated), reversed(_ROLES), function)


def chosen(roles: dict[str, Any]) -> tuple[list[tuple[str, str]], Options]:
    """Return the kinds and names of the given roles, and their additional rights."""
    options = Options(*(roles.pop(name) for name in Options._fields))
    return [(kind, role) for kind in KINDS for role in roles[kind]], options


@click.command("grants")
@role_options
@click.option("--apply", "applies", is_flag=True, help="Execute the statements, instead of printing them.")
@click.pass_obj
def command(target: Target, /, *, applies: bool, **roles: Any) -> None:
    """Print the GRANT statements for roles that add, run, read or manage tasks.

    \b
        apoq grants --producer web --worker jobs
        apoq grants --reader dashboard --operator ops --apply
        apoq doctor --producer web --worker jobs

    You can run them any number of times, as the owner of the tables, also after each `apoq migrate`. They
    give rights and take none. `apoq doctor` with the same options says what a role lacks.
    """  # noqa: D301 - click's sign
    given, options = chosen(roles)
    if not given:
        raise BadUsage(f"no role was given: pass {', '.join(f'--{kind}' for kind in KINDS)}")
    with target.begin() as connection:
        place = located(connection, target.schema)
        found = list(_statements(connection, place, given, options))
        if applies:
            _refuse_unknown(connection, [role for _, role in given])
            for statement in found:
                connection.exec_driver_sql(statement)
            _refuse_ineffective(connection, place, given, options)
    for statement in found:
        click.echo(f"{statement};")


def located(connection: sa.Connection, schema: str | None) -> Place:
    """Return where the tables are; fail if this role sees none."""
    place = grants.find(connection, schema)
    if place is None or set(grants.TABLES) - set(place.tables):
        raise NotReady("apoq's tables are not all in one schema that this role sees: run `apoq doctor`")
    return place


def _statements(
    connection: sa.Connection, place: Place, given: list[tuple[str, str]], options: Options
) -> Iterator[str]:
    names = grants.quoted(connection, [role for _, role in given])
    for (kind, role), name in zip(given, names, strict=True):
        yield from grants.statements(place, kind, name, options)
        yield from row_security.policies(connection, place, kind, role, options)


def _refuse_ineffective(
    connection: sa.Connection, place: Place, given: list[tuple[str, str]], options: Options
) -> None:
    """Fail if a role still lacks something: PostgreSQL only warns if this role may not grant it."""
    for kind, role in given:
        (name,) = grants.quoted(connection, [role])
        for its in row_security.hidden_rows(connection, place, kind, role, options):
            if cure := row_security.restrictions(its, name):
                raise Failure(f"row-level security hides rows of {its.table} from {role!r}: {cure}")
        if lacked := grants.missing(connection, place, kind, role, options):
            raise Failure(
                f"this role may not grant all of it; as the owner of the tables: {'; '.join(lacked)}"
            )


def _refuse_unknown(connection: sa.Connection, roles: list[str]) -> None:
    for role in grants.unknown(connection, roles):
        raise BadUsage(f"there is no role {role!r}: create it first, with CREATE ROLE … LOGIN")
