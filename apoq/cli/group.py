"""The group of commands, each of which is imported when it is called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import copy
from importlib import import_module
from typing import Any

import click

from apoq.cli.commands import COMMANDS, EXITS
from apoq.cli.exits import BadUsage, explained
from apoq.cli.streams import writing
from apoq.cli.target import VARIABLES, Target
from apoq.core.payload import check_schema
from apoq.errors import InvalidTask


class Commands(click.Group):
    """apoq's commands, for a group of any name: what is added to it by hand comes before ours.

    Its callback sets ``ctx.obj`` to the `Target`, so a framework offers the same commands on its own engine:

    .. code-block:: python

        @click.group(cls=Commands)
        @click.pass_context
        def apoq(ctx):
            ctx.obj = Target(engine=db.engine)
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Answer the names, in the order of `COMMANDS`."""
        return [*COMMANDS, *(name for name in super().list_commands(ctx) if name not in COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        found = super().get_command(ctx, cmd_name)
        if found is None and cmd_name in COMMANDS:
            found = import_module(f"apoq.cli.{cmd_name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help without importing them all."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._line(ctx, name)) for name in self.list_commands(ctx)])

    def _line(self, ctx: click.Context, name: str) -> str:
        added = self.commands.get(name)
        return COMMANDS[name] if added is None else added.get_short_help_str(ctx.max_content_width or 80)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse bytes that are no text: they would fail wherever they are sent to."""
        return super().parse_args(ctx, [read_text(arg) for arg in args])

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Read the arguments, and print what `--help` and `--version` ask for."""
        with writing():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what goes wrong outside of the program ends it in one line."""
        with explained(), writing():
            return super().invoke(ctx)


class _Main(Commands):
    """The program `apoq`: which database it is may be said before the command's name, and after it."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        if found is not None:
            found = copy(found)
            found.params = [*found.params, *_options()]
        return found


def read_text(value: str) -> str:
    """Read an argument or a variable, which is UTF-8 whatever the locale; refuse what is no text."""
    try:
        text = os.fsencode(value).decode()
    except UnicodeError:
        # Without the value, which may have a password in it.
        raise BadUsage("an argument, or a variable of the environment, is not text in UTF-8") from None
    if "\0" in text:
        raise BadUsage("an argument, or a variable of the environment, has a NUL character: leave it out")
    return text


def _options(variables: Sequence[str] = ()) -> list[click.Parameter]:
    def use(ctx: click.Context, option: click.Parameter, value: str | None) -> None:
        given = ctx.meta.setdefault(
            "apoq.target", {}
        )  # the contexts of the group and of its command share it
        if value is not None:
            given[option.name] = read_text(value)  # it may be the environment's
        try:
            check_schema(given.get("schema"))
        except InvalidTask as error:
            raise BadUsage(str(error)) from None
        ctx.obj = Target(given.get("database_url"), schema=given.get("schema"))
        ctx.call_on_close(ctx.obj.close)

    return [
        click.Option(
            ["--database-url"],
            metavar="URL",
            envvar=variables,
            expose_value=False,
            callback=use,
            help=f"The database, postgresql://…; else what {' or '.join(VARIABLES)} says.",
        ),
        click.Option(
            ["--schema"],
            metavar="NAME",
            expose_value=False,
            callback=use,
            help="Where apoq's tables are, if not where the search_path leads.",
        ),
    ]


@click.group(
    cls=_Main,
    params=_options(VARIABLES),
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXITS,
)
@click.version_option(package_name="apoq")
def main() -> None:
    """apoq, a PostgreSQL queue for background tasks."""
