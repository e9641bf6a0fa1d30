"""``apoq cancel``."""

from __future__ import annotations

from typing import Any, Final

import click
import sqlalchemy as sa

from apoq.cli.output import yes_option
from apoq.cli.selection import TASK_ID, Words, act, filters, select
from apoq.cli.target import Target
from apoq.client.queue import Queue
from apoq.core.states import PENDING, RUNNING

_WORDS: Final = Words("cancel", "Cancelled", "only a task that is pending or running can be cancelled")
_STATES: Final = (PENDING, RUNNING)


@click.command("cancel")
@click.argument("ids", metavar="[ID]...", nargs=-1, type=TASK_ID)
@click.option("--state", type=click.Choice(_STATES), help="Those in this state; both, if you don't say.")
@filters
@yes_option
@click.pass_obj
def command(target: Target, /, *, ids: tuple[int, ...], state: str | None, yes: bool, **wanted: Any) -> None:
    """Cancel tasks that are pending or running.

    Those with these IDs, or all that the options let through. A coroutine that runs is cancelled; a plain
    function that runs is told by `task.should_stop`, and what it still writes in `task.session` is undone.

    \b
        apoq cancel 7
        apoq cancel --type send_newsletter
    """  # noqa: D301 - click's sign
    chosen = select(target, ids, (state,) if state else _STATES, {"state": state, **wanted})
    act(target, chosen, _cancel, _WORDS, ids=ids, yes=yes)


def _cancel(queue: Queue, connection: sa.Connection, task_id: int) -> bool:
    return queue.cancel(connection, task_id)
