"""The end of a worker's process: it comes in time, whatever still runs in it."""

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

logger = logging.getLogger(__name__)

EXIT_MARGIN_SECONDS: Final = 2.25
"""Seconds after its worker's timeout in which a process must have ended: a little more than the worker."""

LOG_FLUSH_SECONDS: Final = 0.25
"""Seconds in which the log must have taken what is said of it."""


class Ending:
    """Ends this process some time after it was told to stop, should it still be there.

    A worker stops in time. But Python waits for the application's threads and exit handlers, for ever. A
    program that goes on after its worker has stopped, such as a test of it, is left alone.
    """

    def __init__(self, timeout: float) -> None:
        """`timeout` is what running tasks get to end in."""
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
        # Two threads, for the first may never return from the log: whoever reads that may be gone.
        threading.Thread(target=self._end, args=(True, 0.0), name="apoq-ending", daemon=True).start()
        threading.Thread(
            target=self._end, args=(False, LOG_FLUSH_SECONDS), name="apoq-ending", daemon=True
        ).start()
        self._orders = orders
        try:
            yield
            self._exit_code = 0
        finally:
            # Called before Python waits for any thread, for those of executors first of all. Nothing public
            # is called then; `atexit` comes after that.
            threading._register_atexit(self._ends.set)  # type: ignore[attr-defined]  # noqa: SLF001
            self._is_over.set()

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
        ends_at = time.monotonic() + self._seconds + more
        if self._is_over.wait(self._seconds + more):
            if not self._ends.wait(ends_at - time.monotonic()):
                return  # the program goes on
            time.sleep(max(0.0, ends_at - time.monotonic()))
        if is_logged:
            with suppress(Exception):
                self._log()
        os._exit(self._exit_code)

    def _log(self) -> None:
        if self._is_over.is_set():
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
