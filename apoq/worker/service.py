"""The parts of a worker that run in the background: one life cycle for all of them."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from apoq.events import ThreadDied
from apoq.worker import logs
from apoq.worker.failures import FIRST_BACKOFF_SECONDS, Failures, Outage


def left_until(ends_at: float) -> float:
    """Return the seconds until this time, by time.monotonic(); zero after it."""
    return max(0.0, ends_at - time.monotonic())


class Service(ABC):
    """Calls `turn` again and again, on a thread of its own, until it is stopped.

    A turn returns the seconds to sleep before the next one, or None to sleep until `wake`. A turn that raises
    an `Exception` is repeated after a pause that grows with each failure, for ever; `Failures` reports that.
    Any other exception ends the thread, which is reported as `ThreadDied`. Starting or stopping twice is
    harmless, and so is stopping before starting.
    """

    def __init__(self, name: str, outage: Outage) -> None:
        self._name = name
        self._outage = outage
        self._woken = threading.Event()
        self._is_ending = False
        self._failures = Failures(name, outage)
        self._turning = threading.Lock()
        self._thread: threading.Thread | None = None

    @abstractmethod
    def turn(self) -> float | None:
        """Do what there is to do now; return the seconds until the next turn, or None to wait for `wake`."""

    def after_last_turn(self) -> None:  # noqa: B027 - most services have nothing to do then
        """Do what is left to do on this service's thread before it ends."""

    def start(self) -> None:
        """Start taking turns, on a new thread; raise RuntimeError if no thread can be started."""
        if self._thread is None:
            self._is_ending = False
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                self._thread.start()
            except BaseException:
                self._thread = None
                raise

    def wake(self) -> None:
        """Take the next turn now, or immediately after the current one."""
        # Most calls find it woken already; reading the flag costs a tenth of setting it.
        if not self._woken.is_set():
            self._woken.set()

    def take_turn(self, turn: Callable[[], float | None]) -> None:
        """Take the next turn on the caller's thread, as `turn` does it: no thread has to wake up for it.

        If a turn is under way, or the last one failed, the service's own thread takes it. It also takes the
        turn after one that raised here, and so meets the error itself. A service that has not started takes
        no turn.
        """
        if self._thread is not None and self._turning.acquire(blocking=False):
            pause: float | None = 0.0
            try:
                for _ in range(2):  # the second turn shows whether there is more to do
                    if pause == 0.0 and not self._is_ending and not self._failures.count:
                        pause = turn()
            except Exception as error:  # noqa: BLE001 - its own thread meets it
                logs.failed_elsewhere(self._name, error)
            finally:
                self._turning.release()
            if pause is None:
                return  # its own thread sleeps until it is woken, as it should
        self.wake()

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def is_current(self) -> bool:
        """Return whether the caller is on this service's thread."""
        return self._thread is threading.current_thread()

    def end(self) -> None:
        """Take no turn after the current one; return without waiting for it."""
        self._is_ending = True
        self.wake()

    def stop(self, timeout: float | None = None) -> bool:
        """End, and wait for the current turn; return whether it has ended within `timeout` seconds."""
        self.end()
        if self._thread is None or self.is_current():
            return True
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        # A turn on another thread: it sees that no other is to follow.
        if not self._turning.acquire(timeout=-1 if timeout is None else timeout):
            return False
        self._turning.release()
        self._thread = None
        return True

    def recovered(self) -> None:
        """Note that the service works again after failures; a turn that takes long says so itself."""
        self._failures.recovered()

    def is_failing_for(self, seconds: float) -> bool:
        """Return whether all its turns have failed for longer than this."""
        return self._failures.is_failing_for(seconds)

    def _run(self) -> None:
        try:
            self._take_turns()
            self.after_last_turn()
        except BaseException as error:  # noqa: BLE001 - SystemExit would end the thread silently
            self._outage.report(ThreadDied(self._name, error))
        finally:
            self._failures.forget()

    def _take_turns(self) -> None:
        while not self._is_ending:
            # Cleared before the turn: a `wake` during the turn leads to another one.
            self._woken.clear()
            try:
                with self._turning:
                    pause = self.turn()
            except Exception as error:  # noqa: BLE001 - the next turn may succeed
                self._failed(error)
            else:
                self.recovered()
                self._woken.wait(pause)

    def _failed(self, error: Exception) -> None:
        if self._is_ending:
            logs.failed_at_end(self._name, error)
        else:
            self._sleep(self._failures.failed(error))

    def _sleep(self, seconds: float) -> None:
        """Sleep until the time is up or the service ends; `wake` doesn't hurry a service that fails."""
        deadline = time.monotonic() + seconds
        while not self._is_ending and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, FIRST_BACKOFF_SECONDS))
