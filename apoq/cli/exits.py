"""How a command fails: an exit code, and one line that says why and what to do next."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Final

import click
import psycopg
import sqlalchemy.exc
from sqlalchemy import URL

from apoq.cli.commands import COMMANDS
from apoq.cli.roles import as_options, needed
from apoq.cli.streams import NARROWEST, is_terminal
from apoq.errors import ApoqError, InvalidTask, InvalidURL, SchemaMismatch, UnsupportedDatabase
from apoq.migrations.prepare import NO_ENCODING
from apoq.monitor.formatting import clean
from apoq.postgres.connections import is_denied
from apoq.postgres.urls import without_password


class Failure(click.ClickException):
    """Ends the command with one message on stderr."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the message; on a terminal, wrapped between words."""
        file = file or sys.stderr
        if file is None:
            return  # it is closed, and stdout is for the results
        text = "\n".join(map(clean, f"Error: {self.format_message()}".splitlines()))
        if is_terminal(file):
            text = click.wrap_text(text, max(shutil.get_terminal_size().columns, NARROWEST))
        click.echo(text, file=file)


class BadUsage(Failure):
    """The command line or a setting is wrong."""

    exit_code = 2  # like click's own


class Unreachable(Failure):
    """The database doesn't respond, or rejects the connection."""

    exit_code = 3


class NotReady(Failure):
    """apoq's tables are missing, or don't have the version of this library."""

    exit_code = 4


_MIGRATE: Final = "create or upgrade apoq's tables with `apoq migrate`"
_UTF8: Final = "use a database whose encoding is UTF8"

_UNREACHABLE: Final = "the database{at} can't be reached: {message}: "
_AWAY: Final = (
    Unreachable,
    _UNREACHABLE + "check that the server runs, and that host, user, password and database are right",
)

SENTENCES: Final[dict[str, tuple[type[Failure], str]]] = {
    "08": _AWAY,
    "0A": (
        Failure,
        "the server doesn't support this: {message}: run `apoq doctor` to see why",
    ),
    "22021": (Failure, f"a text can't be stored in the database's encoding: {{message}}: {_UTF8}"),
    "22P05": (Failure, f"a character doesn't exist in the database's encoding: {{message}}: {_UTF8}"),
    "25006": (
        Failure,
        (
            "the database{at} is read-only: {message}: connect to the primary; if this is the primary, run "
            "`apoq doctor` to see which setting to reset"
        ),
    ),
    "25P03": (
        Failure,
        "the server ended the session: {message}: raise idle_in_transaction_session_timeout for this role",
    ),
    "25P04": (Failure, "the server ended the session: {message}: raise transaction_timeout for this role"),
    "28": (
        Unreachable,
        _UNREACHABLE + "check user and password, or allow the connection in pg_hba.conf",
    ),
    "3D": (Unreachable, _UNREACHABLE + "create the database, or correct its name"),
    "3F": (
        NotReady,
        "{message}: give a schema with --schema, or set this role's search_path to one that exists",
    ),
    "40": (Failure, "another transaction interfered: {message}: try again"),
    "42501": (Failure, "{message}: use another role, or as the owner of the tables, {grants}"),
    "42703": (NotReady, f"{{message}}: {_MIGRATE}"),
    "42P01": (NotReady, f"{{message}}: {_MIGRATE}"),
    "53": (Failure, "the server has run out of a resource: {message}: free some there, and try again"),
    "53300": (Unreachable, _UNREACHABLE + "close some connections, use a pooler, or raise max_connections"),
    "55P03": (Failure, "another session holds a lock: {message}: try again when its transaction has ended"),
    "57": _AWAY,
    "57014": (
        Failure,
        (
            "the server cancelled the statement: {message}: try again; after a timeout, raise "
            "statement_timeout for this role"
        ),
    ),
    "57P05": (Failure, "the server ended the session: {message}: raise idle_session_timeout for this role"),
    "58": (Failure, "the server failed: {message}: see its log"),
    "XX": (Failure, "the server failed: {message}: see its log"),
}
"""The messages for errors of the server, by their SQLSTATE or the class of that."""

_OTHER: Final = (
    Failure,
    (
        "the database refused the statement: {message} (SQLSTATE {state}): if this comes from a trigger, "
        "rule or constraint on apoq's tables, change that"
    ),
)


Lacking = Callable[[str], list[str]]
"""Returns the statements that grant what the role lacks, for a message of the server."""


