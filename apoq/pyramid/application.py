"""What an application has said of its tasks, and the workers that are made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pyramid.registry import Registry

from apoq.client.queue import Queue
from apoq.core.registry import ProcessorOptions
from apoq.errors import InvalidProcessor
from apoq.pyramid.requests import Requests
from apoq.pyramid.settings import Misconfigured, Settings
from apoq.worker import Worker
from apoq.worker.in_process import InProcessWorker

_KEY: Final = "apoq"


class Application:
    """The tasks of one Pyramid application."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.settings = Settings.read(registry.settings)
        self.processors: dict[str, tuple[Callable[[Any], Any], ProcessorOptions]] = {}
        """By their types: the processors, and their options for `Worker.use`."""
        self.queues: list[Queue] = []
        """Those with typed tasks."""
        self.in_process: Worker | None = None
        self._starter: InProcessWorker | None = None

    @classmethod
    def of(cls, registry: Registry) -> Application:
        """Answer a registry's application; `Misconfigured` where it doesn't include apoq."""
        try:
            found: Application = registry[_KEY]
        except KeyError:
            raise Misconfigured(
                'this application has nothing of apoq\'s: call config.include("apoq.pyramid"), or write '
                "`pyramid.includes = apoq.pyramid` into its section of the ini file"
            ) from None
        return found

    def enter(self) -> None:
        """Let the registry know."""
        self._registry[_KEY] = self

    def make_worker(self) -> Worker:
        """Make a worker with the application's processors, as its settings say."""
        settings = self.settings
        requests = Requests(self._registry, settings)
        typed = [queue for queue in self.queues if not settings.queues or queue.name in settings.queues]
        named = settings.make_queues()
        if settings.queues:
            # Which may be in a schema of its own.
            named = [queue for queue in named if queue.name not in {queue.name for queue in typed}]
        try:
            worker = Worker(
                requests.engine, *typed, *named, middleware=requests.middleware, **settings.worker
            )
            for type_, (processor, options) in self.processors.items():
                worker.use(type_, processor, **options)
        except InvalidProcessor as error:  # one by add_apoq_task, and one by @queue.task
            raise Misconfigured(str(error)) from error
        return worker

    def embed(self, _event: object) -> None:
        """Make the in-process worker, so that it can't begin to work with a mistake in it."""
        self.in_process = worker = self.make_worker()
        self._starter = InProcessWorker(lambda: worker, name=self._registry.__name__)

    def serve(self, _event: object) -> None:
        """Start the in-process worker beside the first request."""
        if self._starter is not None:
            self._starter.serve()
