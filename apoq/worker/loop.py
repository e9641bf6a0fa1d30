"""One kind of thing that runs until it is stopped."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Final

logger = logging.getLogger(__name__)

FIRST_BACKOFF: Final = 0.1
LONGEST_BACKOFF: Final = 10.0


class Loop:
    """A thread that takes one turn after the other until it is stopped.

    A turn answers the seconds to sleep before the next one, None for "until woken". A turn that raises is
    logged and taken again after a pause that grows with each failure, for ever: one log line when an outage
    begins, one when it is over. What isn't an `Exception` ends the thread, which is logged as critical.
    Starting or stopping twice is harmless, and so is stopping before starting.
    """

    def __init__(
        self, name: str, turn: Callable[[], float | None], *, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        self._name = name
        self._turn = turn
        self._on_failure = on_failure
        self._woken = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to take turns, on a thread."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Take the next turn now, or at once after the one under way."""
        # Most calls find it woken already; looking costs a tenth of setting.
        if not self._woken.is_set():
            self._woken.set()

    def is_current(self) -> bool:
        """Tell whether the caller is on this loop's thread."""
        return self._thread is threading.current_thread()

    def stop(self, timeout: float | None = None) -> bool:
        """Take no more turns, and wait for the one under way; tell whether it has ended."""
        self._stopping = True
        self.wake()
        if self._thread is None or self.is_current():
            return True
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self._thread = None
        return True

    def _run(self) -> None:
        try:
            self._take_turns()
        except BaseException:  # SystemExit would end it without a word
            logger.critical("%s has ended, and its worker is maimed: restart it", self._name, exc_info=True)

    def _take_turns(self) -> None:
        failures = 0
        while not self._stopping:
            # Before the turn, so that what comes while it is under way leads to another.
            self._woken.clear()
            try:
                pause = self._turn()
            except Exception as error:
                failures += 1
                pause = backoff(failures)
                if failures == 1:
                    logger.warning("%s failed, and tries again until it succeeds: %s", self._name, error)
                logger.debug("%s failed %d times", self._name, failures, exc_info=error)
                self._on_failure()
                self._sleep_through(pause)
            else:
                if failures:
                    logger.warning("%s works again, after %d failures", self._name, failures)
                    failures = 0
                self._woken.wait(pause)

    def _sleep_through(self, pause: float) -> None:
        """Sleep, woken by nothing but `stop`: a loop that fails is not hurried by who waits for it."""
        deadline = time.monotonic() + pause
        while not self._stopping and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, FIRST_BACKOFF))


def backoff(failures: int, chance: float | None = None) -> float:
    """Answer the seconds to wait after this many failures in a row: doubling, with jitter, bounded."""
    if chance is None:
        chance = random.random()  # noqa: S311 - jitter, no secret
    return min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(failures - 1, 30)) * (0.5 + chance / 2)
