"""Serves the metrics of a worker process over HTTP, and whether it is alive and ready."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Final

import click

from apoq.cli.exits import BadUsage, Failure, explained
from apoq.cli.http_server import Page, PortInUse, Response, Server
from apoq.worker import Worker

logger = logging.getLogger(__name__)

LOOPBACK: Final = "127.0.0.1"

METRICS_PORT, HEALTH_PORT = "--metrics-port", "--health-port"

RETRY_SECONDS: Final = 0.05
"""Seconds between two tries to bind a port that another process is about to close."""

WARN_AFTER_SECONDS: Final = 120.0
"""Seconds after which a warning says that the port is still in use."""

port = click.IntRange(0, 65535)


def check_ports(processes: int, metrics_port: int | None, health_port: int | None) -> None:
    """Raise `BadUsage` if two of so many processes would have the same port."""
    if metrics_port and health_port and 0 < abs(metrics_port - health_port) < processes:
        raise BadUsage(
            f"{METRICS_PORT} and {HEALTH_PORT} must be the same port, or at least {processes} apart, because "
            f"each of the {processes} processes has the next higher one, got {metrics_port} and {health_port}"
        )


class Serving:
    """Serves a worker's pages on the ports of its process, until it is closed."""

    def __init__(self, number: int = 1, *, waits: bool = False) -> None:
        """Take the process's number: the first one, 1, has the given ports, and each other the next higher.

        `waits`: another process with this number has the ports, and closes them soon.
        """
        self.servers: list[Server] = []
        self._number = number
        self._waits = waits
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def begin(self, worker: Worker, *, metrics_port: int | None, health_port: int | None, bind: str) -> None:
        """Serve a worker's pages on these ports: both on one, if the ports are the same.

        `Failure` if a port can't be bound, unless the process `waits`.
        """
        pages: dict[int, tuple[str, dict[str, Page]]] = {}
        for option, given, its in (
            (METRICS_PORT, metrics_port, _metrics_pages),
            (HEALTH_PORT, health_port, _health_pages),
        ):
            if given is not None:
                pages.setdefault(given, (option, {}))[1].update(its(worker))
        for given, (option, its_pages) in pages.items():
            bind_port = partial(
                Server, bind, given + self._number - 1 if given else 0, its_pages, option=option
            )
            if self._waits:
                threading.Thread(
                    target=self._serve_when_free, args=(bind_port,), name="apoq-serving", daemon=True
                ).start()
            else:
                self._serve(bind_port())

    def close(self) -> None:
        """Free the ports."""
        with self._lock:
            self._closed.set()
            for server in self.servers:
                server.close()

    def _serve(self, server: Server) -> None:
        with self._lock:
            if self._closed.is_set():
                server.close()
                return
            server.start()
            self.servers.append(server)
        logger.info("%s at %s", " and ".join(server.names), server.url)

    def _serve_when_free(self, bind_port: Callable[[], Server]) -> None:
        warns_at = time.monotonic() + WARN_AFTER_SECONDS
        while not self._closed.is_set():
            try:
                server = bind_port()
            except PortInUse as error:
                if time.monotonic() >= warns_at:
                    logger.warning("%s; it is tried again until the port is free", error)
                    warns_at = math.inf
                self._closed.wait(RETRY_SECONDS)
            except Failure as error:
                logger.error("%s", error)  # noqa: TRY400 - the message says it all
                return
            else:
                self._serve(server)
                return


def metrics_page(registry: object) -> Page:
    """Return the page with the metrics of a registry."""
    with explained():
        exposition = import_module("apoq.metrics").exposition

    def page(accept: str) -> Response:
        content_type, body = exposition(registry, accept)
        return Response(200, body, content_type)

    return page


def _metrics_pages(worker: Worker) -> Mapping[str, Page]:
    return {"/metrics": metrics_page(worker.metrics)}


def _health_pages(worker: Worker) -> Mapping[str, Page]:
    def live(_accept: str) -> Response:
        if worker.is_alive():
            return Response(200, b"alive\n")
        return Response(503, b"one of the worker's threads has died: restart the process\n")

    def ready(_accept: str) -> Response:
        if worker.is_healthy():
            return Response(200, b"ready\n")
        return Response(503, b"the worker has not started, is stopping, or can't reach the database\n")

    return {"/live": live, "/ready": ready}
