"""``apoq pause``."""

from __future__ import annotations

import time
from contextlib import nullcontext
from datetime import datetime, timedelta
from typing import Final

import click
from rich.console import Console

from apoq.cli.exits import Failure, warn
from apoq.cli.looking import looking
from apoq.cli.output import has_cursor
from apoq.cli.target import Target
from apoq.cli.values import duration
from apoq.cli.values import time as time_value
from apoq.client.queue import Queue
from apoq.monitor.formatting import length, local, tasks
from apoq.monitor.pauses import read_pauses
from apoq.monitor.stats import MAX_WORKERS
from apoq.schema.models import DEFAULT_QUEUE
from apoq.schema.statements.count import count_running
from apoq.schema.statements.workers import workers

POLL_SECONDS: Final = 0.5
"""Seconds between two looks of ``--wait`` at the running tasks."""


@click.command("pause")
@click.argument("queue", default=DEFAULT_QUEUE)
@click.option("--type", "type_", metavar="TYPE", help="Pause only tasks of this type.")
@click.option("--reason", default="", help="A text for people, which `apoq stats` shows.")
@click.option(
    "--until", type=time_value, metavar="TIME", help="End the pause at this time: 2031-05-04T12:00Z."
)
@click.option("--for", "length_", type=duration, metavar="DURATION", help="How long the pause lasts: 2h.")
@click.option("--wait", is_flag=True, help="Return when none of these tasks is running any more.")
@click.option("--timeout", type=duration, metavar="DURATION", help="Wait no longer than this, and then fail.")
@click.pass_obj
def command(
    target: Target,
    /,
    *,
    queue: str,
    type_: str | None,
    reason: str,
    until: datetime | None,
    length_: timedelta | None,
    wait: bool,
    timeout: timedelta | None,
) -> None:
    """Pause a queue: no worker claims its tasks until `apoq resume`.

    Running tasks continue, and tasks can be added as before. The pause is stored in the database, so it
    survives restarts of the workers. Without the name of a queue, it is the default queue.

    \b
        apoq pause --reason "the mail server is down"
        apoq pause imports --for 2h
        apoq pause --type send_newsletter
        apoq pause --wait --timeout 5m && deploy
    """  # noqa: D301 - click's sign
    if until is not None and length_ is not None:
        raise click.UsageError("Give either --until or --for, not both.")
    if timeout is not None and not wait:
        raise click.UsageError("--timeout is how long to --wait.")
    its = Queue(queue, schema=target.schema)
    with target.begin() as connection:
        its.pause(connection, type=type_, reason=reason, until=until or length_)
    with looking(target) as connection:
        for pause in read_pauses(connection, target.schema):
            if (pause.queue, pause.type) == (queue, type_):
                ends = "" if pause.resume_at is None else f" until {local(pause.resume_at)}"
                click.echo(f"Paused the {pause.subject}{ends}.")
        found = connection.execute(workers(target.schema), {"at_most": MAX_WORKERS}).mappings()
        if not any(queue in worker["queues"] for worker in found if worker["is_alive"]):
            warn(f"No live worker has the queue {queue!r}. Is the name right?")
    if wait:
        _wait(target, queue, type_, None if timeout is None else timeout.total_seconds())


def _wait(target: Target, queue: str, type_: str | None, timeout: float | None) -> None:
    """Wait until none of the paused tasks is running; show how many are left on a terminal."""
    deadline = None if timeout is None else time.monotonic() + timeout
    screen = Console(stderr=True)
    with screen.status("waiting") if has_cursor(screen) else nullcontext() as line:
        while running := _running(target, queue, type_):
            if deadline is not None and time.monotonic() > deadline:
                raise Failure(f"{tasks(running)} still running after {length(timeout or 0)}")
            if line is not None:
                line.update(f"waiting for {tasks(running)} to end")
            time.sleep(POLL_SECONDS)
    click.echo("No task is running.")


def _running(target: Target, queue: str, type_: str | None) -> int:
    with looking(target) as connection:
        return sum(
            row["number"]
            for row in connection.execute(count_running(target.schema)).mappings()
            if row["queue"] == queue and type_ in {None, row["type"]}
        )
