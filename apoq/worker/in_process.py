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
    """Starts a worker beside the first request that a process serves.

    So no script of the application's starts one, nor a parent that forks the processes that serve.
    """

    def __init__(self, find: Callable[[], Worker], *, name: str) -> None:
        """`find` answers the worker, on a thread of its own; `name` is the application's, for the log."""
        self._find = find
        self._name = name
        self._began_in = 0
        self._again_at = 0.0

    def serve(self) -> None:
        """Note that a request has begun, and start the worker if this process hasn't done so."""
        if self._began_in == os.getpid() and time.monotonic() < self._again_at:
            return
        self._began_in, self._again_at = os.getpid(), math.inf
        # On a thread, for the request is not to wait for a database that is away.
        starter = threading.Thread(target=self._start, name="apoq-starter", daemon=True)
        try:
            starter.start()
        except RuntimeError as error:  # the system allows no more threads
            self._failed(error)

    def _start(self) -> None:
        try:
            self._find().start()
        except Exception as error:  # noqa: BLE001 - the application serves on
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        logger.critical(
            "the in-process worker of %r can't start, and a request %d s from now tries again: %s",
            self._name,
            START_RETRY_SECONDS,
            error,
        )
        self._again_at = time.monotonic() + START_RETRY_SECONDS
