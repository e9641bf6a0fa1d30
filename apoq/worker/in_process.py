"""A worker in the processes that serve an application's requests."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from apoq.worker.worker import Worker

logger = logging.getLogger(__name__)

START_RETRY_SECONDS: Final = 10.0
"""Seconds after which a request tries again to start a worker that couldn't start."""


class InProcessWorker:
    """Starts a worker when a process serves its first request.

    So the application's scripts start none, and neither does a parent that forks the serving processes.
    """

    def __init__(self, find: Callable[[], Worker], *, name: str) -> None:
        """`find` returns the worker, on a thread of its own; `name` is the application's, for the log."""
        self._find = find
        self._name = name
        self._began_in = 0
        self._again_at = 0.0

    def serve(self) -> None:
        """Note that a request has begun, and start the worker if this process hasn't done so."""
        if self._began_in == os.getpid() and time.monotonic() < self._again_at:
            return
        self._began_in, self._again_at = os.getpid(), math.inf
        # On a thread, because the request must not wait if the database is away.
        starter = threading.Thread(target=self._start, name="apoq-starter", daemon=True)
        try:
            starter.start()
        except RuntimeError as error:  # the system allows no more threads
            self._failed(error)

    def _start(self) -> None:
        try:
            self._find().start()
        except Exception as error:  # noqa: BLE001 - the application goes on serving
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        logger.critical(
            "the in-process worker of %r can't start; the first request after %d s tries again: %s",
            self._name,
            START_RETRY_SECONDS,
            error,
        )
        self._again_at = time.monotonic() + START_RETRY_SECONDS
