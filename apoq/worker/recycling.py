"""Looks whether a worker has reached the limits of its process: of tasks, of memory, and of age."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from apoq.core.recycling import Amounts, StopReason, drawn, reached
from apoq.events import LimitReached
from apoq.worker import logs
from apoq.worker.failures import Outage
from apoq.worker.service import Service
from apoq.worker.settling.counters import Counter

LOOK_INTERVAL_SECONDS: Final = 1.0
"""Seconds between two looks. Tasks are counted all the time."""

REST_FACTOR: Final = 20
"""How many times as long as a garbage collection took it is until the next one."""

STATM: Final = Path("/proc/self/statm")
"""The sizes of this process in pages; the second is that of its resident memory."""


def find_gauge() -> Callable[[], int]:
    """Return a function that returns how many bytes of memory this process uses (its resident set).

    ValueError if that can't be measured here.
    """
    with suppress(OSError):
        _read_statm()
        return _read_statm
    try:
        psutil: Any = import_module("psutil")
    except ImportError:
        raise ValueError(
            "max_memory needs the package psutil on a system without /proc, and it is not installed: pip "
            "install psutil, or omit max_memory"
        ) from None
    return lambda: int(psutil.Process().memory_info().rss)


def _read_statm() -> int:
    return int(STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class LimitWatch(Service):
    """Reports each limit once, when this process has reached it; what happens then is for others to decide.

    The limits are drawn at each start, and age and tasks count from there. A process that starts above its
    limit of memory goes on without that limit: a new one would start above it as well.
    """

    def __init__(
        self,
        limits: Amounts,
        counter: Counter,
        outage: Outage,
        name: str,
        *,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`counter` counts the attempts that have ended, and `name` is what people call the worker."""
        super().__init__("apoq-limits", outage)
        self._given = limits
        self._limits: dict[StopReason, float] = {}
        self._counter = counter
        self._worker = name
        self._chance = chance
        self._gauge = find_gauge() if StopReason.MAX_MEMORY in limits else lambda: 0
        self._began = 0.0
        self._ended_before = 0
        self._collects_at = 0.0

    def start(self) -> None:
        """Draw the limits of this process, and look from now on."""
        if not self.is_alive:
            self._limits = drawn(self._given, self._chance)
            self._began = time.monotonic()
            self._ended_before = self._counter.ended
            self._leave_out_memory_if_exceeded()
            if StopReason.MAX_TASKS in self._limits:
                most = int(self._limits[StopReason.MAX_TASKS])
                self._counter.call_at(self._ended_before + most, self.wake)
        super().start()

    def turn(self) -> float | None:
        """Report the limits that have been reached; return when to look again."""
        used = self._used()
        for limit in reached(self._limits, used):
            if limit is not StopReason.MAX_MEMORY or self._is_garbage_not_enough():
                at_most = self._limits.pop(limit)
                self._outage.report(LimitReached(self._worker, limit.value, used[limit], at_most))
        return LOOK_INTERVAL_SECONDS if self._limits else None

    def _used(self) -> dict[StopReason, float]:
        return {
            StopReason.MAX_TASKS: self._counter.ended - self._ended_before,
            StopReason.MAX_MEMORY: self._gauge(),
            StopReason.MAX_AGE: time.monotonic() - self._began,
        }

    def _is_garbage_not_enough(self) -> bool:
        """Return whether the limit of memory is exceeded even after a garbage collection."""
        began = time.monotonic()
        if began < self._collects_at:
            return False
        gc.collect()
        ended = time.monotonic()
        self._collects_at = ended + REST_FACTOR * (ended - began)
        return self._gauge() >= self._limits[StopReason.MAX_MEMORY]

    def _leave_out_memory_if_exceeded(self) -> None:
        most = self._limits.get(StopReason.MAX_MEMORY)
        if most is None or self._gauge() < most:
            return
        gc.collect()
        if (used := self._gauge()) >= most:
            del self._limits[StopReason.MAX_MEMORY]
            logs.starts_above_limit(used, self._given[StopReason.MAX_MEMORY], most)
