"""The processors and queues of an application, and its workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pyramid.registry import Registry

from apoq.client.queue import Queue
from apoq.core.registry import ProcessorOptions
from apoq.errors import InvalidProcessor
from apoq.pyramid.requests import Requests
from apoq.pyramid.settings import PREFIX, Misconfigured, Settings
from apoq.worker import Worker
from apoq.worker.in_process import InProcessWorker

_KEY: Final = "apoq"

NO_COROUTINE: Final = (
    "must be a plain function, not a coroutine function, because Pyramid's requests belong to a thread"
)


class Application:
    """The state of apoq in one Pyramid application."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.settings = Settings.read(registry.settings)
        self.processors: dict[str, tuple[Callable[[Any], Any], ProcessorOptions]] = {}
        """The processors by type, with their options for `Worker.use`."""
        self.queues: list[Queue] = []
        """The queues with typed tasks."""
        self.in_process: Worker | None = None
        self._starter: InProcessWorker | None = None

    @classmethod
    def of(cls, registry: Registry) -> Application:
        """Return the state in a registry; raise `Misconfigured` if the application doesn't include apoq."""
        try:
            found: Application = registry[_KEY]
        except KeyError:
            raise Misconfigured(
                'this application doesn\'t include apoq: call config.include("apoq.pyramid"), or write '
                "`pyramid.includes = apoq.pyramid` into its section of the ini file"
            ) from None
        return found

    @classmethod
    def is_in(cls, registry: Registry) -> bool:
        """Return whether an application includes apoq."""
        return _KEY in registry

    def enter(self) -> None:
        """Put this object into the registry."""
        self._registry[_KEY] = self

    def make_worker(self) -> Worker:
        """Create a worker with the application's processors and settings."""
        settings = self.settings
        requests = Requests(self._registry, settings)
        typed = [queue for queue in self.queues if not settings.queues or queue.name in settings.queues]
        named = settings.make_queues()
        if settings.queues:
            # By name only, because a queue of typed tasks may be in another schema.
            named = [queue for queue in named if queue.name not in {queue.name for queue in typed}]
        try:
            worker = Worker(
                requests.engine, *typed, *named, middleware=requests.middleware, **settings.worker
            )
            for type_, (processor, options) in self.processors.items():
                worker.use(type_, processor, **options)
        except InvalidProcessor as error:  # a type has two processors
            raise Misconfigured(str(error)) from error
        except ValueError as error:  # the registry of the metrics has a worker
            raise Misconfigured(
                f"{PREFIX}metrics must be true if this process creates several workers, because the given "
                "CollectorRegistry has the metrics of one already; the in-process one is "
                "`request.apoq.worker`"
            ) from error
        for queue in worker.queues:
            for type_, found in worker.processors(queue).items():
                if found.is_coroutine:
                    raise Misconfigured(f"{type_} {NO_COROUTINE}")
        return worker

    def embed(self, _event: object) -> None:
        """Create the in-process worker before the first request, so that a mistake is reported early."""
        self.in_process = worker = self.make_worker()
        self._starter = InProcessWorker(lambda: worker, name=self._registry.__name__)

    def serve(self, _event: object) -> None:
        """Start the in-process worker at the first request."""
        if self._starter is not None:
            self._starter.serve()
