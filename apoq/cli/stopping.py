"""Messages while a worker stops and still runs tasks."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from apoq.cli.streams import is_terminal

logger = logging.getLogger(__name__)

NOTICE_INTERVAL_SECONDS: Final = 2.0
"""Seconds between two lines at least, however often the number changes."""

POLL_SECONDS: Final = 0.1
DAY_SECONDS: Final = 86_400


class StopNotice:
    """Says how many running tasks a stop waits for, until when, and how to end them at once."""

    def __init__(self, timeout: float, running: Callable[[], int], *, ends_at_once: str = "") -> None:
        """Take a function that returns how many tasks run, and what ends them without waiting."""
        self._timeout = timeout
        self._running = running
        self._ends_at_once = ends_at_once
        self._last = 0
        self._said_at = 0.0
        self._until = ""

    def begin(self) -> None:
        """Say it for the first time: the worker stops now."""
        self._last, self._said_at = self._running(), time.monotonic()
        at = time.localtime(time.time() + self._timeout)
        self._until = time.strftime("%H:%M:%S" if self._timeout < DAY_SECONDS else "%Y-%m-%d %H:%M", at)
        if self._last:
            them = "it" if self._last == 1 else "them"
            logger.info(
                "waiting until %s for %s%s",
                *(self._until, _tasks(self._last)),
                f"; {self._ends_at_once} ends {them} now" if self._ends_at_once else "",
            )

    def renew(self) -> None:
        """Say it again if the number has changed, but not too often."""
        now, running = time.monotonic(), self._running()
        if running and running != self._last and now - self._said_at >= NOTICE_INTERVAL_SECONDS:
            self._last, self._said_at = running, now
            logger.info("still waiting until %s for %s", self._until, _tasks(running))

    def renew_until_the_end(self) -> None:
        """Call `renew` on a thread, until the program ends."""

        def turns() -> None:
            while True:
                self.renew()
                time.sleep(POLL_SECONDS)

        threading.Thread(target=turns, name="apoq-stop-notice", daemon=True).start()


def _tasks(count: int) -> str:
    return "1 running task" if count == 1 else f"{count:,} running tasks"


def again_by() -> str:
    """Return what stops a worker at once that has begun to stop."""
    return "Ctrl-C again" if is_terminal(sys.stderr) else "a second signal"
