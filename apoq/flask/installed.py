"""What apoq has in one application."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from functools import partial
from typing import Any, Final, Protocol

from flask import Flask

from apoq.flask.contexts import context_for
from apoq.flask.database import Database
from apoq.flask.settings import Settings
from apoq.queue import Queue
from apoq.worker import Worker

logger = logging.getLogger(__name__)

KEY: Final = "apoq"
"""Where it stands: ``app.extensions["apoq"]``."""

PATIENCE: Final = 10.0
"""Seconds after which a request tries again to start an embedded worker that couldn't start."""


class Owner(Protocol):
    """Who has the processors: the extension."""

    def equip(self, worker: Worker) -> None:
        """Give a worker its processors."""


class Installed:
    """apoq in one application: its settings, its queue, its database, and its worker in this process."""

    def __init__(
        self, app: Flask, settings: Settings, queues: tuple[Queue, ...], database: Database, owner: Owner
    ) -> None:
        self.app = app
        self.settings = settings
        self.queue = queues[0]
        """What tasks are added to."""
        self._queues = queues
        self.database = database
        self.owner = owner
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._began_in = 0
        self._again_at = 0.0

    def __repr__(self) -> str:
        return f"<apoq in the application {self.app.name!r}: {self.queue!r}>"

    @property
    def worker(self) -> Worker:
        """The application's worker, made when it is first asked for. It is `start`ed by whoever wants it."""
        engine = self.database.engine
        with self._lock:
            if self._worker is None:
                settings = self.settings
                worker = Worker(
                    engine,
                    *self._queues,
                    concurrency=settings.concurrency,
                    poll_interval=settings.poll_interval,
                    lease=settings.lease,
                    keep_completed=settings.keep_completed,
                    keep_failed=settings.keep_failed,
                    listen_url=settings.listen_url,
                    around=partial(context_for, self.app),
                )
                self.owner.equip(worker)
                self._worker = worker
            return self._worker

    def healthy(self) -> bool:
        """Tell whether the worker is at work in this process."""
        return self._worker is not None and self._worker.healthy()

    def serve(self) -> None:
        """Start the worker, beside the first request in each process: only what serves is to work tasks."""
        if self.app.testing or (self._began_in == os.getpid() and time.monotonic() < self._again_at):
            return
        self._began_in, self._again_at = os.getpid(), math.inf
        # On a thread, for the request is not to wait for a database that is away.
        threading.Thread(target=self._start, name="apoq-starter", daemon=True).start()

    def _start(self) -> None:
        try:
            self.worker.start()
        except Exception as error:  # noqa: BLE001 - the application serves on
            logger.critical(
                "the embedded worker of %r can't start, and a request %d s from now tries again: %s",
                self.app.name,
                PATIENCE,
                error,
            )
            self._again_at = time.monotonic() + PATIENCE


def serve(app: Flask, **_: Any) -> None:
    """Note that a request has begun, as Flask's signal tells."""
    app.extensions[KEY].serve()
