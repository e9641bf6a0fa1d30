"""When the ticks of a schedule are, and which of them become tasks."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Any, Final, Literal, TypedDict

from apoq.core.cron import Cron, check_expression, check_zone, cron_of
from apoq.core.options import checked
from apoq.core.payload import FIRST, LAST, check_name
from apoq.core.plain import plain_number
from apoq.core.retry import duration
from apoq.errors import InvalidSchedule, InvalidTask, glimpse

LATEST: Final = "latest"
ALL: Final = "all"
SKIP: Final = "skip"
ALLOW: Final = "allow"

CATCH_UPS: Final = (LATEST, ALL, SKIP)
OVERLAPS: Final = (SKIP, ALLOW)

SHORTEST_INTERVAL: Final = timedelta(seconds=1)

PUNCTUAL: Final = timedelta(minutes=1)
"""How late a tick may be with ``catch_up="skip"``."""

DEFAULT_CATCH_UP_LIMIT: Final = 100
MAX_CATCH_UP_LIMIT: Final = 1_000

UTC_NAME: Final = "UTC"

_MICROSECOND: Final = timedelta(microseconds=1)
_EPOCH: Final = datetime.fromtimestamp(0, UTC)

CatchUp = Literal["latest", "all", "skip"]
Overlap = Literal["skip", "allow"]


class ScheduleOptions(TypedDict, total=False):
    """The times of a schedule, and what happens to ticks that were missed or overlap."""

    cron: str | None
    timezone: str | tzinfo | None
    every: float | timedelta | None
    catch_up: CatchUp
    catch_up_limit: int
    not_before: float | timedelta | None
    jitter: float | timedelta | None
    overlap: Overlap | None


class TaskOptions(TypedDict, total=False):
    """The options of a schedule's tasks."""

    priority: int
    retry_limit: int | None
    retry_delay: float | timedelta | None
    timeout: float | timedelta | None
    meta: Mapping[str, Any] | None
    expires_in: float | timedelta | None


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of a schedule's ticks.

    Those of an interval are its multiples since 1970, so that they don't depend on when it was declared.

    Raises:
        InvalidSchedule: The cron expression, the time zone or the interval is invalid.
    """

    cron: str | None
    timezone: str = UTC_NAME
    every: timedelta | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.every < SHORTEST_INTERVAL:
            raise InvalidSchedule(f"every must be at least one second, got {glimpse(self.every)}")

    @property
    def _cron(self) -> Cron:
        return cron_of(self.cron or "", self.timezone)

    def next_after(self, instant: datetime) -> datetime:
        """Return the first tick that is later than an instant."""
        if self.every is None:
            return _next_tick(self._cron, instant)
        return self._multiple((instant - _EPOCH) // self.every + 1)

    def last_between(self, after: datetime, until: datetime, at_most: int) -> list[datetime]:
        """Return the last ticks that are later than `after` and not later than `until`, the oldest first."""
        if self.every is not None:
            last, first = (until - _EPOCH) // self.every, (after - _EPOCH) // self.every + 1
            return [self._multiple(number) for number in range(max(first, last - at_most + 1), last + 1)]
        span = timedelta(hours=1)
        while True:
            start = after if until - after <= span else until - span
            found: deque[datetime] = deque(maxlen=at_most)
            tick = self._cron.next_after(start)
            while tick <= until:
                found.append(tick)
                tick = self._cron.next_after(tick)
            if len(found) == at_most or start == after:
                return list(found)
            span *= 8

    def _multiple(self, number: int) -> datetime:
        assert self.every is not None
        return _EPOCH + number * self.every


@lru_cache(maxsize=1_000)
def _next_tick(cron: Cron, instant: datetime) -> datetime:
    """Return the first tick of a cron expression after an instant. Many schedules may have the same."""
    return cron.next_after(instant)


@dataclass(frozen=True)
class Due:
    """The decision on a schedule that is due."""

    ticks: list[datetime]
    """Those that become tasks."""
    last_tick_at: datetime | None
    """The last tick that is over."""
    next_at: datetime
    has_missed: bool
    """Whether there were ticks that become no tasks."""


def decide(
    timing: Timing,
    *,
    next_at: datetime,
    now: datetime,
    catch_up: str,
    catch_up_limit: int,
    not_before: timedelta | None,
) -> Due:
    """Decide what happens to a schedule whose next tick, `next_at`, is over."""
    # Rows of other programs may have any time; the calendar of time zones ends before Python's.
    before, now = max(FIRST, next_at) - _MICROSECOND, min(now, LAST)
    first = timing.next_after(before)
    if first > now:  # a time zone has got new rules, for example
        return Due([], None, first, has_missed=False)
    over, following = [first], timing.next_after(first)
    if following <= now:
        most = max(1, min(catch_up_limit, MAX_CATCH_UP_LIMIT)) if catch_up == ALL else 1
        over, following = timing.last_between(before, now, most), timing.next_after(now)
    if not_before is None and catch_up == SKIP:
        not_before = PUNCTUAL
    ticks = [tick for tick in over if not_before is None or now - tick <= not_before]
    return Due(ticks, over[-1], following, has_missed=not ticks or first < ticks[0])


def offset(queue: str, name: str, jitter: timedelta) -> timedelta:
    """Return how long after its tick a task is due: less than `jitter`, and the same for all ticks."""
    # Python's own hash of a text differs from process to process.
    digest = hashlib.sha256(f"{queue}\0{name}".encode()).digest()
    return jitter * (int.from_bytes(digest[:4]) / 2**32)


def checked_schedule(
    cron: str | None = None,
    timezone: str | tzinfo | None = None,
    every: float | timedelta | None = None,
    catch_up: str = LATEST,
    catch_up_limit: int = DEFAULT_CATCH_UP_LIMIT,
    not_before: float | timedelta | None = None,
    jitter: float | timedelta | None = None,
    overlap: str | None = None,
) -> dict[str, Any]:
    """Return these options as the values of a schedule's columns; `InvalidSchedule` if one is invalid."""
    if catch_up not in CATCH_UPS:
        raise InvalidSchedule(f"catch_up must be one of {_names(CATCH_UPS)}, got {glimpse(catch_up)}")
    if overlap is not None and overlap not in OVERLAPS:
        raise InvalidSchedule(f"overlap must be one of {_names(OVERLAPS)}, got {glimpse(overlap)}")
    if catch_up == ALL and overlap == SKIP:
        raise InvalidSchedule(
            "catch_up='all' must not be combined with overlap='skip', which would skip all missed ticks but "
            "one: pass overlap='allow'"
        )
    limit = plain_number(catch_up_limit)
    if not isinstance(limit, int) or not 1 <= limit <= MAX_CATCH_UP_LIMIT:
        raise InvalidSchedule(
            f"catch_up_limit must be a whole number from 1 to {MAX_CATCH_UP_LIMIT:,}, got "
            f"{glimpse(catch_up_limit)}"
        )
    return {
        **_times(cron, timezone, every),
        "catch_up": catch_up,
        "catch_up_limit": limit,
        "not_before": None if not_before is None else _duration(not_before, "not_before"),
        "jitter": None if jitter is None else _duration(jitter, "jitter"),
        "overlap": overlap or (ALLOW if catch_up == ALL else SKIP),
    }


