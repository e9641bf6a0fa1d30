"""The server for all measurements, with a new database for each."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import psycopg
from sqlalchemy.engine import URL, make_url

from apoq.embedded import PostgreSQL

COUNTING = {"shared_preload_libraries": "pg_stat_statements"}


class Server:
    """The server of DATABASE_URL, or else a private one with PostgreSQL's default settings."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._url: URL | None = None
        self._counting: URL | None = None
        self._templates: dict[tuple[URL, str], str] = {}
        self.is_own = not os.environ.get("DATABASE_URL")

    def __enter__(self) -> Self:
        self._url = self._own() if self.is_own else make_url(os.environ["DATABASE_URL"])
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _own(self, settings: dict[str, str] | None = None) -> URL:
        return make_url(self._stack.enter_context(PostgreSQL(settings=settings)).url)

    @contextmanager
    def database(self, name: str, prepare: Callable[[str], None], *, counting: bool = False) -> Iterator[str]:
        """Create a database for a `with` block, with the tables that `prepare` creates for `name`.

        `counting`: on a server that counts statements. It is a separate private server, because counting
        costs some time.
        """
        if counting and self.is_own and self._counting is None:
            self._counting = self._own(COUNTING)
        server = self._counting if counting and self._counting else self._url
        assert server is not None
        with psycopg.connect(_libpq(server), autocommit=True) as admin:
            if (server, name) not in self._templates:
                template = self._create(admin, "template0")
                self._stack.callback(self._drop, server, template)
                prepare(_libpq(server.set(database=template)))
                self._templates[server, name] = template
            database = self._create(admin, self._templates[server, name])
        try:
            yield _libpq(server.set(database=database))
        finally:
            self._drop(server, database)

    def _create(self, admin: psycopg.Connection[Any], template: str) -> str:
        name = f"bench_{uuid4().hex[:10]}"
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template} ENCODING 'UTF8'")
        return name

    def _drop(self, server: URL, name: str) -> None:
        with psycopg.connect(_libpq(server), autocommit=True) as admin:
            admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def describe(self) -> dict[str, Any]:
        """Return the properties of the machine and the server."""
        assert self._url is not None
        names = ("server_version", "fsync", "synchronous_commit", "shared_buffers", "autovacuum", "wal_level")
        with psycopg.connect(_libpq(self._url), autocommit=True) as connection:
            shown = {name: connection.execute(f"SHOW {name}").fetchone()[0] for name in names}  # type: ignore[index]
        return {
            "cores": os.cpu_count(),
            "processor": _processor(),
            "python": platform.python_version(),
            **shown,
        }


def _libpq(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
