"""One kind of thing that runs until it is stopped."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Final

from apoq.connections import is_away

logger = logging.getLogger(__name__)

FIRST_BACKOFF: Final = 0.1
LONGEST_BACKOFF: Final = 2.0


class Outage:
    """When the database is away: told of once for all the loops of a worker, and so is its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failing: set[str] = set()
        self._began = 0.0

    def begins(self, name: str, error: BaseException) -> None:
        """Note that a loop has found the database away."""
        with self._lock:
            if not self._failing:
                self._began = time.monotonic()
                logger.warning("the database is away; the worker tries until it is back: %s", brief(error))
            self._failing.add(name)

    def ends(self, name: str) -> None:
        """Note that a loop has reached it again."""
        with self._lock:
            if name in self._failing and len(self._failing) == 1:
                logger.warning("the database is back, after %.1f s", time.monotonic() - self._began)
            self._failing.discard(name)

    def leaves(self, name: str) -> None:
        """Forget a loop that has been stopped."""
        with self._lock:
            self._failing.discard(name)


class Loop:
    """A thread that takes one turn after the other until it is stopped.

    A turn answers the seconds to sleep before the next one, None for "until woken". A turn that raises is
    taken again after a pause that grows with each failure, for ever. The log has one line when that begins
    and one when it is over; of an `Outage`, that one tells. What isn't an `Exception` ends the thread, which
    is logged as critical, and `on_death` is called. Starting or stopping twice is harmless, and so is
    stopping before starting.
    """

    def __init__(
        self,
        name: str,
        turn: Callable[[], float | None],
        outage: Outage,
        *,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._outage = outage
        self._turn = turn
        self._on_death = on_death
        self._woken = threading.Event()
        self._stopping = False
        self._failures = 0
        self._has_told = False
        self._turning = threading.Lock()
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

    def take_turn(self, turn: Callable[[], float | None]) -> None:
        """Take the next turn on the caller's thread, and its way: sooner than this loop's own has woken up.

        Where one is under way, or the last one has failed, it is this loop's own that takes it. An error is
        not the caller's, either: this loop's own meets it at once, and knows what to do.
        """
        if self._turning.acquire(blocking=False):
            pause: float | None = 0.0
            try:
                for _ in range(2):  # the second is to say whether there is anything left
                    if pause == 0.0 and not self._stopping and not self._failures:
                        pause = turn()
            except Exception as error:
                logger.debug("%s failed on another thread", self._name, exc_info=error)
            finally:
                self._turning.release()
            if pause is None:
                return  # as long as its own sleeps
        self.wake()

    @property
    def is_alive(self) -> bool:
        """Tell whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

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
        # One on another thread's, which sees that no other is to follow.
        if not self._turning.acquire(timeout=-1 if timeout is None else timeout):
            return False
        self._turning.release()
        self._thread = None
        return True

    def _run(self) -> None:
        try:
            self._take_turns()
        except BaseException:  # SystemExit would end it without a word
            logger.critical("%s has ended, and its worker is maimed: restart it", self._name, exc_info=True)
            self._on_death()

    def _take_turns(self) -> None:
        while not self._stopping:
            # Before the turn, so that what comes while it is under way leads to another.
            self._woken.clear()
            try:
                with self._turning:
                    pause = self._turn()
            except Exception as error:
                self._failures += 1
                if is_away(error):
                    self._outage.begins(self._name, error)
                elif not self._has_told:
                    self._has_told = True
                    logger.warning("%s failed, and tries again until it succeeds: %s", self._name, error)
                logger.debug("%s failed %d times", self._name, self._failures, exc_info=error)
                self._sleep_through(backoff(self._failures))
            else:
                self.recovered()
                self._woken.wait(pause)
        self._outage.leaves(self._name)

    def recovered(self) -> None:
        """Note that what failed before gets on; for a turn that takes long to say so itself."""
        if not self._failures:
            return
        self._outage.ends(self._name)
        if self._has_told:
            logger.warning("%s works again, after %d failures", self._name, self._failures)
        self._failures = 0
        self._has_told = False

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


def brief(error: BaseException) -> str:
    """Answer what an error says, without what SQLAlchemy wraps it in."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
