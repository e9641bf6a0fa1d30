"""``apoq check``."""

from __future__ import annotations

import click

from apoq.cli.exits import Failure, shown
from apoq.cli.output import json_option, show_json
from apoq.cli.target import Target
from apoq.migrations import LATEST, differences
from apoq.schema.preflight import ids_problem


@click.command("check")
@json_option
@click.pass_obj
def command(target: Target, /, as_json: bool) -> None:
    """Check that the tables match this version of apoq.

    \b
        apoq check
        apoq check --json

    The exit code is 4 if the tables don't have this library's version, and 1 if a column, an index or the
    CHECK constraint is missing or differs, or if the next task's ID is already taken. Columns and indexes
    that you have added are ignored.
    """  # noqa: D301 - click's sign
    with target.begin() as connection:
        found = differences(connection, target.schema)
        ids = ids_problem(connection, target.schema)
    wrong = [*found, *([f"{ids.text}: {ids.fix}"] if ids else [])]
    if as_json:
        show_json({"version": LATEST, "differences": wrong})
    for sentence in wrong:
        click.echo(f"✗ {sentence}", err=as_json)
    if found:
        raise Failure(
            "the tables have the right version, but were changed, as listed above: change them back. "
            "(`apoq migrate` does nothing if the version is right.)"
        )
    if ids:
        raise Failure("the tables are right, but the IDs of new tasks are not: run the statement above.")
    if not as_json:
        click.echo(f"✓ apoq's tables have version {LATEST} and match it.\n  {shown(target.url)}")
