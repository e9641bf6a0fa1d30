"""Lets tests run as roles with the grants of `apoq grants`: `APOQ_TEST_AS_ROLES=1 pytest …`.

The statements of apoq run as the role of the program that would send them: a worker, a caller, a reader or an
operator. Those of the tests themselves, which arrange and look, are the owner's, and so are migrations. Whose
a statement is shows in the stack: the role is set before each statement, on the owner's connections.
"""

from __future__ import annotations

import importlib
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final

import psycopg
import sqlalchemy as sa
from psycopg.pq import TransactionStatus
from sqlalchemy.util import greenlet_spawn

from apoq.schema import grants
from apoq.schema.grants import OPERATOR, PRODUCER, READER, WORKER, Options

ROOT: Final = str(Path(__file__).parent.parent)
READER_OF_DATA: Final = "reader_of_data"

DATABASES: Final = "apoq_test_"
"""What the names of the tests' databases begin with, on the server that has the roles."""

RIGHTS: Final[Mapping[str, tuple[str, Options]]] = {
    WORKER: (WORKER, Options()),
    PRODUCER: (PRODUCER, Options(may_cancel=True, may_wait=True, may_schedule=True, may_link=True)),
    OPERATOR: (OPERATOR, Options()),
    READER: (READER, Options()),
    READER_OF_DATA: (READER, Options(with_data=True)),
}
"""The kinds of roles, as arguments of `grants.statements`."""

SENDERS: Final[Mapping[str, str | None]] = {
    "apoq.testing": None,
    "apoq.cli.migrate": None,
    "apoq.cli.revision": None,
    "apoq.cli.grants": None,
    "apoq.cli.demo": None,
    "apoq.worker": WORKER,
    "apoq.cli.worker": WORKER,
    "apoq.cli.doctor": WORKER,
    "apoq.cli.add": PRODUCER,
    **dict.fromkeys((f"apoq.cli.{its}" for its in ("stats", "check", "health", "metrics")), READER),
    **dict.fromkeys(
        (f"apoq.cli.{its}" for its in ("cancel", "retry", "pause", "resume", "prune", "schedules", "limits")),
        OPERATOR,
    ),
    "apoq.dashboard": OPERATOR,
    "apoq.cli": READER_OF_DATA,
    "apoq.metrics": READER,
    "apoq.client": PRODUCER,
    "apoq.monitor": READER_OF_DATA,
}
"""The kinds of the programs whose statements these modules send. The first that is in the stack decides."""

EXECUTING: Final = ("execute", "executemany", "copy")
"""The methods of cursors that execute statements."""

MIGRATING: Final = {"prepare", "_prepare", "_prepare_async", "upgrade", "downgrade"}
"""The functions of `apoq.migrations` that only the owner calls."""


