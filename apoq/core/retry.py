"""When a failed attempt is followed by another, and how long after."""

from __future__ import annotations

import inspect
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from apoq.core.plain import plain_number
from apoq.errors import InvalidProcessor, glimpse

logger = logging.getLogger(__name__)

DEFAULT_RETRY_LIMIT = 5

LONGEST_DELAY = timedelta(days=36525)
"""A century: what is longer is a mistake, and PostgreSQL's timestamps end somewhere."""

RetryDelay = Callable[[int], float | timedelta]
"""Answers the wait before the next attempt, as seconds or a timedelta, from the number of failures so far."""


def exponential_backoff(fail_count: int, chance: float | None = None) -> int:
    """Answer the original's default wait in whole seconds: ``floor(chance * 2^min(fail_count, 7) + 1)``.

    `chance` is a number in [0, 1); random where it isn't given. So the first retry comes after 1 to 2
    seconds, the seventh and later ones after 1 to 128.
    """
    if chance is None:
        chance = random.random()  # noqa: S311 - jitter, no secret
    return math.floor(chance * 2.0 ** min(fail_count, 7) + 1)


def seconds(delay: float | timedelta, name: str = "a delay") -> float:
    """Read a delay given in seconds or as a timedelta; ValueError or TypeError for what is no delay."""
    if isinstance(delay, timedelta):
        delay = delay.total_seconds()
    number = plain_number(delay)
    if number is None:
        raise TypeError(f"{name} is a number of seconds or a timedelta, not {glimpse(delay)}")
    if not 0 <= number <= LONGEST_DELAY.total_seconds():  # also false for NaN
        raise ValueError(f"{name} is between zero and a century, not {glimpse(number)} s")
    return float(number)


def time_limit(timeout: float | timedelta) -> timedelta:
    """Read a timeout: as `seconds` does, and longer than nothing."""
    limit = timedelta(seconds=seconds(timeout, "a timeout"))
    if not limit:
        raise ValueError("a timeout is longer than nothing: leave it out where there is no limit")
    return limit


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a type's tasks are tried again, and how long after a failure."""

    limit: int = DEFAULT_RETRY_LIMIT
    delay: RetryDelay = exponential_backoff

    def __post_init__(self) -> None:
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 0:
            raise InvalidProcessor(f"retry_limit is a number of retries, 0 or more, not {self.limit!r}")
        if not callable(self.delay) or inspect.iscoroutinefunction(self.delay):
            raise InvalidProcessor(
                f"retry_delay is a plain function of the fail count, not {self.delay!r}: "
                "for the same wait each time, give `lambda fail_count: 30`"
            )

    def delay_after(self, fail_count: int) -> float:
        """Answer the seconds to wait after this failure; the default's where the own function fails."""
        try:
            return seconds(self.delay(fail_count))
        except BaseException:  # of whatever kind: the failure that it follows must be stored
            logger.exception(
                "retry_delay of %r failed for fail_count=%d; the default delay is used",
                self.delay,
                fail_count,
            )
            return float(exponential_backoff(fail_count))