@contextmanager
def explained(url: URL | None = None, lacking: Lacking | None = None) -> Iterator[None]:
    """Turn errors of the database and of apoq into a `Failure`; any other error is a bug, and passes."""
    try:
        yield
    except SchemaMismatch as error:
        raise NotReady(_in_one_line(error)) from error
    except (InvalidTask, InvalidURL, UnsupportedDatabase) as error:
        raise BadUsage(_in_one_line(error)) from error
    except ApoqError as error:
        raise Failure(_in_one_line(error)) from error
    except (sqlalchemy.exc.DBAPIError, psycopg.Error) as error:
        raise explanation(getattr(error, "orig", None) or error, url, lacking) from error
    except sqlalchemy.exc.TimeoutError as error:
        raise Failure(f"no connection was free: {error.args[0]}: raise the engine's pool_size") from error
    except (AssertionError, TypeError) as error:
        failure = _not_understood(error)
        if failure is None:
            raise
        raise failure from error


def explanation(error: BaseException, url: URL | None = None, lacking: Lacking | None = None) -> Failure:
    """Return what to say about an error of psycopg or of the server."""
    state = getattr(error, "sqlstate", None) or ""
    kind, sentence = SENTENCES.get(state) or SENTENCES.get(state[:2]) or _OTHER
    if not state:
        kind, sentence = _without_a_state(error)
    at = "" if url is None else f" at {shown(url)}"
    message = _message(error)
    grants = _grants(message, lacking) if is_denied(error) else ""
    return kind(sentence.format(message=message, at=at, state=state, grants=grants))


def _grants(message: str, lacking: Lacking | None) -> str:
    """Return the grants that are missing, or else the command that prints them."""
    found = [] if lacking is None else lacking(message)
    return "; ".join(found) if found else f"grant what `apoq grants {as_options(*needed())}` prints"


def _without_a_state(error: BaseException) -> tuple[type[Failure], str]:
    if isinstance(error, psycopg.ProgrammingError):
        # From libpq before it connects, such as for an unknown option in the URL of an application's engine.
        return BadUsage, "the engine can't connect: {message}: check its URL and its connect_args"
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return _AWAY
    return Failure, "the value can't be sent to the database, or read from it: {message}"


def _message(error: Any) -> str:
    """Return the text of an error on one line."""
    said = getattr(error, "diag", None)
    if said is not None and said.message_primary:
        parts = filter(None, (said.message_primary, said.message_detail, said.message_hint))
        text = ". ".join(part.rstrip(".") for part in parts)
    else:
        text = re.sub(r"(?<=\w)\n", ". ", str(error))  # libpq's messages have several lines
    return _in_one_line(text)


def _in_one_line(text: object) -> str:
    return without_password(" ".join(str(text).split()))


def _not_understood(error: Exception) -> Failure | None:
    """Return what it means if SQLAlchemy can't read what a new connection returns."""
    if isinstance(error, TypeError) and "bytes-like" in str(error):
        return NotReady(NO_ENCODING)
    if str(error).startswith("Could not determine version"):
        return Failure(f"the server must be PostgreSQL 15 or later: {error}")
    return None


def shown(url: URL) -> str:
    """Return where a URL leads, without the password."""
    query = {name: value for name, value in url.query.items() if name in {"host", "port", "service"}}
    place = url.set(
        query=query,
        drivername="postgresql",
        # Before an @ may be a part of a password that isn't percent-encoded.
        host=url.host and url.host.rpartition("@")[2],
        database=url.database and url.database.rpartition("@")[2],
    ).render_as_string(hide_password=True)
    for code, character in {"%2F": "/", "%3A": ":", "%2C": ","}.items():
        place = place.replace(code, character)
    return place


def warn(message: str) -> None:
    """Write a note to stderr, apart from the results."""
    click.echo(message, err=True)


_OURS: Final = re.compile(rf"((python -m )?flask )?(?<![\w.-])apoq ({'|'.join(COMMANDS)})\b")

UPGRADE: Final = "apoq.upgrade"
"""Where a context's ``meta`` has the command that upgrades the database by the project's own migrations."""


def in_this_program(text: str, context: click.Context | None = None) -> str:
    """Name commands as the user calls them, in a text that says `apoq migrate` or `alembic upgrade head`.

    If apoq's commands are part of another program, such as ``flask apoq``, that is its name.
    """
    context = context or click.get_current_context(silent=True)
    while context is not None and not isinstance(context.command, click.Group):
        context = context.parent
    if context is None or context.parent is None:
        return text
    text = text.replace("alembic upgrade head", context.meta.get(UPGRADE, "alembic upgrade head"))
    return _OURS.sub(lambda call: f"{context.command_path} {call[3]}", text)
