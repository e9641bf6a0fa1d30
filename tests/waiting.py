"""Waiting for what happens on other threads, in other processes, or in the server."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest


def patience(seconds: float) -> Callable[..., float]:
    """Answer an `until` that waits for so long, unless it is told otherwise."""

    def until(condition: Callable[[], object], timeout: float = seconds) -> float:
        """Wait until it holds; answer the seconds that took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() < began + timeout, "it didn't come about in time"
            # Less and less often, because most conditions are questions to the database.
            time.sleep(min(0.05, 0.005 + (time.monotonic() - began) / 20))
        return time.monotonic() - began

    return until


def catches(pid: int, number: int) -> bool:
    """Tell whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("only Linux tells which signals a process catches")
    (caught,) = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (number - 1) & 1)
