"""``apoq add``."""

from __future__ import annotations

from typing import Any

import click

from apoq.cli.output import json_option, show_json
from apoq.cli.target import Target
from apoq.cli.values import duration, json_value, time
from apoq.client.queue import Queue
from apoq.monitor.formatting import local
from apoq.schema.models import DEFAULT_QUEUE


@click.command("add")
@click.argument("task_type", metavar="TYPE")
@click.argument("data", type=json_value, metavar="[DATA]", default="{}")
@click.option("--queue", default=DEFAULT_QUEUE, metavar="NAME", show_default=True, help="The task's queue.")
@click.option("--delay", type=duration, help="When it is due, from now: 15m, '2 hours'.")
@click.option(
    "--at",
    "process_at",
    type=time,
    help="When it is due: 2031-05-04T12:00Z, or without Z in local time.",
)
@click.option("--priority", type=int, default=0, help="Tasks with a higher priority run first.")
@click.option("--retry-limit", type=int, metavar="N", help="How often it is retried at most.")
@click.option("--retry-delay", type=duration, help="The time between a failure and the retry.")
@click.option("--timeout", type=duration, help="How long an attempt may take.")
@click.option(
    "--expires-in", type=duration, help="When it expires, from now: it is cancelled if it has not started."
)
@click.option("--unique-key", metavar="KEY", help="No other task is added while a task holds this key.")
@click.option("--key", metavar="KEY", help="The concurrency key, by which tasks are limited.")
@click.option("--meta", type=json_value, help="JSON for your own use, such as a request ID.")
@json_option
@click.pass_obj
def command(
    target: Target, /, *, task_type: str, data: Any, queue: str, as_json: bool, **options: Any
) -> None:
    """Add a task.

    TYPE is the task's type. DATA is JSON, @PATH for a file with JSON, or - for stdin. The default is {}.

    \b
        apoq add send_welcome '{"user_id": 7}' --delay 1h
        echo '{"user_id": 7}' | apoq add send_welcome -
    """  # noqa: D301 - click's sign
    with target.begin() as connection:
        task = Queue(queue, schema=target.schema).add(connection, task_type, data, **options)
    if as_json:
        names = ("id", "type", "queue", "state", "process_at", "add_outcome")
        show_json({name: getattr(task, name) for name in names})
    elif not task.is_new:
        click.echo(f"Nothing was added: task {task.id} has the unique key {task.unique_key!r}.")
    elif options["delay"] or options["process_at"]:
        click.echo(f"Added task {task.id}, due at {local(task.process_at)}.")
    else:
        click.echo(f"Added task {task.id}.")
