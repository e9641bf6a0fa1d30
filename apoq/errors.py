"""The errors that apoq raises.

.. code-block:: text

    ApoqError
    ├── InvalidTask (ValueError): a type, data or an option that a task can't have
    │   └── InvalidData: data that jsonb can't store, or that would come back changed
    ├── InvalidLimit (ValueError): a limit that can't be, or that contradicts another one
    ├── InvalidSchedule (ValueError): times or options that a schedule can't have, or a name that is taken
    ├── InvalidProcessor (ValueError): an invalid processor, or a second one for a type
    ├── InvalidArguments (ValueError): a typed task's data doesn't fit its function
    ├── InvalidURL (ValueError): a database URL that can't be read
    ├── NoResult: the task has no result, or not yet, or one that doesn't fit its function
    ├── TaskGone: the task that is waited for doesn't exist
    ├── WaitTimeout (TimeoutError): the task that is waited for hasn't ended in time
    ├── DuplicateTask: the unique key is held by another task, and on_conflict is "raise"
    ├── UnsupportedDatabase (TypeError): not PostgreSQL through psycopg 3
    ├── UnsupportedSession (TypeError): not a session that a task can be added through
    ├── SchemaMismatch: apoq's tables are missing or at another version
    ├── SessionMisused: `task.session` was committed, or ended its own task
    └── apoq.pyramid.Misconfigured (ConfigurationError): an invalid setting or processor

A call with arguments of the wrong kind raises a plain TypeError or ValueError.
`apoq.embedded.EmbeddedUnavailable` is not an ApoqError, because its module imports only the standard library.
"""

from __future__ import annotations

import reprlib
import shlex

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def glimpse(value: object) -> str:
    """Return a short repr of a value for a message, also if its own repr is endless or raises."""
    try:
        return _short.repr(value)
    except Exception:  # noqa: BLE001 - such as that of an int with too many digits
        return f"<{type(value).__qualname__}>"


class ApoqError(Exception):
    """The base class of apoq's errors."""


class InvalidTask(ApoqError, ValueError):
    """A type, data or an option that a task can't have. Nothing was sent to the database."""


class InvalidData(InvalidTask):
    """Data that PostgreSQL's jsonb can't store, or that a typed task would get back changed.

    Attributes:
        path (str): The place in the data, such as ``data['user']['joined']``.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class DuplicateTask(ApoqError):
    """A task has the unique key already, and ``on_conflict="raise"`` was given. Nothing was added.

    The transaction can go on.

    Attributes:
        unique_key (str): The key.
        task_id (int | None): The task that has it; None if two items of one `add_many` have the same key.
    """

    def __init__(self, unique_key: str, task_id: int | None) -> None:
        holder = "another item of this call" if task_id is None else f"the task {task_id}"
        super().__init__(
            f"the unique key {unique_key!r} must be free, and {holder} has it: pass on_conflict='skip' or "
            "'replace', or catch this error"
        )
        self.unique_key = unique_key
        self.task_id = task_id


class NoResult(ApoqError):
    """A task has no result to return.

    It has not completed, its results aren't kept, or the stored one doesn't fit the function any more.
    """


class TaskGone(ApoqError):
    """The task that is waited for doesn't exist: it was never committed, was pruned, or is in another queue.

    Attributes:
        task_id (int): The task's id.
    """

    def __init__(self, task_id: int, queue: object) -> None:
        super().__init__(
            f"the task {task_id} is not in {queue!r}: it was not committed, was deleted after it had ended, "
            "or is in another queue"
        )
        self.task_id = task_id


class WaitTimeout(ApoqError, TimeoutError):
    """The task that is waited for has not ended within the timeout. It is not cancelled.

    Attributes:
        task_id (int): The task's id.
        state (str): The task's state when it was last read.
    """

    def __init__(self, task_id: int, state: str, seconds: float) -> None:
        super().__init__(f"the task {task_id} is still {state} after {seconds:.10g} s")
        self.task_id = task_id
        self.state = state


class InvalidLimit(ApoqError, ValueError):
    """A limit that is invalid, or that contradicts another one. Nothing was sent to the database."""


class InvalidSchedule(ApoqError, ValueError):
    """Times or options that a schedule can't have, or a name that another schedule has already."""


class InvalidProcessor(ApoqError, ValueError):
    """A processor that can't be used: its type already has one, or it or its options are invalid."""


class InvalidArguments(ApoqError, ValueError):
    """A typed task's stored data doesn't fit, or no longer fits, its function. The attempt fails."""


class InvalidURL(ApoqError, ValueError):
    """A database URL that can't be read, or has options that libpq doesn't know.

    The message never contains the password.
    """


class UnsupportedDatabase(ApoqError, TypeError):
    """A database other than PostgreSQL, a driver other than psycopg 3, or a task table of another kind.

    Also an engine or a session with a `schema_translate_map` that would change the schema of apoq's tables.
    """


class UnsupportedSession(ApoqError, TypeError):
    """The first argument is not a session or connection that a task can be added through."""


class SchemaMismatch(ApoqError):
    """apoq's tables are missing, are at another version, or have an id sequence that is behind.

    The message names the command that fixes it.
    """


class SessionMisused(ApoqError):
    """A processor committed ``task.session``, which only the worker may do, or ended its own task there."""


APOQ, ALEMBIC_UPGRADE = "apoq", "alembic upgrade head"
_commands = {APOQ: APOQ, ALEMBIC_UPGRADE: ALEMBIC_UPGRADE}
"""How the commands that messages name are called in this process."""


def name_commands(apoq: str = APOQ, alembic_upgrade: str = ALEMBIC_UPGRADE) -> None:
    """Set how messages name the commands; a Flask application has ``flask apoq`` and ``flask db upgrade``."""
    _commands.update({APOQ: apoq, ALEMBIC_UPGRADE: alembic_upgrade})


def command(arguments: str) -> str:
    """Return a command as it is called in this process, such as ``apoq doctor`` or ``flask apoq doctor``."""
    return f"{_commands[APOQ]} {arguments}"


def migrate_command(schema: str | None) -> str:
    """Return the command that brings the tables up to date."""
    # Flask's has no such option: it reads APOQ_SCHEMA.
    option = "" if schema is None or _commands[APOQ] != APOQ else f" --schema {shlex.quote(schema)}"
    return command("migrate") + option


def preparing(schema: str | None) -> str:
    """Return the end of a message, which says how to bring the tables up to date."""
    arguments = "engine" if schema is None else f"engine, schema={schema!r}"
    return (
        f"run `{migrate_command(schema)}`, `apoq.prepare({arguments})`, or `{_commands[ALEMBIC_UPGRADE]}` if "
        "your migrations include apoq's"
    )
