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

from apoq.cli.streams import NARROWEST, is_terminal
from apoq.errors import ApoqError, SchemaMismatch
from apoq.migrations.prepare import NO_ENCODING
from apoq.monitor.formatting import clean
from apoq.postgres.urls import without_password


class Failure(click.ClickException):
    """Ends the command with one message on stderr: the answer is no, or it didn't work."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Write it, on a terminal with its lines broken between words."""
        file = file or sys.stderr
        if file is None:
            return  # it was closed, and stdout has what programs read
        text = "\n".join(map(clean, f"Error: {self.format_message()}".splitlines()))
        if is_terminal(file):
            text = click.wrap_text(text, max(shutil.get_terminal_size().columns, NARROWEST))
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


_MIGRATE: Final = "bring apoq's tables up to date with `apoq migrate`"
_UTF8: Final = "use a database whose encoding is UTF8"

_UNREACHABLE: Final = "the database{at} can't be reached: {message}: "
_AWAY: Final = (
    Unreachable,
    _UNREACHABLE + "see that the server is up, and that host, user, password and database are right",
)

SENTENCES: Final[dict[str, tuple[type[Failure], str]]] = {
    "08": _AWAY,
    "0A": (Failure, "the server doesn't support that: {message}: `apoq doctor` says if apoq works there"),
    "22021": (Failure, f"text is not in the database's encoding: {{message}}: {_UTF8}"),
    "22P05": (Failure, f"the database's encoding doesn't have all of this text: {{message}}: {_UTF8}"),
    "25006": (
        Failure,
        (
            "the database{at} is read-only: {message}: connect to the primary, or if this is it, let "
            "`apoq doctor` say which setting to reset"
        ),
    ),
    "25P03": (
        Failure,
        "the session was ended: {message}: raise idle_in_transaction_session_timeout for this role",
    ),
    "25P04": (Failure, "the session was ended: {message}: raise transaction_timeout for this role"),
    "28": (Unreachable, _UNREACHABLE + "give the right user and password, or let pg_hba.conf let it in"),
    "3D": (Unreachable, _UNREACHABLE + "create it, or correct its name"),
    "3F": (
        NotReady,
        "{message}: name a schema with --schema, or let this role's search_path lead to one that exists",
    ),
    "40": (Failure, "another transaction was in the way: {message}: try again"),
    "42501": (
        Failure,
        "{message}: use a role that may do that; `apoq doctor` shows what to grant to a worker",
    ),
    "42703": (NotReady, f"{{message}}: {_MIGRATE}"),
    "42P01": (NotReady, f"{{message}}: {_MIGRATE}"),
    "53": (Failure, "the server has run out of something: {message}: make room there, and try again"),
    "53300": (Unreachable, _UNREACHABLE + "end some, put a pooler in between, or raise max_connections"),
    "55P03": (Failure, "another session holds a lock: {message}: try again when it has ended"),
    "57": _AWAY,
    "57014": (
        Failure,
        (
            "the server has cancelled the statement: {message}: try again; if that was a timeout, raise "
            "statement_timeout for this role"
        ),
    ),
    "57P05": (Failure, "the session was ended: {message}: raise idle_session_timeout for this role"),
    "58": (Failure, "the server has failed: {message}: see its log"),
    "XX": (Failure, "the server has failed: {message}: see its log"),
}
"""What to say of an error from the server, by its SQLSTATE, or else by that one's class."""

_OTHER: Final = (
    Failure,
    (
        "the database has refused that: {message} (SQLSTATE {state}): if a trigger, rule or constraint on "
        "apoq's tables did so, change that"
    ),
)


@contextmanager
def explained(url: URL | None = None) -> Iterator[None]:
    """Turn what can go wrong outside of the program into a `Failure`; anything else is a bug, and passes."""
    try:
        yield
    except SchemaMismatch as error:
        raise NotReady(_in_one_line(error)) from error
    except ApoqError as error:
        raise Failure(_in_one_line(error)) from error
    except (sqlalchemy.exc.DBAPIError, psycopg.Error) as error:
        raise explanation(getattr(error, "orig", None) or error, url) from error
    except sqlalchemy.exc.TimeoutError as error:
        raise Failure(f"no connection was free: {error.args[0]}: give the engine a larger pool") from error
    except (AssertionError, TypeError) as error:
        failure = _not_understood(error)
        if failure is None:
            raise
        raise failure from error


def explanation(error: BaseException, url: URL | None = None) -> Failure:
    """Return what to say of an error of psycopg's, or of the server's."""
    state = getattr(error, "sqlstate", None) or ""
    kind, sentence = SENTENCES.get(state) or SENTENCES.get(state[:2]) or _OTHER
    if not state:
        kind, sentence = _without_a_state(error)
    at = "" if url is None else f" at {shown(url)}"
    return kind(sentence.format(message=_message(error), at=at, state=state))


def _without_a_state(error: BaseException) -> tuple[type[Failure], str]:
    if isinstance(error, psycopg.ProgrammingError):
        # libpq's, before it connects: such as of an option in the URL of an application's engine.
        return BadUsage, "the engine can't connect: {message}; look at its URL and its connect_args"
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return _AWAY
    return Failure, "that can't be exchanged with the database: {message}"


def _message(error: Any) -> str:
    """Return an error's text in one line."""
    said = getattr(error, "diag", None)
    if said is not None and said.message_primary:
        parts = filter(None, (said.message_primary, said.message_detail, said.message_hint))
        text = ". ".join(part.rstrip(".") for part in parts)
    else:
        text = re.sub(r"(?<=\w)\n", ". ", str(error))  # libpq's has several lines
    return _in_one_line(text)


def _in_one_line(text: object) -> str:
    return without_password(" ".join(str(text).split()))


def _not_understood(error: Exception) -> Failure | None:
    """Return what it means that SQLAlchemy can't read a new connection's answers."""
    if isinstance(error, TypeError) and "bytes-like" in str(error):
        return NotReady(NO_ENCODING)
    if str(error).startswith("Could not determine version"):
        return Failure(f"this is not PostgreSQL: {error}: use PostgreSQL 15 or later")
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
    click.echo(message, err=True)
