"""Failures that are tried again: since when, when they are reported, and when the next try is."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Final

from apoq.events import Event, Failing, OutageBegan, OutageEnded, OutageLasts, Recovered
from apoq.postgres.connections import is_away
from apoq.postgres.messages import brief
from apoq.postgres.watchdog import Stopped
from apoq.worker import logs

FIRST_BACKOFF_SECONDS: Final = 0.1
MAX_BACKOFF_SECONDS: Final = 2.0

FIRST_REMINDERS_SECONDS: Final = (10.0, 60.0)
REMINDER_INTERVAL_SECONDS: Final = 300.0
"""Seconds after which a failure that lasts is reported again: the first times, and then always."""


class Duration:
    """How long something has lasted, and whether it should be reported again."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._reminder_at = _next_reminder(0.0)

    @property
    def seconds(self) -> float:
        """For how long it has lasted."""
        return self._clock() - self._began

    def is_reminder_due(self) -> bool:
        """Return whether it should be reported now that it still lasts; true once for each time."""
        seconds = self.seconds
        if seconds < self._reminder_at:
            return False
        self._reminder_at = _next_reminder(seconds)
        return True


class Outage:
    """Whether the database is away: reported once for all the services of a worker, and so is its end."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        on_away: Callable[[], None] = lambda: None,
        report: Callable[[Event], None] = logs.write,
    ) -> None:
        """`on_away` is called when a service that had reached the database finds it away."""
        self._on_away = on_away
        self.report = report
        """Report an event of the worker's."""
        self._clock = clock
        self._lock = threading.Lock()
        self._failing: set[str] = set()
        self._duration = Duration(clock)

    @property
    def is_on(self) -> bool:
        """Whether a service finds the database away."""
        return bool(self._failing)

    def begins(self, name: str, error: BaseException) -> None:
        """Note that a service has found the database away."""
        with self._lock:
            is_new = name not in self._failing
            if not self._failing:
                self._duration = Duration(self._clock)
                self.report(OutageBegan(brief(error)))
            elif self._duration.is_reminder_due():
                self.report(OutageLasts(self._duration.seconds, name, brief(error)))
            self._failing.add(name)
        if is_new:
            self._on_away()

    def ends(self, name: str) -> None:
        """Note that a service has reached it again."""
        with self._lock:
            if name in self._failing and len(self._failing) == 1:
                self.report(OutageEnded(self._duration.seconds))
            self._failing.discard(name)

    def leaves(self, name: str) -> None:
        """Forget a service that has been stopped."""
        with self._lock:
            self._failing.discard(name)


class Failures:
    """The failures in a row of one thing that is tried again until it succeeds.

    The first failure is reported, and so is the next success. While the failures go on, that is reported
    again at growing intervals. If the database is away, the `Outage` reports that instead, once for all.

    One thread at a time may note what has happened; any thread may ask.
    """

    def __init__(self, name: str, outage: Outage, clock: Callable[[], float] = time.monotonic) -> None:
        """`name` is what fails, as the log calls it, such as "the claim from Queue('emails')"."""
        self.count = 0
        """How often it has failed since it last succeeded."""
        self._name = name
        self._outage = outage
        self._clock = clock
        self._duration: Duration | None = None
        self._is_reported = False

    def failed(self, error: BaseException) -> float:
        """Note a failure, and report it if it is time to; return the seconds until the next try."""
        if isinstance(error, Stopped):
            return MAX_BACKOFF_SECONDS
        self.count += 1
        if self._duration is None:
            self._duration = Duration(self._clock)
        if is_away(error):
            self._outage.begins(self._name, error)
        else:
            self._outage.ends(self._name)
            self._report(error, self._duration)
        logs.failed_again(self._name, self.count, error)
        return backoff(self.count)

    def recovered(self) -> None:
        """Note that it has succeeded."""
        if not self.count:
            return
        self._outage.ends(self._name)
        if self._is_reported:
            self._outage.report(Recovered(self._name, self.count))
        self.forget()

    def forget(self) -> None:
        """Begin from zero: it isn't tried any more."""
        self._outage.leaves(self._name)
        self.count, self._duration, self._is_reported = 0, None, False

    def is_failing_for(self, seconds: float) -> bool:
        """Return whether it has failed for longer than this, without a success."""
        duration = self._duration
        return duration is not None and duration.seconds > seconds

    def _report(self, error: BaseException, duration: Duration) -> None:
        if not self._is_reported or duration.is_reminder_due():
            seconds = duration.seconds if self._is_reported else 0.0
            self._is_reported = True
            self._outage.report(Failing(self._name, error, self.count, seconds))


def backoff(failures: int, chance: float | None = None) -> float:
    """Return the seconds to wait after this many failures in a row: doubling, with jitter, bounded."""
    if chance is None:
        chance = random.random()  # noqa: S311 - jitter, no secret
    return min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 30)) * (0.5 + chance / 2)


def _next_reminder(seconds: float) -> float:
    """Return when a failure that has lasted for so long should be reported the next time."""
    following = (seconds // REMINDER_INTERVAL_SECONDS + 1) * REMINDER_INTERVAL_SECONDS
    return min((at for at in FIRST_REMINDERS_SECONDS if at > seconds), default=following)
