"""The state of the extension in one application."""

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
"""Its key in ``app.extensions``."""


class Owner(Protocol):
    """The extension, which has the processors."""

    def equip(self, worker: Worker) -> None:
        """Add the processors to a worker."""


class Installed:
    """The state of the extension in one application."""

    def __init__(
        self, app: Flask, settings: Settings, queues: tuple[Queue, ...], database: Database, owner: Owner
    ) -> None:
        self.app = app
        self.settings = settings
        self.queue = queues[0]
        """The queue that tasks are added to."""
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
        """The application's worker in this process, created at the first use and not started."""
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
        """Return whether the worker is started in this process, and healthy."""
        return self._worker is not None and self._worker.is_healthy()

    def serve(self) -> None:
        """Start the worker at the first request, so that only processes that serve requests run tasks."""
        if not self.app.testing:
            self._in_process.serve()


def serve(app: Flask, **_: Any) -> None:
    """Receive Flask's signal that a request has started."""
    app.extensions[KEY].serve()
