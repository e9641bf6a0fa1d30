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
    """Tell whether database, library and model agree.

    The tables have to be at this library's version (or else the exit code is 4), and to have what its model
    has: columns, indexes and the CHECK, and free ids for new tasks (or else 1). What you have added to them
    is yours.
    """
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
            "the tables are at the right version, but somebody has changed them: change them back. "
            "(`apoq migrate` does nothing where the version is right.)"
        )
    if ids:
        raise Failure(
            "the tables are as they should be, but not the ids of new tasks: run the statement above."
        )
    if not as_json:
        click.echo(f"✓ apoq's tables are at version {LATEST}, and as they should be.\n  {shown(target.url)}")
