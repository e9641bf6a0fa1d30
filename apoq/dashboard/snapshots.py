"""Results of queries that are shared by all viewers for a moment."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Final, TypeVar, cast

import sqlalchemy as sa

from apoq.monitor.reading import snapshot

T = TypeVar("T")

SECONDS: Final = 2.0
"""Seconds for which a snapshot is used."""

KEPT_SECONDS: Final = 60.0
MAX_SNAPSHOTS: Final = 100
"""When and above what number old snapshots are removed from memory."""


class _Snapshot:
    """A result, or the error that there was instead."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.taken_at = float("-inf")
        self.value: Any = None
        self.error: Exception | None = None


class Snapshots:
    """Reads from the database, at most once in a while for each page, no matter how many people see it."""

    def __init__(self, engine: sa.Engine, schema: str | None) -> None:
        self._engine = engine
        self._schema = schema
        self._lock = threading.Lock()
        self._found: OrderedDict[Hashable, _Snapshot] = OrderedDict()

    def __len__(self) -> int:
        """Return how many snapshots are in memory."""
        return len(self._found)

    def get(self, key: Hashable, read: Callable[[sa.Connection], T], *, seconds: float = SECONDS) -> T:
        """Return the last result of this key if it is new enough, otherwise that of `read`.

        Viewers who ask at the same time wait for the same result. An error is also shared, for `SECONDS`: if
        the database is slow or away, it isn't asked again and again.
        """
        with self._lock:
            found = self._found.setdefault(key, _Snapshot())
            self._found.move_to_end(key)
            self._remove_old()
        with found.lock:
            if time.monotonic() - found.taken_at > (seconds if found.error is None else SECONDS):
                self._take(found, read)
            if found.error is not None:
                raise found.error.with_traceback(None)
            return cast("T", found.value)

    def _take(self, found: _Snapshot, read: Callable[[sa.Connection], Any]) -> None:
        found.value, found.error = None, None
        try:
            with snapshot(self._engine, self._schema) as connection:
                found.value = read(connection)
        except Exception as error:  # noqa: BLE001 - it is raised for each viewer
            found.error = error
        found.taken_at = time.monotonic()

    def _remove_old(self) -> None:
        """Remove those that were not asked for lately; those that are being read have no time yet."""
        oldest = time.monotonic() - KEPT_SECONDS
        while len(self._found) > 1:
            key, first = next(iter(self._found.items()))
            if len(self._found) <= MAX_SNAPSHOTS and not 0 < first.taken_at < oldest:
                break
            del self._found[key]

    def forget(self) -> None:
        """Read everything again: something was changed."""
        with self._lock:
            self._found.clear()
