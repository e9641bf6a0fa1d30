"""The database that a command works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import sqlalchemy as sa
import sqlalchemy.exc
from sqlalchemy import URL, event

from apoq.cli.exits import BadUsage, explained
from apoq.cli.roles import lacking
from apoq.errors import ApoqError
from apoq.migrations import check
from apoq.postgres.connections import prepare_where_kept
from apoq.postgres.urls import check_engine, check_untranslated, database_url

CONNECT_TIMEOUT: Final = 10
"""Seconds after which a server that doesn't respond is unreachable, unless the URL says otherwise."""

READABLE: Final = """
    SET LOCAL client_encoding = 'UTF8';
    SET LOCAL DateStyle = 'ISO';
    SET LOCAL IntervalStyle = 'postgres';
    SET LOCAL quote_all_identifiers = off
"""
"""Formats that psycopg can read, instead of those of the database, the role or the engine."""

VARIABLES: Final = ("APOQ_DATABASE_URL", "DATABASE_URL")
"""The environment variables with the database's URL; the first one that is set is used."""


class Target:
    """The database and the schema that a command uses; it connects on first use.

    Commands get it as ``ctx.obj`` (``@click.pass_obj``). ``apoq`` itself makes it from a URL, and the command
    line of a framework from an engine.
    """

    def __init__(
        self, url: str | None = None, *, schema: str | None = None, engine: sa.Engine | None = None
    ) -> None:
        self._url = url
        self._engine = engine
        self._is_own = engine is None
        self._readable: sa.Engine | None = None
        self.schema = schema

    @property
    def url(self) -> URL:
        """The database's URL, for psycopg 3. Fails if there is none, or if it can't be read."""
        if self._engine is None:
            return _read(self._url)
        check_engine(self._engine)
        check_untranslated(self._engine.get_execution_options(), self.schema)
        return self._engine.url

    @property
    def engine(self) -> sa.Engine:
        """The engine, with transactions in READ COMMITTED whose values psycopg can read."""
        if self._engine is None:
            self._engine = self.create_engine()
        if self._readable is None:
            # With its own events: the engine of an application is not changed.
            self._readable = self._engine.execution_options(isolation_level="READ COMMITTED")
            event.listen(self._readable, "begin", lambda begun: begun.exec_driver_sql(READABLE))
        return self._readable

    def create_engine(self, **options: Any) -> sa.Engine:
        """Create another engine for this database, with these options."""
        url = self.url
        defaults = {"connect_timeout": CONNECT_TIMEOUT, "client_encoding": "utf8"}
        arguments = {name: value for name, value in defaults.items() if name not in url.query}
        arguments["fallback_application_name"] = "apoq"
        engine = sa.create_engine(url, connect_args=arguments, **options)
        prepare_where_kept(engine)
        return engine

    def close(self) -> None:
        """Close the connections, if the engine was created here."""
        if self._is_own and self._engine is not None:
            self._engine.dispose()

    def explained(self) -> AbstractContextManager[None]:
        """Turn errors into one line; see `exits.explained`. It names the grants that the role lacks."""
        return explained(self.url, lambda message: lacking(self.engine, self.schema, message))

    @contextmanager
    def begin(self, *, prepared: bool = True) -> Iterator[sa.Connection]:
        """Open a transaction that commits at the end; an error ends the command with one line.

        So do tables that don't have this library's version, unless `prepared` is False.
        """
        with self.explained(), self.engine.begin() as connection:
            if prepared:
                check(connection, self.schema)
            yield connection


def _read(url: str | None) -> URL:
    if not url:
        raise BadUsage(f"no database was given: pass --database-url, or set {' or '.join(VARIABLES)}")
    try:
        return database_url(url)
    except ApoqError as error:
        raise BadUsage(str(error)) from None
