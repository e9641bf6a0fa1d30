"""The errors that apoq raises.

.. code-block:: text

    ApoqError
    ├── InvalidTask            (ValueError)   a type, data or an option that no task can have
    │   └── InvalidData                       data that jsonb can't hold or a task can't get back
    ├── InvalidProcessor       (ValueError)   a processor, or its retry options, that can't be used
    ├── InvalidArguments         (ValueError)   a typed task's data that doesn't fit its function
    ├── InvalidURL             (ValueError)   a database's URL that can't be read, or has unknown options
    ├── UnsupportedDatabase    (TypeError)    not PostgreSQL through psycopg 3, or tables that can't be worked
    ├── UnsupportedSession     (TypeError)    not something that a task can be added through
    ├── SchemaMismatch                           apoq's tables are missing, at another version, or lack ids
    ├── SessionMisused                        `task.session` was committed, or ended its own task
    └── apoq.pyramid.Misconfigured (ConfigurationError)
                                              a setting or a processor that an application can't have

A call that makes no sense by itself is a TypeError or a ValueError, as anywhere in Python.
`apoq.embedded.EmbeddedUnavailable` stands apart: its module needs the standard library alone.
"""

from __future__ import annotations

import reprlib
import shlex

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def glimpse(value: object) -> str:
    """Show a value in a message: briefly, and even where its own repr is endless or raises."""
    try:
        return _short.repr(value)
    except Exception:  # noqa: BLE001 - such as that of an int with too many digits
        return f"<{type(value).__qualname__}>"


class ApoqError(Exception):
    """Every error of apoq's own."""


class InvalidTask(ApoqError, ValueError):
    """A type, data or an option that no task can have; no row was written."""


class InvalidData(InvalidTask):
    """Data that PostgreSQL's jsonb can't hold, or that a typed task would get back changed.

    `path` says where, as in ``data['user']['joined']``.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class InvalidProcessor(ApoqError, ValueError):
    """A processor that can't be configured: its type has one already, or its options make no sense."""


class InvalidArguments(ApoqError, ValueError):
    """A typed task's data that doesn't fit the parameters of its function (any more); this attempt fails."""


class InvalidURL(ApoqError, ValueError):
    """A database's URL that can't be read, or has options that libpq doesn't know; never with a password."""


class UnsupportedDatabase(ApoqError, TypeError):
    """A database other than PostgreSQL, a driver other than psycopg 3, or a task table of another kind.

    Also an engine or a session whose `schema_translate_map` would move apoq's tables.
    """


class UnsupportedSession(ApoqError, TypeError):
    """Something that a task can't be added through."""


class SchemaMismatch(ApoqError):
    """apoq's tables are missing, at another version than this library's, or give new tasks no free ids."""


def preparing(schema: str | None) -> str:
    """Say how the tables are brought up to date, for such an error's message."""
    option = "" if schema is None else f" --schema {shlex.quote(schema)}"
    arguments = "engine" if schema is None else f"engine, schema={schema!r}"
    return (
        f"run `apoq migrate{option}`, `apoq.prepare({arguments})`, or `alembic upgrade head` where your "
        "migrations include apoq's"
    )


class SessionMisused(ApoqError):
    """A processor committed ``task.session``, as only the worker does, or ended or deleted its task there."""
