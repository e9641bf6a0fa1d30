"""What apoq has in one application."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, Final, Protocol

from flask import Flask

from apoq.client.queue import Queue
from apoq.flask.contexts import context_for
from apoq.flask.database import Database
from apoq.flask.settings import Settings
from apoq.worker import Worker
from apoq.worker.in_process import InProcessWorker

KEY: Final = "apoq"
"""Where it stands: ``app.extensions["apoq"]``."""


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
        self._in_process = InProcessWorker(lambda: self.worker, name=app.name)

    def __repr__(self) -> str:
        return f"<apoq in the application {self.app.name!r}: {self.queue!r}>"

    @property
    def worker(self) -> Worker:
        """The application's worker, made when it is first asked for. It is `start`ed by whoever wants it."""
        engine = self.database.engine
        with self._lock:
            if self._worker is None:
                worker = Worker(
                    engine,
                    *self._queues,
                    middleware=partial(context_for, self.app),
                    **self.settings.worker,
                )
                self.owner.equip(worker)
                self._worker = worker
            return self._worker

    def is_healthy(self) -> bool:
        """Tell whether the worker is at work in this process."""
        return self._worker is not None and self._worker.is_healthy()

    def serve(self) -> None:
        """Start the worker, beside the first request in each process: only what serves is to work tasks."""
        if not self.app.testing:
            self._in_process.serve()


def serve(app: Flask, **_: Any) -> None:
    """Note that a request has begun, as Flask's signal tells."""
    app.extensions[KEY].serve()
