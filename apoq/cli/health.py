"""``apoq health``."""

from __future__ import annotations

import http.client
import platform
from typing import Final

import click
import sqlalchemy as sa

from apoq.cli.exits import Failure, Unreachable
from apoq.cli.looking import looking
from apoq.cli.serving import LOOPBACK, port
from apoq.cli.target import Target
from apoq.schema.statements.workers import workers_on

TIMEOUT_SECONDS: Final = 5.0
"""Seconds in which the worker must respond."""


@click.command("health")
@click.option(
    "--port", type=port, metavar="PORT", help="Ask the process that has this --health-port, on this machine."
)
@click.option("--live", is_flag=True, help="With --port: whether it can go on, not whether it is ready.")
@click.pass_obj
def command(target: Target, /, port: int | None, *, live: bool) -> None:
    """Check that a worker on this machine works; for the health checks of containers.

    \b
        apoq health
        apoq health --port 9402
        apoq health --port 9402 --live

    With --port it asks the worker's process. Otherwise it looks for a live worker of this machine, by its
    host name, in the database. The exit code is 0 if there is one.
    """  # noqa: D301 - click's sign
    if port is None and live:
        raise click.UsageError("--live needs --port: give the --health-port of the worker")
    click.echo(_from_database(target) if port is None else _from_process(port, "/live" if live else "/ready"))


def _from_process(port: int, path: str) -> str:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read(500).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(
            f"nothing responds on port {port} of this machine: {error}: start the worker with --health-port "
            f"{port}"
        ) from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise Failure(f"not {'alive' if path == '/live' else 'ready'}: {text}")
    return text


def _from_database(target: Target) -> str:
    host = platform.node()
    with looking(target) as connection:
        alive = _count(connection, target.schema, host)
    if not alive:
        raise Failure(f"no worker of this machine, {host}, is alive: see its log")
    return "1 worker is alive" if alive == 1 else f"{alive:,} workers are alive"


def _count(connection: sa.Connection, schema: str | None, host: str) -> int:
    count: int = connection.execute(workers_on(schema), {"worker_host": host}).scalar_one()
    return count
