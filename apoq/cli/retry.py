"""``apoq retry``."""

from __future__ import annotations

from typing import Any, Final

import click
import sqlalchemy as sa

from apoq.cli.output import yes_option
from apoq.cli.selection import TASK_ID, Words, act, filters, select
from apoq.cli.target import Target
from apoq.client.queue import Queue
from apoq.core.states import FAILED, FINAL

_WORDS: Final = Words("retry", "Retried", "only a task that has ended can be retried")


@click.command("retry")
@click.argument("ids", metavar="[ID]...", nargs=-1, type=TASK_ID)
@click.option("--state", type=click.Choice(FINAL), help="Those that ended so; failed, if you don't say.")
@filters
@yes_option
@click.pass_obj
def command(target: Target, /, *, ids: tuple[int, ...], state: str | None, yes: bool, **wanted: Any) -> None:
    """Run tasks again that have ended.

    Those with these IDs, or all that the options let through. They are due at once, with all their attempts
    before them.

    \b
        apoq retry 7
        apoq retry --state failed --type send_welcome --since 1h
    """  # noqa: D301 - click's sign
    chosen = select(target, ids, (state or FAILED,), {"state": state, **wanted})
    act(target, chosen, _retry, _WORDS, ids=ids, yes=yes)


def _retry(queue: Queue, connection: sa.Connection, task_id: int) -> bool:
    return queue.retry(connection, task_id)
