"""Retry policies: how often a failed task is tried again, and after which delay."""

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
"""A century: a longer delay is a mistake, and PostgreSQL's timestamps have a maximum."""

RetryDelay = Callable[[int], float | timedelta] | float | timedelta
"""The delay before the next attempt, in seconds or as a timedelta.

It may also be a function that takes the number of failures so far and returns such a delay.
"""


def exponential_backoff(fail_count: int, chance: float | None = None) -> int:
    """Return the default delay before a retry, which doubles with each failure and has jitter.

    The first retry comes after 1 to 2 seconds, the seventh and later ones after 1 to 128. The formula is that
    of the Node.js original: ``floor(chance * 2^min(fail_count, 7) + 1)``.

    Args:
        fail_count: The number of failures so far.
        chance: A number in [0, 1); random by default.

    Returns:
        The delay in whole seconds.
    """
    if chance is None:
        chance = random.random()  # noqa: S311 - jitter, no secret
    return math.floor(chance * 2.0 ** min(fail_count, 7) + 1)


def seconds(delay: float | timedelta, name: str = "delay") -> float:
    """Return a delay in seconds, from seconds or a timedelta; TypeError or ValueError if it is invalid."""
    if isinstance(delay, timedelta):
        delay = delay.total_seconds()
    number = plain_number(delay)
    if number is None:
        raise TypeError(f"{name} must be a number of seconds or a timedelta, got {glimpse(delay)}")
    if not 0 <= number <= LONGEST_DELAY.total_seconds():  # also rejects NaN
        raise ValueError(f"{name} must be between zero and a century, got {glimpse(number)} s")
    return float(number)


def duration(value: float | timedelta, name: str) -> timedelta:
    """Return a duration as a timedelta, from seconds or a timedelta; TypeError or ValueError as `seconds`."""
    return timedelta(seconds=seconds(value, name))


def time_limit(timeout: float | timedelta) -> timedelta:
    """Return a timeout as a timedelta; TypeError or ValueError if it is not a positive duration."""
    limit = duration(timeout, "timeout")
    if not limit:
        raise ValueError(f"timeout must be positive, got {glimpse(timeout)}; omit it for no limit")
    return limit


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often the tasks of a type are retried, and how long after a failure."""

    limit: int = DEFAULT_RETRY_LIMIT
    delay: RetryDelay = exponential_backoff

    def __post_init__(self) -> None:
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 0:
            raise InvalidProcessor(f"retry_limit must be a number of retries, 0 or more, got {self.limit!r}")
        if inspect.iscoroutinefunction(self.delay):
            raise InvalidProcessor(
                f"retry_delay must be a plain function that takes the fail count, got {self.delay!r}"
            )
        if not callable(self.delay):
            try:
                seconds(self.delay, "retry_delay")
            except TypeError:
                raise InvalidProcessor(
                    "retry_delay must be a number of seconds, a timedelta, or a function that takes the fail "
                    f"count and returns one of these, got {glimpse(self.delay)}"
                ) from None
            except ValueError as error:
                raise InvalidProcessor(str(error)) from None

    def delay_after(self, fail_count: int) -> float:
        """Return the seconds to wait after this failure; the default delay if `delay` raises."""
        try:
            return seconds(self.delay(fail_count) if callable(self.delay) else self.delay, "retry_delay")
        except BaseException:  # even SystemExit: the failed attempt must still be stored
            logger.exception(
                "retry_delay %r failed for fail_count=%d; using the default delay",
                self.delay,
                fail_count,
            )
            return float(exponential_backoff(fail_count))
