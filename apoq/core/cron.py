"""The times of a cron expression in a time zone."""

from __future__ import annotations

from copy import copy
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from apoq.errors import InvalidSchedule, glimpse

EXAMPLE: Final = "'0 9 * * MON-FRI' (minute, hour, day of month, month, day of week)"

FIELDS: Final = ("minute", "hour", "day-of-month", "month", "day-of-week")

NICKNAMES: Final = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}

FIXED_OFFSETS: Final = {"EST", "HST", "MST"}
"""Names of time zones that have a fixed offset, in addition to those that begin with Etc/GMT."""

_SECOND: Final = timedelta(seconds=1)
_DAY: Final = timedelta(days=1)
_SOME_TIME: Final = datetime(2000, 1, 1)  # noqa: DTZ001 - cronsim computes with the wall clock only


class Cron:
    """A cron expression in a time zone.

    The wall clock is computed by cronsim, and its changes here, as Debian's cron does it:

    - If the minute and the hour are both fixed, such as ``30 2 * * *``, each time on the wall clock has one
      tick. A time that is skipped has its tick at the first instant after the gap, where all skipped times
      become one tick. A time that occurs twice has its tick the first time.
    - If the minute or the hour begins with ``*``, each instant has a tick at which the wall clock matches. So
      an hourly schedule has a tick in both passes of an hour that occurs twice, and none in a skipped hour.

    Raises:
        InvalidSchedule: The expression or the time zone is invalid.
    """

    def __init__(self, expression: str, zone: str) -> None:
        self.expression = check_expression(expression)
        self._zone = zone_of(zone)
        text = NICKNAMES.get(self.expression, self.expression)
        minute, hour = text.split()[:2]
        self._is_fixed = not minute.startswith("*") and not hour.startswith("*")
        self._parsed = CronSim(text, _SOME_TIME)

    def next_after(self, instant: datetime) -> datetime:
        """Return the first tick that is later than an instant, in UTC."""
        instant = instant.astimezone(UTC)
        try:
            return self._next_fixed(instant) if self._is_fixed else self._next_matching(instant)
        except StopIteration:
            raise InvalidSchedule(
                f"cron must be a time that occurs, got {self.expression!r}, which doesn't within 50 years"
            ) from None

    def _next_fixed(self, instant: datetime) -> datetime:
        times = self._wall_clock_after(instant.astimezone(self._zone))
        while (tick := self._first_instant(next(times))) <= instant:
            pass  # a time in the first pass of a doubled hour, while the instant is in the second
        return tick

    def _first_instant(self, time: datetime) -> datetime:
        """Return the first instant at which the wall clock shows this time, or else a later one."""
        found = time.replace(tzinfo=self._zone).astimezone(UTC)
        if self._wall_clock(found) == time:
            return found
        # The clock skips this time: the gap ends between these two, because both readings of a time that
        # doesn't exist, with the offset before the gap and with the one after it, miss it.
        before = time.replace(tzinfo=self._zone, fold=1).astimezone(UTC)
        return self._change_between(before, found)

    def _next_matching(self, instant: datetime) -> datetime:
        wall = self._wall_clock(instant)
        while True:
            offset = wall - instant.replace(tzinfo=None)
            time = next(self._wall_clock_after(wall))
            tick = (time - offset).replace(tzinfo=UTC)
            seen = min(tick, instant + _DAY)
            if self._wall_clock(seen) != seen.replace(tzinfo=None) + offset:
                # The clock changes before: after that, also at that very instant, it shows other times.
                change = self._change_between(instant, seen)
                wall, instant = self._wall_clock(change) - _SECOND, change - _SECOND
            elif seen == tick:
                return tick
            else:
                # No time in between matches, so no change in between matters.
                instant = max(seen, tick - _DAY)
                wall = self._wall_clock(instant)

    def _wall_clock_after(self, time: datetime) -> CronSim:
        found = copy(self._parsed)
        found.dt = time.replace(tzinfo=None, fold=0, microsecond=0)
        return found

    def _wall_clock(self, instant: datetime) -> datetime:
        return instant.astimezone(self._zone).replace(tzinfo=None, fold=0)

    def _change_between(self, first: datetime, last: datetime) -> datetime:
        """Return the first second that has the offset of the last instant, in UTC."""
        offset = last.astimezone(self._zone).utcoffset()
        low, high = int(first.timestamp()), int(last.timestamp())
        while high - low > 1:
            middle = (low + high) // 2
            if datetime.fromtimestamp(middle, self._zone).utcoffset() == offset:
                high = middle
            else:
                low = middle
        return datetime.fromtimestamp(high, UTC)


