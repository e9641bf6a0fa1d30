"""Serves the metrics of a worker process over HTTP, and whether it is alive and ready."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Final

import click

from apoq.cli.exits import explained
from apoq.cli.http_server import Page, Response, Server
from apoq.worker import Worker

LOOPBACK: Final = "127.0.0.1"

METRICS_PORT, HEALTH_PORT = "--metrics-port", "--health-port"

port = click.IntRange(0, 65535)


def serve(
    worker: Worker, *, metrics_port: int | None, health_port: int | None, bind: str, number: int
) -> list[Server]:
    """Serve a worker's pages on these ports: both on one, if the ports are the same.

    `number` is that of this process: the first one, 1, has the given ports, and each other the next higher.
    """
    pages: dict[int, tuple[str, dict[str, Page]]] = {}
    for option, given, its in (
        (METRICS_PORT, metrics_port, _metrics_pages),
        (HEALTH_PORT, health_port, _health_pages),
    ):
        if given is not None:
            pages.setdefault(given, (option, {}))[1].update(its(worker))
    servers = []
    for given, (option, its_pages) in pages.items():
        server = Server(bind, given + number - 1 if given else 0, its_pages, option=option)
        server.start()
        servers.append(server)
    return servers


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
