"""One kind of thing that runs until it is stopped."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from apoq.worker.failures import FIRST_BACKOFF_SECONDS, Failures, Outage

logger = logging.getLogger(__name__)


class Loop:
    """A thread that takes one turn after the other until it is stopped.

    A turn returns the seconds to sleep before the next one, None for "until woken". A turn that raises is
    taken again after a pause that grows with each failure, for ever; `Failures` logs that. What isn't an
    `Exception` ends the thread, which is logged as critical, and `on_death` is called. Starting or stopping
    twice is harmless, and so is stopping before starting.
    """

    def __init__(
        self,
        name: str,
        turn: Callable[[], float | None],
        outage: Outage,
        *,
        on_death: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_stop` is called on its thread after the last turn."""
        self._name = name
        self._turn = turn
        self._on_death = on_death
        self._on_stop = on_stop
        self._woken = threading.Event()
        self._stopping = False
        self._failures = Failures(name, outage)
        self._turning = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to take turns, on a thread; RuntimeError if none can be started."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                self._thread.start()
            except BaseException:
                self._thread = None
                raise

    def wake(self) -> None:
        """Take the next turn now, or at once after the one under way."""
        # Most calls find it woken already; looking costs a tenth of setting.
        if not self._woken.is_set():
            self._woken.set()

    def take_turn(self, turn: Callable[[], float | None]) -> None:
        """Take the next turn on the caller's thread, and its way: sooner than this loop's own has woken up.

        If one is under way, or the last one has failed, this loop's own thread takes it. An error isn't the
        caller's either: this loop's own thread meets it at once, and knows what to do. A loop that hasn't
        started takes no turn.
        """
        if self._thread is not None and self._turning.acquire(blocking=False):
            pause: float | None = 0.0
            try:
                for _ in range(2):  # the second is to say whether there is anything left
                    if pause == 0.0 and not self._stopping and not self._failures.count:
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

    def end(self) -> None:
        """Take no more turns after the one under way, and don't wait for that."""
        self._stopping = True
        self.wake()

    def stop(self, timeout: float | None = None) -> bool:
        """Take no more turns, and wait for the one under way; tell whether it has ended."""
        self.end()
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
            self._on_stop()
        except BaseException:  # SystemExit would end it without a word
            logger.critical("%s has ended, and its worker is maimed: restart it", self._name, exc_info=True)
            self._on_death()
        finally:
            self._failures.forget()

    def _take_turns(self) -> None:
        while not self._stopping:
            # Before the turn, so that what comes while it is under way leads to another.
            self._woken.clear()
            try:
                with self._turning:
                    pause = self._turn()
            except Exception as error:  # noqa: BLE001 - the next turn may succeed
                self._failed(error)
            else:
                self.recovered()
                self._woken.wait(pause)

    def recovered(self) -> None:
        """Note that what failed before gets on; for a turn that takes long to say so itself."""
        self._failures.recovered()

    def is_failing_for(self, seconds: float) -> bool:
        """Tell whether all its turns have failed for longer than this."""
        return self._failures.is_failing_for(seconds)

    def _failed(self, error: Exception) -> None:
        if self._stopping:
            logger.debug("%s has stopped, and its last turn failed", self._name, exc_info=error)
        else:
            self._sleep_through(self._failures.failed(error))

    def _sleep_through(self, pause: float) -> None:
        """Sleep, woken by nothing but `stop`: a loop that fails is not hurried by who waits for it."""
        deadline = time.monotonic() + pause
        while not self._stopping and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, FIRST_BACKOFF_SECONDS))
