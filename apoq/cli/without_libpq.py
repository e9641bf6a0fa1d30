"""The command line if psycopg can't be imported: the help, the version, and what to install."""

from __future__ import annotations

from typing import NoReturn

import click

from apoq import NO_LIBPQ
from apoq.cli.commands import COMMANDS, EXITS


def _refuse(*_: object, **__: object) -> NoReturn:
    raise click.ClickException(NO_LIBPQ)


def _command(name: str) -> click.Command:
    return click.Command(
        name,
        callback=_refuse,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        help=COMMANDS[name],
    )


main = click.Group(
    "apoq",
    commands=[*map(_command, COMMANDS)],
    params=[
        click.Option(["--database-url"], expose_value=False),
        click.Option(["--schema"], expose_value=False),
    ],
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"apoq, a PostgreSQL queue for background tasks.\n\n{NO_LIBPQ}",
    epilog=EXITS,
)
main = click.version_option(package_name="apoq")(main)
