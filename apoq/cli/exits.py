"""How a command ends: its exit code, and one line that says why and what to do next."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Final

import click
import psycopg
import sqlalchemy.exc
from sqlalchemy import URL

from apoq.cli.wording import clean
from apoq.connections import is_away, is_missing
from apoq.databases import without_password
from apoq.errors import ApoqError, NotPrepared

_FORBIDDEN = "42501"


class Failure(click.ClickException):
    """Ends the command with one message on stderr: the answer is no, or it didn't work."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Write it, on a terminal with its lines broken between words."""
        file = file or sys.stderr
        text = "\n".join(map(clean, f"Error: {self.format_message()}".splitlines()))
        if file.isatty():
            text = click.wrap_text(text, shutil.get_terminal_size().columns)
        click.echo(text, file=file)


class BadUsage(Failure):
    """The command line, or a setting, can't be understood."""

    exit_code = 2  # as click's own


class Unreachable(Failure):
    """The database doesn't answer, or doesn't let us in."""

    exit_code = 3


class NotReady(Failure):
    """apoq's tables are missing, or at another version than this library's."""

    exit_code = 4


EXITS: Final = "Exit codes: 0 done, 1 no or failed, 2 usage, 3 database unreachable, 4 tables not up to date."
"""Those of every command, for its help."""


@contextmanager
def explained(url: URL | None = None) -> Iterator[None]:
    """Turn what can go wrong outside of the program into a `Failure`; anything else is a bug, and passes."""
    try:
        yield
    except NotPrepared as error:
        raise NotReady(str(error)) from error
    except ApoqError as error:
        raise Failure(str(error)) from error
    except (sqlalchemy.exc.DBAPIError, psycopg.Error) as error:
        failure = _explain(getattr(error, "orig", None) or error, url)
        if failure is None:
            raise
        raise failure from error


def _explain(cause: Any, url: URL | None) -> Failure | None:
    # libpq's has several lines.
    message = without_password(" ".join(re.sub(r"(?<=\w)\n", ". ", str(cause)).split()))
    if is_missing(cause):
        return NotReady(f"{message}: bring apoq's tables up to date with `apoq migrate`")
    if getattr(cause, "sqlstate", None) == _FORBIDDEN:
        return Failure(
            f"{message}: use a role that may do that; `apoq doctor` shows what to grant to a worker"
        )
    if isinstance(cause, psycopg.ProgrammingError) and cause.sqlstate is None:
        # libpq's, before it connects: such as of an option in the URL of an application's engine.
        return BadUsage(f"the engine can't connect: {message}; look at its URL and its connect_args")
    if is_away(cause):
        where = "" if url is None else f" at {shown(url)}"
        return Unreachable(f"the database{where} can't be reached: {message}")
    return None


def shown(url: URL) -> str:
    """Show where a URL leads, and no password."""
    query = {name: value for name, value in url.query.items() if name in {"host", "port", "service"}}
    place = url.set(
        query=query,
        drivername="postgresql",
        # Before an @ may stand a part of a password that isn't written with per cent signs.
        host=url.host and url.host.rpartition("@")[2],
        database=url.database and url.database.rpartition("@")[2],
    ).render_as_string(hide_password=True)
    for code, character in {"%2F": "/", "%3A": ":", "%2C": ","}.items():
        place = place.replace(code, character)
    return place


def warn(message: str) -> None:
    """Say something on stderr, where it is in nobody's way."""
    click.echo(message, file=sys.stderr)
