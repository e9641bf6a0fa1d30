"""The state of a dashboard: its connections, its snapshots, and its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from apoq.core.payload import check_schema
from apoq.dashboard.redaction import Redact, Redactor
from apoq.dashboard.snapshots import Snapshots
from apoq.dashboard.tokens import Tokens
from apoq.errors import glimpse
from apoq.monitor.rights import Rights, read_rights
from apoq.postgres.connections import own_engine
from apoq.postgres.urls import check_engine, check_untranslated
from apoq.postgres.watchdog import watch

RIGHTS_SECONDS: Final = 30.0
"""Seconds for which the rights of the role are not read again."""

WRITE_SETTINGS: Final = "SET LOCAL statement_timeout = '10s'; SET LOCAL lock_timeout = '2s'"
WRITE_SECONDS: Final = 30.0
"""Seconds after which a change is given up."""


class NotFound(Exception):
    """There is no such page or task."""


@dataclass
class Page:
    """The result of a handler: a template, and its values."""

    template: str
    title: str
    values: dict[str, Any] = field(default_factory=dict)
    status: int = 200
    section: str = ""
    """The entry of the navigation."""
    is_live: bool = True
    """Whether the script refreshes it."""


class Site:
    """A dashboard's connections and settings, shared by all requests."""

    def __init__(
        self,
        engine: sa.Engine | AsyncEngine,
        *,
        schema: str | None,
        redact: Redact | None,
        environment: str | None,
        secret: str | bytes | None,
    ) -> None:
        if not isinstance(engine, sa.Engine | AsyncEngine):
            raise TypeError(f"engine must be a SQLAlchemy engine, got {glimpse(engine)}")
        if redact is not None and not callable(redact):
            raise TypeError(
                f"redact must be a function of the type and the data of a task, got {glimpse(redact)}"
            )
        check_engine(engine)
        self.schema = check_schema(schema)
        check_untranslated(engine.get_execution_options(), self.schema)
        self.engine = own_engine(engine)  # type: ignore[arg-type]  # it takes both kinds
        self.snapshots = Snapshots(self.engine, self.schema)
        self.redactor = Redactor(redact)
        self.tokens = Tokens(secret, engine.url)
        self.environment = environment

    def rights(self) -> Rights:
        """Return what the role of the connections may change."""
        return self.snapshots.get(
            "rights", lambda connection: read_rights(connection, self.schema), seconds=RIGHTS_SECONDS
        )

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Open a transaction that commits at the end."""
        with self.engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            with watch.awaiting(driver, WRITE_SECONDS, self.engine), connection.begin():
                connection.exec_driver_sql(WRITE_SETTINGS)
                yield connection

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()
