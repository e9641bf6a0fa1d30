"""``apoq migrate``."""

import click

from apoq.cli.exits import explained
from apoq.cli.target import Target
from apoq.migrations import LATEST, current, prepare


@click.command("migrate")
@click.pass_obj
def command(target: Target) -> None:
    """Bring apoq's tables up to date.

    Any number of these at once take turns, and where nothing is to be done nothing is written. Where apoq's
    tables are part of your own Alembic history (`apoq revision`), run `alembic upgrade head` instead.
    """
    with target.begin(prepared=False) as connection:
        before = current(connection, target.schema)
    with explained(target.url):
        prepare(target.engine, schema=target.schema)
    if before == LATEST:
        click.echo(f"apoq's tables are at version {LATEST} already: nothing to do.")
    elif before:
        click.echo(f"apoq's tables went from version {before} to version {LATEST}.")
    else:
        click.echo(f"apoq's tables are made, at version {LATEST}.")
