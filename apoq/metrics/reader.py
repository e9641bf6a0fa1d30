"""Reads the database for the metrics, within a time limit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import psycopg
import sqlalchemy as sa
import sqlalchemy.exc

from apoq.errors import ApoqError
from apoq.migrations import check
from apoq.monitor.stats import Figures, figures
from apoq.postgres.connections import is_away, is_denied, own_engine
from apoq.postgres.loaders import read_anything
from apoq.postgres.messages import brief
from apoq.postgres.watchdog import watch
from apoq.schema.statements.count import count_waiting
from apoq.schema.statements.schedules import lateness
from apoq.schema.statements.server import vacuuming
from apoq.tracing import untraced

logger = logging.getLogger("apoq.metrics")

REASONS: Final = ("parents", "key", "pool", "other")
"""The reasons for which tasks wait."""


@dataclass
class Reading:
    """The figures that a scrape has read; a part that could not be read is None."""

    figures: Figures | None = None
    waiting: dict[str, dict[str, int]] = field(default_factory=dict)
    """Waiting tasks by queue and reason."""
    schedule_late: float | None = None
    """Seconds by which the latest schedule is late."""
    dead_tuples: int | None = None
    is_complete: bool = False
    is_done: threading.Event = field(default_factory=threading.Event)


class Reader:
    """Reads all that the metrics need: each time on a new thread and connection, but only one at a time."""

    def __init__(self, engine: sa.Engine, schema: str | None, timeout: float) -> None:
        self._engine = own_engine(engine)
        self._schema = schema
        self._timeout = timeout
        self._lock = threading.Lock()
        self._under_way: Reading | None = None
        self._told: set[str] = set()
        self._parts = {
            "the tasks and the workers": self._read_figures,
            "the schedules": self._read_schedules,
            "the statistics of the table": self._read_table,
        }

    def read(self) -> Reading:
        """Return what was read within the timeout: nothing, if the database doesn't respond."""
        with self._lock:
            # Simultaneous scrapes share a reading, so a database that hangs holds up a single thread.
            reading = self._under_way
            if reading is None:
                reading = self._under_way = Reading()
                try:
                    threading.Thread(
                        target=self._fill, args=(reading,), name="apoq-metrics", daemon=True
                    ).start()
                except RuntimeError as error:  # the system allows no more threads
                    self._under_way = None
                    self._tell("the database", str(error))
                    return reading
        if not reading.is_done.wait(self._timeout):
            self._tell("the database", f"it hasn't responded within {self._timeout:g} s")
            return Reading()
        return reading

    def _fill(self, reading: Reading) -> None:
        try:
            reading.is_complete = self._fill_parts(reading)
            if reading.is_complete:
                self._told.clear()
        finally:
            self._engine.dispose()
            with self._lock:
                self._under_way = None
            reading.is_done.set()

    def _fill_parts(self, reading: Reading) -> bool:
        """Read each part; one that can't be read, as without a privilege, is logged once."""
        is_complete = True
        for name, part in self._parts.items():
            try:
                with self._connected() as connection:
                    part(connection, reading)
            except (sqlalchemy.exc.SQLAlchemyError, psycopg.Error, ApoqError, OSError) as error:
                is_complete = False
                if is_away(error):
                    self._tell("the database", brief(error))
                    break
                hint = ": grant what `apoq grants --reader ROLE` prints" if is_denied(error) else ""
                self._tell(name, f"{brief(error)}{hint}")
            else:
                self._told.discard(name)
        return is_complete

    def _tell(self, name: str, text: str) -> None:
        if name not in self._told:
            self._told.add(name)
            logger.warning("the metrics lack %s until they can be read: %s", name, text)

    @contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        """Open a read-only transaction; if the server is silent for too long, its connection is closed."""
        with untraced(), self._engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert isinstance(driver, psycopg.Connection)
            read_anything(driver)
            with watch.awaiting(driver, self._timeout, self._engine), connection.begin():
                milliseconds = max(1, round(self._timeout * 1_000))
                connection.exec_driver_sql(
                    f"SET TRANSACTION READ ONLY; SET LOCAL statement_timeout = {milliseconds}"
                )
                yield connection

    def _read_figures(self, connection: sa.Connection, reading: Reading) -> None:
        check(connection, self._schema)
        found = figures(connection, self._schema)
        for queue in found.queues:
            if queue.waiting:
                counts = reading.waiting[queue.name] = dict.fromkeys(REASONS, 0)
                for reason, number in connection.execute(
                    count_waiting(self._schema), {"from_queue": queue.name}
                ):
                    counts[reason if reason in REASONS else "other"] += number
        reading.figures = found

    def _read_schedules(self, connection: sa.Connection, reading: Reading) -> None:
        late: float | None = connection.execute(lateness(self._schema)).scalar_one()
        reading.schedule_late = 0.0 if late is None else max(0.0, late)

    def _read_table(self, connection: sa.Connection, reading: Reading) -> None:
        row = connection.execute(vacuuming(self._schema)).mappings().first()
        reading.dead_tuples = None if row is None else row["n_dead_tup"]
