"""Does the same for each queue or schema, so that one that fails doesn't hold up the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from apoq.postgres.connections import is_away
from apoq.worker.failures import Failures, Outage

K = TypeVar("K")
T = TypeVar("T")


class CircuitBreaker(Generic[K]):
    """Calls functions for each of several keys; a key for which one fails is left out for a while.

    The pause grows with each failure. If all keys fail, or the database is away, the error is raised: then
    it is the caller's loop that logs it and tries again.
    """

    def __init__(self, describe: Callable[[K], str], outage: Outage) -> None:
        """`describe` says in a log line what fails, such as "the claim from Queue('emails')"."""
        self._describe = describe
        self._outage = outage
        self._failing: dict[K, tuple[Failures, float]] = {}

    def is_failing(self, key: K) -> bool:
        """Return whether the last call for this key failed."""
        return key in self._failing

    def call(self, key: K, keys: Iterable[K], function: Callable[[], T], otherwise: T) -> T:
        """Call the function for one of the keys; return `otherwise` if it fails, or is left out now."""
        failures, next_try = self._failing.get(key, (None, 0.0))
        if time.monotonic() < next_try and self._has_others(key, keys):
            return otherwise
        try:
            result = function()
        except Exception as error:
            if is_away(error) or not self._has_others(key, keys):
                raise
            failures = failures or Failures(self._describe(key), self._outage)
            self._failing[key] = failures, time.monotonic() + failures.failed(error)
            return otherwise
        if failures is not None:
            failures.recovered()
            del self._failing[key]
        return result

    def _has_others(self, key: K, keys: Iterable[K]) -> bool:
        return any(other not in self._failing for other in keys if other != key)