def declared(options: ScheduleOptions) -> dict[str, Any] | None:
    """Return the checked options of ``@queue.task``; None if the function has no schedule.

    So it is with ``cron=None``, which a setting may have turned off.
    """
    given = {"cron", "every"} & options.keys()
    is_off = given and options.get("cron") is None and options.get("every") is None
    return checked_schedule(**options) if options and not is_off else None


def checked_task(options: TaskOptions) -> dict[str, Any]:
    """Return the options of a schedule's tasks as the values of its columns; `InvalidTask` if invalid."""
    given = checked(**options)
    return {name: given.get(f"task_{name}") for name in TaskOptions.__annotations__}


def check_schedule_name(name: object) -> str:
    """Return a schedule's name; `InvalidSchedule` if it can't be one."""
    try:
        return check_name(name, "a schedule's name")
    except InvalidTask as error:
        raise InvalidSchedule(str(error)) from None


def _times(
    cron: str | None, timezone: str | tzinfo | None, every: float | timedelta | None
) -> dict[str, Any]:
    if cron is not None and every is not None:
        raise InvalidSchedule("cron and every must not both be given: pass one of them")
    if every is not None:
        if timezone is not None:
            raise InvalidSchedule("timezone must be given with cron only: an interval is the same everywhere")
        interval = _duration(every, "every")
        Timing(None, every=interval)  # raises if it is too short
        return {"cron": None, "timezone": UTC_NAME, "every": interval}
    if cron is None:
        raise InvalidSchedule(
            "a schedule must have times: pass cron='0 9 * * MON-FRI' or every=timedelta(minutes=5)"
        )
    zone = UTC_NAME if timezone is None else check_zone(timezone)
    expression = check_expression(cron)
    cron_of(expression, zone).next_after(_EPOCH)  # raises if there is no such time
    return {"cron": expression, "timezone": zone, "every": None}


def _duration(value: Any, name: str) -> timedelta:
    try:
        return duration(value, name)
    except (TypeError, ValueError) as error:
        hint = "; it is an age, not a time" if isinstance(value, datetime) else ""
        raise InvalidSchedule(f"{error}{hint}") from None


def _names(values: tuple[str, ...]) -> str:
    return ", ".join(map(repr, values))
