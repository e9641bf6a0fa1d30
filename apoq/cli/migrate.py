"""``apoq migrate``."""

import click

from apoq.cli.exits import explained
from apoq.cli.target import Target
from apoq.migrations import LATEST, current, prepare
from apoq.migrations.places import here


@click.command("migrate")
@click.pass_obj
def command(target: Target) -> None:
    """Create apoq's tables, or upgrade them.

    \b
        apoq migrate
        apoq migrate --schema jobs

    It is safe to run this any number of times, also concurrently. If apoq's tables are part of your own
    Alembic history (`apoq revision`), run `alembic upgrade head` instead.

    If the search_path finds no tables, but another schema has some, the command fails instead of creating a
    second set. Give --schema to say which schema you mean.
    """  # noqa: D301 - click's sign
    with target.begin(prepared=False) as connection:
        before = current(connection, target.schema)
        place = here(connection, target.schema)
    with explained(target.url):
        prepare(target.engine, schema=target.schema)
    if before == LATEST:
        click.echo(f"apoq's tables already have version {LATEST}: nothing to do.")
    elif before:
        click.echo(f"apoq's tables were upgraded from version {before} to version {LATEST}.")
    elif place is not None and place.is_unrecorded:
        click.echo(f"apoq's tables existed without a version: recorded version {LATEST}.")
    else:
        click.echo(f"Created apoq's tables, at version {LATEST}.")
