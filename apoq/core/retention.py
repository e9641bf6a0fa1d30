"""How long ended tasks are kept, and how many."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from apoq.core.plain import plain_number
from apoq.core.retry import duration
from apoq.errors import glimpse

MOST: Final = 10_000_000
"""The highest number of tasks to keep: a worker counts up to it every minute."""


@dataclass(frozen=True)
class Keep:
    """Keeps ended tasks for some time, and at most a number of them in each queue.

    ``Worker(…, keep_completed=Keep(timedelta(days=1), at_most=100_000))`` deletes a completed task after a
    day, or earlier if there are newer ones enough. Workers delete every minute, so there may be more for a
    short time, and tasks that ended at the same instant are kept together.

    Args:
        time: Time after which the tasks are deleted, in seconds or as a timedelta; None: no limit.
        at_most: How many of the newest are kept, from 1 to 10,000,000; None: no limit.

    Raises:
        ValueError: If a limit is out of range.
        TypeError: If a limit has the wrong type.
    """

    time: float | timedelta | None = None
    at_most: int | None = None

    def __post_init__(self) -> None:
        if self.time is not None:
            object.__setattr__(self, "time", duration(self.time, "time"))
        if self.at_most is not None:
            number = plain_number(self.at_most)
            if not isinstance(number, int) or not 1 <= number <= MOST:
                raise ValueError(
                    f"at_most must be a number of tasks from 1 to {MOST:,}, got {glimpse(self.at_most)}; to "
                    "keep none, use a time of zero"
                )

    @property
    def length(self) -> timedelta | None:
        """The time as a timedelta; None: no limit."""
        assert not isinstance(self.time, float | int)
        return self.time


Retention = float | timedelta | Keep | None
"""The values of options such as `keep_completed`."""


def retention(value: Retention, name: str) -> timedelta | Keep | None:
    """Return an option with its time as a timedelta; TypeError or ValueError if it can't be one."""
    return value if value is None or isinstance(value, Keep) else duration(value, name)


def keep(value: timedelta | Keep | None) -> Keep:
    """Return an option as a `Keep`."""
    return value if isinstance(value, Keep) else Keep(value)
