"""``apoq doctor``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final

import click
import sqlalchemy as sa
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from apoq.cli.exits import Failure, Unreachable, explained, in_this_program
from apoq.cli.grants import chosen, role_options
from apoq.cli.looking import looking
from apoq.cli.output import json_option, show, show_json
from apoq.cli.target import Target
from apoq.monitor.check import BAD, OK, WARNING, Finding
from apoq.monitor.formatting import clean
from apoq.monitor.graphs import check_waiting
from apoq.monitor.role_checks import check_roles
from apoq.monitor.server_checks import check_clock, check_connections, check_server, check_way
from apoq.monitor.stats import figures
from apoq.monitor.table_checks import (
    check_disk,
    check_horizon,
    check_ids,
    check_indexes,
    check_limits,
    check_placement,
    check_queues,
    check_role,
    check_schedules,
    check_vacuum,
    check_version,
    check_workers,
)
from apoq.schema.grants import Options
from apoq.schema.preflight import CITUS, SCHEMA

_MARKS: Final = {OK: Text("✓", "green"), WARNING: Text("!", "yellow"), BAD: Text("✗", "red bold")}


@click.command("doctor")
@json_option
@role_options
@click.pass_context
def command(context: click.Context, /, *, as_json: bool, **roles: Any) -> None:
    """Check the server, the tables and the workers, and say what to do.

    \b
        apoq doctor
        apoq doctor --json
        apoq doctor --producer web --worker jobs

    ✓ is OK, ! is a warning, and ✗ is an error. If there are errors, the exit code is 1, or 3 if the database
    can't be reached. With roles, it also names the rights that they lack, as `apoq grants` grants them.
    """  # noqa: D301 - click's sign
    target: Target = context.obj
    found = [*examine(target)]
    if _has_tables(found):
        found += _examined(target, "roles", partial(_check_roles, target.schema, *chosen(roles)))
    if as_json:
        show_json([finding._asdict() for finding in found])
    else:
        show(report(found))
    if any(finding.level == BAD for finding in found):
        context.exit(Unreachable.exit_code if found[-1].subject == "connection" else 1)


def _has_tables(found: list[Finding]) -> bool:
    return any((finding.subject, finding.level) == ("tables", OK) for finding in found)


def _check_roles(
    schema: str | None, given: list[tuple[str, str]], options: Options, connection: sa.Connection
) -> Iterator[Finding]:
    return check_roles(connection, schema, given, options)


def examine(target: Target) -> Iterator[Finding]:
    """Check everything, as far as possible."""
    url = target.url  # an invalid one ends the command here
    try:
        with explained(url), target.engine.connect():
            pass
    except Unreachable as error:
        yield Finding(BAD, "connection", error.message)
        return
    except Failure as error:
        yield Finding(BAD, "server", error.message)
        return
    for subject, check in (
        ("server", check_server),
        ("clock", check_clock),
        ("connections", check_connections),
    ):
        yield from _examined(target, subject, check)
    yield from _tried("notifications", partial(check_way, target.engine))
    role = list(_examined(target, "rights", partial(check_role, schema=target.schema)))
    yield from role
    if any(finding.subject == SCHEMA for finding in role):
        return  # this role sees no tables
    tables = list(_examined(target, "tables", partial(check_version, schema=target.schema)))
    yield from tables
    if not any(finding.level == OK for finding in tables):
        return  # there is nothing more to check
    if not role:
        yield Finding(OK, "rights", "this role has the rights that a worker needs")
    yield from _examined(target, CITUS, partial(check_placement, schema=target.schema))
    yield from _examined(target, "ids", partial(check_ids, schema=target.schema))
    yield from _examined(target, "vacuum", partial(check_vacuum, schema=target.schema))
    yield from _examined(target, "indexes", partial(check_indexes, schema=target.schema))
    yield from _examined(target, "transactions", check_horizon)
    yield from _tried("workers", partial(_check_figures, target))


def _check_figures(target: Target) -> Iterator[Finding]:
    with looking(target) as connection:
        found = figures(connection, target.schema)
    yield from check_workers(found)
    yield from check_queues(found)
    yield from check_disk(found)
    with looking(target) as connection:
        yield from check_schedules(connection, target.schema)
        yield from check_limits(connection, target.schema)
        yield from check_waiting(connection, target.schema)


def _examined(
    target: Target, subject: str, check: Callable[[sa.Connection], Iterable[Finding]]
) -> Iterator[Finding]:
    def examined() -> Iterator[Finding]:
        with target.engine.begin() as connection:
            yield from check(connection)

    return _tried(subject, examined)


def _tried(subject: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Check one thing; if that fails, such as without a privilege, continue with the others."""
    try:
        with explained():
            yield from check()
    except Failure as error:
        yield Finding(WARNING, subject, f"could not be checked: {error.message}")


def report(found: list[Finding]) -> RenderableType:
    """Return a table of the findings, and a summary."""
    made = Table.grid(padding=(0, 1))
    made.add_column()
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for finding in found:
        text = Text(in_this_program(clean(finding.text)))
        if finding.cure:
            text.append(f"\n→ {in_this_program(clean(finding.cure))}", "cyan")
        made.add_row(_MARKS[finding.level], finding.subject, text)
    return Group(made, "", _summary(found))


def _summary(found: list[Finding]) -> Text:
    bad, warnings = (sum(finding.level == level for finding in found) for level in (BAD, WARNING))
    noted = "1 warning" if warnings == 1 else f"{warnings} warnings"
    if bad:
        errors = "1 error" if bad == 1 else f"{bad} errors"
        return Text(f"{errors}, {noted}." if warnings else f"{errors}.", "red bold")
    if warnings:
        return Text(f"No errors, {noted}.", "yellow")
    return Text("Everything is OK.", "green")
