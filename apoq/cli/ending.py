"""Ends a worker's process in time, even if something still runs in it."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Final

from apoq.worker.signals import DRAIN, STOP

logger = logging.getLogger(__name__)

EXIT_MARGIN_SECONDS: Final = 2.25
"""Seconds after the timeout within which the process must have ended; the worker takes a little less."""

LOG_FLUSH_SECONDS: Final = 0.25
"""Seconds within which the last log lines must have been written."""


class Ending:
    """Ends this process some time after it began to stop, if it still exists then.

    A worker stops in time, but Python waits for the application's threads and exit handlers, maybe for ever.
    A program that continues after its worker has stopped, such as a test of it, is not ended.
    """

    def __init__(self, timeout: float) -> None:
        """Take the time that running tasks have to end in, in seconds."""
        self._seconds = timeout + EXIT_MARGIN_SECONDS
        self._is_told = threading.Event()
        self._orders: SimpleQueue[int] | None = None
        self._is_over = threading.Event()
        """Set when the worker has stopped or failed."""
        self._ends = threading.Event()
        """Set when the program ends."""
        self._exit_code = 1

    @contextmanager
    def watch(self, orders: SimpleQueue[int]) -> Iterator[None]:
        """Watch a worker that runs in the ``with`` block, and stops when anything is put into `orders`."""
        # Two threads, because writing to the log may block for ever if its reader has stopped reading.
        threading.Thread(target=self._end, args=(True, 0.0), name="apoq-ending", daemon=True).start()
        threading.Thread(
            target=self._end, args=(False, LOG_FLUSH_SECONDS), name="apoq-ending", daemon=True
        ).start()
        self._orders = orders
        try:
            yield
            self._exit_code = 0
        finally:
            # This is called before Python waits for threads, such as those of executors. There is no public
            # function for it; `atexit` runs after that.
            threading._register_atexit(self._ends.set)  # type: ignore[attr-defined]  # noqa: SLF001
            self._is_over.set()

    def stop(self) -> None:
        """Stop the worker; if there is none yet, end the process at once. From any thread."""
        if self._orders is None:
            os._exit(0)
        self._orders.put(STOP)

    def drain(self) -> None:
        """Let the worker stop when its running tasks have ended. From any thread."""
        if self._orders is not None:
            self._orders.put(DRAIN)

    def begin(self) -> None:
        """Start the countdown, because the worker stops now."""
        self._is_told.set()

    def _end(self, is_logged: bool, more: float) -> None:
        self._is_told.wait()
        ends_at = time.monotonic() + self._seconds + more
        if self._is_over.wait(self._seconds + more):
            if not self._ends.wait(ends_at - time.monotonic()):
                return  # the program continues
            time.sleep(max(0.0, ends_at - time.monotonic()))
        if is_logged:
            with suppress(Exception):
                self._log()
        os._exit(self._exit_code)

    def _log(self) -> None:
        if self._is_over.is_set():
            others = [name for each in threading.enumerate() if not (name := each.name).startswith("apoq")]
            logger.warning(
                "the worker has stopped, but something in its process still runs: a thread (there are %s), "
                "an exit handler, or a child process; the process is ended now",
                ", ".join(others),
            )
        else:
            logger.error(
                "the worker has not stopped within %g s; its process is ended now, and other workers run its "
                "tasks",
                self._seconds,
            )
        sys.stdout.flush()
        sys.stderr.flush()
