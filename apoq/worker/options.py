"""How a worker works."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import URL


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What `Worker` is told beside its engine and its queues; ValueError where it makes no sense."""

    concurrency: int
    poll_interval: timedelta
    lease: timedelta
    keep_completed: timedelta | None
    keep_failed: timedelta | None
    listen_url: str | URL | None = field(repr=False)
    """It may have a password in it."""

    def __post_init__(self) -> None:
        number = self.concurrency
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(
                f"concurrency is the number of tasks that run at once, 1 or more, not {number!r}"
            )
        for name, value in (("poll_interval", self.poll_interval), ("lease", self.lease)):
            if not isinstance(value, timedelta) or value <= timedelta():
                raise ValueError(f"{name} is a timedelta longer than nothing, not {value!r}")
        for name, keep in (("keep_completed", self.keep_completed), ("keep_failed", self.keep_failed)):
            if keep is not None and (not isinstance(keep, timedelta) or keep < timedelta()):
                raise ValueError(f"{name} is a timedelta, or None for ever, not {keep!r}")

    @property
    def keeps_completed(self) -> bool:
        """Tell whether a task is marked as completed, and not deleted instead."""
        return self.keep_completed != timedelta()