@lru_cache(maxsize=1_000)
def cron_of(expression: str, zone: str) -> Cron:
    """Return a cron expression in a time zone, which was parsed before if possible."""
    return Cron(expression, zone)


def check_expression(expression: object) -> str:
    """Return a cron expression with single spaces; `InvalidSchedule` if it is not one."""
    if not isinstance(expression, str):
        raise InvalidSchedule(f"cron must be text such as {EXAMPLE}, got {glimpse(expression)}")
    text = " ".join(expression.split())
    if text.startswith("@"):
        if text.lower() not in NICKNAMES:
            raise InvalidSchedule(
                f"cron must be one of {', '.join(NICKNAMES)}, or text such as {EXAMPLE}, "
                f"got {glimpse(expression)}"
            )
        return text.lower()
    parts = text.split(" ")
    if len(parts) != len(FIELDS):
        raise InvalidSchedule(
            f"cron must have five fields, such as {EXAMPLE}, got {len(text.split())}: {glimpse(expression)}; "
            "for intervals of seconds, use every="
        )
    try:
        CronSim(text, _SOME_TIME)
    except CronSimError as error:
        field = str(error).removeprefix("Bad ")
        part = parts[FIELDS.index(field)] if field in FIELDS else text
        raise InvalidSchedule(
            f"the {field} {glimpse(part)} of cron {glimpse(expression)} is not valid: cron must be text such "
            f"as {EXAMPLE}"
        ) from None
    except (ValueError, AssertionError, OverflowError):
        raise InvalidSchedule(f"cron must be text such as {EXAMPLE}, got {glimpse(expression)}") from None
    return text


def check_zone(zone: object) -> str:
    """Return the name of a time zone; `InvalidSchedule` if it is not one, or has a fixed offset."""
    if zone is UTC:
        return "UTC"
    if isinstance(zone, timezone):
        raise InvalidSchedule(_fixed(glimpse(zone)))
    name = zone.key if isinstance(zone, ZoneInfo) else zone
    if not isinstance(name, str):
        raise InvalidSchedule(f"timezone must be a name such as 'Europe/Berlin', got {glimpse(zone)}")
    zone_of(name)
    return name


def zone_of(name: str) -> ZoneInfo:
    """Return a time zone by its name; `InvalidSchedule` if there is none, or if it has a fixed offset."""
    is_etc = name.upper().startswith("ETC/GMT") and name[len("ETC/GMT") :].strip("+-0") != ""
    if is_etc or name.upper() in FIXED_OFFSETS or name[:1] in {"+", "-"} or name[3:4] in {"+", "-"}:
        raise InvalidSchedule(_fixed(glimpse(name)))
    try:
        return ZoneInfo(name)
    except (LookupError, ValueError, OSError):
        raise InvalidSchedule(
            f"timezone must be a name of the IANA database, such as 'Europe/Berlin' or 'UTC', got "
            f"{glimpse(name)}"
        ) from None


def _fixed(given: str) -> str:
    return (
        f"timezone must be the name of a place, such as 'Europe/Berlin', or 'UTC', got {given}: where clocks "
        "change, a fixed offset is wrong for half of the year"
    )
