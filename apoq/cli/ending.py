"""The end of a worker's process: it comes in time, whatever still runs in it."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from queue import SimpleQueue
from typing import Final

logger = logging.getLogger(__name__)

OVERTIME: Final = 2.25
"""Seconds after its worker's timeout in which a process must have ended: a little more than the worker."""

LOG_TIME: Final = 0.25
"""Seconds in which the log must have taken what is said of it."""


class Ending:
    """Ends this process some time after it was told to stop, should it still be there.

    A worker stops in time. But Python waits for the application's threads and exit handlers, for ever.
    """

    def __init__(self, timeout: float) -> None:
        """`timeout` is what running tasks get to end in."""
        self._seconds = timeout + OVERTIME
        self._is_told = threading.Event()
        self._orders: SimpleQueue[int] | None = None
        self.has_stopped = False
        """Whether the worker has stopped: if the process has to be ended then, that is no failure."""

    def watch(self, orders: SimpleQueue[int]) -> None:
        """Begin to watch, for a worker that stops when anything is put into `orders`."""
        # Two threads, for the first may never return from the log: whoever reads that may be gone.
        threading.Thread(target=self._end, args=(True, 0.0), name="apoq-ending", daemon=True).start()
        threading.Thread(target=self._end, args=(False, LOG_TIME), name="apoq-ending", daemon=True).start()
        self._orders = orders

    def stop(self) -> None:
        """Have the worker stop; before there is one, end the process at once. From any thread."""
        if self._orders is None:
            os._exit(0)
        self._orders.put(0)

    def begin(self) -> None:
        """Note that the worker has been told to stop: the time runs."""
        self._is_told.set()

    def _end(self, is_logged: bool, more: float) -> None:
        self._is_told.wait()
        time.sleep(self._seconds + more)
        if is_logged:
            with suppress(Exception):
                self._log()
        os._exit(0 if self.has_stopped else 1)

    def _log(self) -> None:
        if self.has_stopped:
            others = [name for each in threading.enumerate() if not (name := each.name).startswith("apoq")]
            logger.warning(
                "the worker has stopped, and its process is ended although something in it still runs: a "
                "thread (there are %s), an exit handler, or a process that it waits for",
                ", ".join(others),
            )
        else:
            logger.error(
                "the worker has not stopped in %g s, and its process is ended; other workers run its tasks",
                self._seconds,
            )
        sys.stdout.flush()
        sys.stderr.flush()
