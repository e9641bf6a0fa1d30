"""``apoq resume``."""

from __future__ import annotations

import click

from apoq.cli.exits import Failure
from apoq.cli.looking import looking
from apoq.cli.target import Target
from apoq.client.queue import Queue
from apoq.monitor.pauses import read_pauses
from apoq.schema.models import DEFAULT_QUEUE


@click.command("resume")
@click.argument("queue", default=DEFAULT_QUEUE)
@click.option(
    "--type", "type_", metavar="TYPE", help="Resume tasks of this type, which was paused by itself."
)
@click.pass_obj
def command(target: Target, /, *, queue: str, type_: str | None) -> None:
    """End a pause: workers claim the tasks of the queue again.

    \b
        apoq resume
        apoq resume imports
        apoq resume --type send_newsletter
    """  # noqa: D301 - click's sign
    subject = f"queue {queue!r}" if type_ is None else f"type {type_!r} of queue {queue!r}"
    with target.begin() as connection:
        is_paused = Queue(queue, schema=target.schema).resume(connection, type=type_)
    with looking(target) as connection:
        others = [pause for pause in read_pauses(connection, target.schema) if pause.queue == queue]
    left = "".join(f"\n{pause}" for pause in others)
    if not is_paused:
        raise Failure(f"the {subject} is not paused{left}")
    click.echo(f"Resumed the {subject}.{left}")
