"""Shows the progress of the benchmark: a bar on a terminal, otherwise one line per step."""

from __future__ import annotations

import sys
import time
from typing import Self

WIDTH = 30


class Progress:
    """Shows the current step on the standard error stream."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._begun = total, 0, time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def step(self, text: str) -> None:
        """Show the start of a step."""
        elapsed = time.monotonic() - self._begun
        clock = f"{int(elapsed) // 60}:{int(elapsed) % 60:02}"
        count = f"{self._done + 1}/{self._total}"
        if self._is_terminal:
            filled = WIDTH * self._done // self._total
            bar = "█" * filled + "·" * (WIDTH - filled)
            sys.stderr.write(f"\r\033[K{bar} {count} {clock} {text}")
        else:
            sys.stderr.write(f"{count} {clock} {text}\n")
        sys.stderr.flush()
        self._done += 1
