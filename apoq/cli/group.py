"""The group of commands; each is imported when it is called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import copy
from importlib import import_module
from typing import Any

import click

from apoq.cli.commands import COMMANDS, EXITS
from apoq.cli.exits import BadUsage, Failure, explained, in_this_program
from apoq.cli.streams import writing
from apoq.cli.target import VARIABLES, Target
from apoq.core.payload import check_schema
from apoq.errors import InvalidTask


class Commands(click.Group):
    """apoq's commands, for a group of any name. Commands that are added to the group replace ours.

    The group's callback sets ``ctx.obj`` to the `Target`, so that a framework can offer the same commands on
    its own engine:

    .. code-block:: python

        @click.group(cls=Commands)
        @click.pass_context
        def apoq(ctx):
            ctx.obj = Target(engine=db.engine)
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of `COMMANDS`."""
        return [*COMMANDS, *(name for name in super().list_commands(ctx) if name not in COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        found = super().get_command(ctx, cmd_name)
        if found is None and cmd_name in COMMANDS:
            found = import_module(f"apoq.cli.{cmd_name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help without importing all commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._line(ctx, name)) for name in self.list_commands(ctx)])

    def _line(self, ctx: click.Context, name: str) -> str:
        added = self.commands.get(name)
        return COMMANDS[name] if added is None else added.get_short_help_str(ctx.max_content_width or 80)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Fail if an argument is not text: it could not be stored anywhere."""
        return super().parse_args(ctx, [read_text(arg) for arg in args])

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Read the arguments, and print what `--help` and `--version` ask for."""
        with writing():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an expected error ends it with one line."""
        try:
            with explained(), writing():
                return super().invoke(ctx)
        except Failure as failure:
            raise type(failure)(in_this_program(failure.message, ctx)) from failure.__cause__


class _Main(Commands):
    """The program `apoq`: the options for the database may come before or after the command's name."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        if found is not None:
            found = copy(found)
            found.params = [*found.params, *_options()]
        return found


def read_text(value: str) -> str:
    """Read an argument or a variable as UTF-8 in any locale; fail if it is not text."""
    try:
        text = os.fsencode(value).decode()
    except UnicodeError:
        # Without the value, which may contain a password.
        raise BadUsage("an argument or environment variable is not text in UTF-8: correct it") from None
    if "\0" in text:
        raise BadUsage("an argument or environment variable contains a NUL character: remove it")
    return text


def _options(variables: Sequence[str] = ()) -> list[click.Parameter]:
    def use(ctx: click.Context, option: click.Parameter, value: str | None) -> None:
        given = ctx.meta.setdefault(
            "apoq.target", {}
        )  # the contexts of the group and of its command share it
        if value is not None:
            given[option.name] = read_text(value)  # it may come from the environment
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
            help=f"The database, postgresql://… Default: the variable {' or '.join(VARIABLES)}.",
        ),
        click.Option(
            ["--schema"],
            metavar="NAME",
            expose_value=False,
            callback=use,
            help="The schema of apoq's tables. Default: the first one in the search_path that has them.",
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
