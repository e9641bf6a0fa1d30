"""``apoq migrate``."""

import click

from apoq.cli.exits import explained
from apoq.cli.target import Target
from apoq.migrations import LATEST, current, prepare
from apoq.migrations.places import here


@click.command("migrate")
@click.pass_obj
def command(target: Target) -> None:
    """Bring apoq's tables up to date.

    Any number of these at once take turns, and if nothing is to be done, nothing is written. If apoq's
    tables are part of your own Alembic history (`apoq revision`), run `alembic upgrade head` instead.

    It makes no second set of tables, unless you name its schema: if the search_path leads to none, and
    another schema has some, it says so and ends.
    """
    with target.begin(prepared=False) as connection:
        before = current(connection, target.schema)
        place = here(connection, target.schema)
    with explained(target.url):
        prepare(target.engine, schema=target.schema)
    if before == LATEST:
        click.echo(f"apoq's tables are at version {LATEST} already: nothing to do.")
    elif before:
        click.echo(f"apoq's tables went from version {before} to version {LATEST}.")
    elif place is not None and place.is_unrecorded:
        click.echo(f"apoq's tables existed without a version: version {LATEST} is recorded.")
    else:
        click.echo(f"apoq's tables are made, at version {LATEST}.")