class Roles:
    """The roles of one server."""

    def __init__(self, owner: sa.URL) -> None:
        self._owner = owner.username
        prefix = f"apoq_{uuid.uuid4().hex[:8]}"
        self._names = {kind: f"{prefix}_{kind}" for kind in RIGHTS}

    def create(self, admin: sa.Engine) -> None:
        """Create them; they can do nothing."""
        with admin.connect() as connection:
            for name in self._names.values():
                connection.exec_driver_sql(f"CREATE ROLE {name}")
            # Workers that log in as their role see the sessions of each other. These log in as the owner.
            connection.exec_driver_sql(f"GRANT pg_read_all_stats TO {self._names[WORKER]}")

    def drop(self, admin: sa.Engine) -> None:
        """Drop them, as far as no database is left in which they have rights."""
        with suppress(sa.exc.DBAPIError), admin.connect() as connection:
            for name in self._names.values():
                connection.exec_driver_sql(f"DROP ROLE {name}")

    def _is_ours(self, user: str, database: str) -> bool:
        return user == self._owner and database.startswith(DATABASES)

    def grant(self, connection: sa.Connection, schema: str | None) -> None:
        """Grant what `apoq grants` prints, on the tables in a schema, and nothing to anybody else."""
        info = connection.connection.driver_connection.info
        if not self._is_ours(info.user, info.dbname):
            return
        place = grants.find(connection, schema)
        assert place is not None
        connection.exec_driver_sql(f"REVOKE ALL ON SCHEMA {place.schema} FROM PUBLIC")
        everybody = ", ".join(self._names.values())
        # The tests' own tables: a worker commits what processors have written to them.
        for kind in ("TABLES", "SEQUENCES"):
            connection.exec_driver_sql(f"GRANT ALL ON ALL {kind} IN SCHEMA {place.schema} TO {everybody}")
            connection.exec_driver_sql(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON {kind} TO {everybody}")
        for its in (*place.tables.values(), *filter(None, [place.sequence])):
            connection.exec_driver_sql(f"REVOKE ALL ON {its} FROM {everybody}")
        for name, (kind, options) in RIGHTS.items():
            for statement in grants.statements(place, kind, self._names[name], options):
                connection.exec_driver_sql(statement)

    def wanted(self, connection: Any) -> str | None:
        """Return the statement that sets the role of the next one, if another role may be set."""
        if connection.closed or not self._is_ours(connection.info.user, connection.info.dbname):
            return None  # a test connects as a role of its own, or to a server of its own
        if connection.pgconn.transaction_status == TransactionStatus.INERROR:
            return None  # all that can follow is a rollback, which restores the role
        kind = _sender()
        known = vars(connection)
        if kind is None:
            return "SET ROLE NONE" if "apoq_role" in known else None
        known["apoq_role"] = kind
        return f"SET ROLE {self._names[kind]}"


@contextmanager
def running_as_roles(admin: sa.Engine) -> Iterator[None]:
    """Let apoq's statements run as roles, in databases that are prepared meanwhile."""
    roles = Roles(admin.url)
    roles.create(admin)
    preparing = importlib.import_module("apoq.migrations.prepare")
    migrate = preparing.upgrade

    def upgrade(op: Any, *, schema: str | None = None) -> None:
        migrate(op, schema=schema)
        roles.grant(op.get_bind(), schema)

    preparing.upgrade = upgrade
    try:
        with _setting(roles):
            yield
    finally:
        preparing.upgrade = migrate
        roles.drop(admin)


@contextmanager
def _setting(roles: Roles) -> Iterator[None]:
    """Set the role before each statement that a cursor of psycopg executes."""
    known = {
        (cls, name): vars(cls)[name] for cls in (psycopg.Cursor, psycopg.AsyncCursor) for name in EXECUTING
    }
    for (cls, name), method in known.items():
        set_role = _set_role(roles, known[cls, "execute"])
        wrap = _after if cls is psycopg.Cursor else _copy_after if name == "copy" else _await_after
        setattr(cls, name, wrap(set_role, method))
    try:
        yield
    finally:
        for (cls, name), method in known.items():
            setattr(cls, name, method)


def _set_role(roles: Roles, execute: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a function that sets the role for the next statement of a cursor."""

    def set_role(cursor: Any) -> Any:
        statement = roles.wanted(cursor.connection)
        other = psycopg.Cursor if isinstance(cursor, psycopg.Cursor) else psycopg.AsyncCursor
        return execute(other(cursor.connection), statement, prepare=False) if statement else None

    return set_role


def _after(set_role: Callable[[Any], Any], method: Callable[..., Any]) -> Callable[..., Any]:
    def execute(cursor: Any, *arguments: Any, **options: Any) -> Any:
        set_role(cursor)
        return method(cursor, *arguments, **options)

    return execute


def _await_after(set_role: Callable[[Any], Any], method: Callable[..., Any]) -> Callable[..., Any]:
    async def execute(cursor: Any, *arguments: Any, **options: Any) -> Any:
        if setting := set_role(cursor):
            await setting
        return await method(cursor, *arguments, **options)

    return execute


def _copy_after(set_role: Callable[[Any], Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @asynccontextmanager
    async def copy(cursor: Any, *arguments: Any, **options: Any) -> Any:
        if setting := set_role(cursor):
            await setting
        async with method(cursor, *arguments, **options) as copying:
            yield copying

    return copy


def _sender() -> str | None:
    """Return the kind of role that sends the current statement; None for the owner."""
    found = list(_calls(sys._getframe(1)))
    if not found or not _is_apoqs(found[0][0]):
        return None
    names = [(module, function) for module, function in found if _is_apoqs(module)]
    if any(module.startswith("apoq.migrations") and function in MIGRATING for module, function in names):
        return None
    for prefix, kind in SENDERS.items():
        if any(module == prefix or module.startswith(f"{prefix}.") for module, _ in names):
            return kind
    return None


def _calls(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    """Yield the modules and functions of apoq and of the tests that are being called, the innermost first."""
    while frame is not None:
        code = frame.f_code
        if code is greenlet_spawn.__code__:
            # What SQLAlchemy runs for an asyncio session is on a stack of its own.
            yield from _calls(frame.f_locals["context"].gr_frame)
        module = frame.f_globals.get("__name__", "")
        is_ours = code.co_filename.startswith(ROOT) and "site-packages" not in code.co_filename
        if (is_ours or _is_apoqs(module)) and code.co_filename != __file__:
            yield module, code.co_name
        frame = frame.f_back


def _is_apoqs(module: str) -> bool:
    return module == "apoq" or module.startswith("apoq.")
