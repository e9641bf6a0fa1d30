"""Problems of the database, as a page says them: what is wrong, and what to do."""

from __future__ import annotations

from typing import NamedTuple

import psycopg
import sqlalchemy.exc

from apoq.errors import ApoqError, SchemaMismatch, UnsupportedDatabase
from apoq.postgres.connections import is_away

_LOCK_TIMEOUT = "55P03"
_NO_RIGHT = "42501"


class Problem(NamedTuple):
    """A problem of the database."""

    title: str
    text: str
    advice: str
    status: int = 503


def problem_of(error: Exception) -> Problem | None:
    """Return what an exception means; None if it is a bug.

    Nothing of the database's address is said: it may contain a password.
    """
    if isinstance(error, SchemaMismatch):
        return Problem("Another version", f"{error}".rstrip("."), "Then reload this page.")
    if isinstance(error, UnsupportedDatabase):
        return Problem("An unsupported database", f"{error}", "")
    if isinstance(error, ApoqError):
        return Problem("Not possible", f"{error}", "", 400)
    if isinstance(error, sqlalchemy.exc.TimeoutError):
        return Problem("Too busy", "No database connection was free.", "Try again in a moment.")
    return _of_database(getattr(error, "orig", None) or error)


def _of_database(cause: BaseException) -> Problem | None:
    state = getattr(cause, "sqlstate", None) or ""
    if isinstance(cause, psycopg.errors.QueryCanceled):
        text = "A statement took too long and was cancelled."
        return Problem("The database is slow", text, "Choose a queue or a state, or try again later.")
    if state == _LOCK_TIMEOUT:
        text = "Another transaction has locked a row or a table that is needed here."
        return Problem("A row is locked", text, "Try again when that transaction has ended.")
    if state == _NO_RIGHT:
        message = getattr(getattr(cause, "diag", None), "message_primary", None) or "a right is missing"
        advice = "Use a role that may do this, or grant what `apoq grants --operator ROLE` prints."
        return Problem("A right is missing", f"{message}.", advice, 403)
    if is_away(cause):
        text = "The database can't be reached, or doesn't respond."
        return Problem("The database is away", text, "This page will work again when it responds.")
    if isinstance(cause, psycopg.Error):
        message = getattr(getattr(cause, "diag", None), "message_primary", None) or type(cause).__name__
        return Problem("The database refused", f"{message}.", "`apoq doctor` may say why.")
    return None
