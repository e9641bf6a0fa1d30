"""``apoq metrics``."""

from __future__ import annotations

import logging
from importlib import import_module

import click

from apoq.cli import logs
from apoq.cli.exits import explained
from apoq.cli.http_server import Server
from apoq.cli.serving import LOOPBACK, metrics_page, port
from apoq.cli.target import Target
from apoq.worker.signals import caught, end_as_pid_1, wait

logger = logging.getLogger(__name__)


@click.command("metrics")
@click.option(
    "--port", type=port, default=9410, show_default=True, metavar="PORT", help="The port of /metrics."
)
@click.option(
    "--bind",
    default=LOOPBACK,
    show_default=True,
    metavar="ADDRESS",
    help="The address of the port; 0.0.0.0 for all.",
)
@click.option("--once", is_flag=True, help="Print the metrics, and exit.")
@click.pass_obj
def command(target: Target, /, port: int, bind: str, *, once: bool) -> None:
    """Serve metrics of the queues and workers for Prometheus.

    It reads them from the database. One process for each database and schema is enough. The workers' own
    metrics are those of `apoq worker --metrics-port 9400`.

    \b
        apoq metrics
        apoq metrics --port 9410 --bind 0.0.0.0
        apoq metrics --once

    If the database doesn't respond within 2 s, a scrape gets `apoq_database_up 0`.
    """  # noqa: D301 - click's sign
    end_as_pid_1()
    with explained():
        library = import_module("apoq.metrics")
        registry = library.database_registry(target.engine, target.schema)
    if once:
        _, body = library.exposition(registry)
        click.echo(body.decode(), nl=False)
        return
    logs.set_up("text", None)
    server = Server(bind, port, {"/metrics": metrics_page(registry)}, option="--port")
    with caught() as signals:
        server.start()
        logger.info("metrics of the database at %s/metrics", server.url)
        wait(signals)
    server.close()
