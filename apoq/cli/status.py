"""A line with a worker's statistics, every few seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Final

import click

from apoq.cli.streams import has_colors, is_terminal
from apoq.worker.settling.counters import WorkerStats

STATUS_INTERVAL_SECONDS: Final = 5.0
"""Seconds between two lines."""


class Status:
    """Writes a line to the terminal if the numbers have changed."""

    def __init__(self) -> None:
        self._last = WorkerStats()
        self._last_at = time.monotonic()

    def say(self, stats: WorkerStats) -> None:
        """Write a line, unless nothing has changed."""
        now = time.monotonic()
        if stats != self._last:
            rate = (stats.completed - self._last.completed) / max(now - self._last_at, 0.001)
            click.secho(line(stats, rate), err=True, dim=True, color=has_colors(sys.stderr))
        self._last, self._last_at = stats, now


def line(stats: WorkerStats, rate: float) -> str:
    """Return a line that fits a terminal."""
    parts = [f"{stats.running:,} running", f"{stats.completed:,} completed ({rate:,.0f}/s)"]
    parts += [
        f"{count:,} {name}"
        for name, count in zip(WorkerStats._fields[2:], stats[2:], strict=True)
        if count or name == "failed"
    ]
    return "         " + ", ".join(parts)


def is_wanted() -> bool:
    """Return whether stderr is a terminal."""
    return is_terminal(sys.stderr)


def every(period: float, call: Callable[[], None]) -> None:
    """Call a function every `period` seconds, on a thread that ends with the program."""

    def turns() -> None:
        while True:
            time.sleep(period)
            call()

    threading.Thread(target=turns, name="apoq-status", daemon=True).start()
