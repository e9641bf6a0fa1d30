"""When a worker's process should be replaced by a new one, and why a worker has stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final

from apoq.core.plain import plain_number
from apoq.core.retry import seconds
from apoq.core.sizes import read_size
from apoq.errors import glimpse

VARIATION: Final = 0.2
"""The share by which each process varies its limits, so that not all reach them at the same time."""

LEAST_MEMORY: Final = 2**20
"""Bytes that a limit must have: fewer are a mistake, such as 512 for 512M."""


class StopReason(StrEnum):
    """Why `Worker.run` has returned. Each member is also a string, such as ``"max_tasks"``."""

    SIGNAL = "signal"
    """SIGINT or SIGTERM."""
    STOP = "stop"
    """The function that `on_start` got was called."""
    MAX_TASKS = "max_tasks"
    """So many attempts have ended."""
    MAX_MEMORY = "max_memory"
    """The process used so much memory."""
    MAX_AGE = "max_age"
    """The worker has run for so long."""

    @property
    def is_limit(self) -> bool:
        """Whether the worker has reached one of its limits, so that another process should go on."""
        return self in LIMITS


LIMITS: Final = (StopReason.MAX_TASKS, StopReason.MAX_MEMORY, StopReason.MAX_AGE)

Amounts = Mapping[StopReason, float]
"""Numbers of attempts, bytes or seconds, by the limit that they are compared with."""


def drawn(limits: Amounts, chance: Callable[[], float]) -> dict[StopReason, float]:
    """Return the limits of one process, each varied by up to `VARIATION`; `chance` returns [0, 1)."""
    varied = {limit: most * (1 - VARIATION + 2 * VARIATION * chance()) for limit, most in limits.items()}
    return {limit: max(1.0, round(most)) if limit == "max_tasks" else most for limit, most in varied.items()}


def reached(limits: Amounts, used: Amounts) -> list[StopReason]:
    """Return the limits that have been reached."""
    return [limit for limit, most in limits.items() if used[limit] >= most]


def read_max_tasks(value: Any, name: str = "max_tasks") -> int | None:
    """Return `max_tasks` as a number of attempts; TypeError or ValueError if it is invalid."""
    if value is None:
        return None
    number = plain_number(value)
    if not isinstance(number, int):
        raise TypeError(f"{name} must be a whole number of tasks, got {glimpse(value)}")
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, got {number}; omit it for no limit")
    return number


def read_max_memory(value: Any, name: str = "max_memory") -> int | None:
    """Return `max_memory` in bytes, from bytes or a text; TypeError or ValueError if it is invalid."""
    if value is None:
        return None
    try:
        number = read_size(value) if isinstance(value, str) else plain_number(value)
    except ValueError:
        raise ValueError(f"{name} must be a size, such as 512M or 2G, got {glimpse(value)}") from None
    if not isinstance(number, int):
        raise TypeError(f"{name} must be a number of bytes or a text such as '512M', got {glimpse(value)}")
    if number < LEAST_MEMORY:
        raise ValueError(
            f"{name} must be 1M or more, got {number} bytes: write 512M for 512 megabytes; omit it for no "
            "limit"
        )
    return number


def read_max_age(value: Any, name: str = "max_age") -> timedelta | None:
    """Return `max_age` as a timedelta; TypeError or ValueError if it is invalid."""
    if value is None:
        return None
    number = seconds(value, name)
    if not number:
        raise ValueError(f"{name} must be positive, got {glimpse(value)}; omit it for no limit")
    return timedelta(seconds=number)
