"""Read-only snapshots of the database, for pages that are looked at every few seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import sqlalchemy as sa

from apoq.migrations import check
from apoq.postgres.watchdog import watch

STATEMENT_TIMEOUT_SECONDS: Final = 2.0
"""Seconds after which the server cancels a statement."""

SILENCE_SECONDS: Final = 5.0
"""Seconds after which a server that doesn't respond is unreachable."""

SETTINGS: Final = f"""
    SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY;
    SET LOCAL statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s';
    SET LOCAL lock_timeout = '1s';
    SET LOCAL enable_seqscan = off;
    SET LOCAL enable_bitmapscan = off;
    SET LOCAL jit = off
"""
# One snapshot, so that the numbers of a page agree. Indexes only, as in `apoq.postgres.connections`.


@contextmanager
def snapshot(engine: sa.Engine, schema: str | None) -> Iterator[sa.Connection]:
    """Open a read-only transaction with one snapshot, on one of apoq's own engines.

    Raises `SchemaMismatch` if the tables don't have this library's version.
    """
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        with watch.awaiting(driver, SILENCE_SECONDS, engine), connection.begin():
            connection.exec_driver_sql(SETTINGS)
            check(connection, schema)
            yield connection
