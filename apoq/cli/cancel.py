"""``apoq cancel``."""

from __future__ import annotations

from typing import Any, Final

import click
import sqlalchemy as sa

from apoq.cli.output import yes_option
from apoq.cli.selection import Words, act, filters, retrying_option, select, since_when
from apoq.cli.target import Target
from apoq.cli.values import identifier
from apoq.client.bulk import Selection, cancel_many
from apoq.client.session_adapters import through
from apoq.core.outcomes import Cancel, report
from apoq.core.payload import encode
from apoq.core.states import CANCELLABLE, PENDING
from apoq.schema.statements.arrays import array_text

_WORDS: Final = Words(
    "cancel", "Cancelled", "only pending, waiting and running tasks can be cancelled", CANCELLABLE
)


@click.command("cancel")
@click.argument("ids", metavar="[ID]...", nargs=-1, type=identifier)
@click.option(
    "--state",
    type=click.Choice(CANCELLABLE),
    help="Only tasks in this state. Default: all that have not ended.",
)
@retrying_option
@filters
@yes_option
@click.pass_obj
def command(
    target: Target,
    /,
    *,
    ids: tuple[int, ...],
    state: str | None,
    retrying: bool,
    yes: bool,
    **wanted: Any,
) -> None:
    """Cancel tasks that have not ended.

    Select pending, waiting or running tasks by their IDs, or by options. A running coroutine is cancelled. A
    running plain function is asked to stop by `task.should_stop`; its writes to `task.session` are rolled
    back. More than one task is changed only after a confirmation.

    \b
        apoq cancel 7
        apoq cancel --type send_newsletter
        apoq cancel --retrying --error ConnectionError
    """  # noqa: D301 - click's sign
    if retrying and state not in {None, PENDING}:
        raise click.UsageError(f"--retrying selects pending tasks: leave out --state {state}.")
    states = (PENDING,) if retrying else (state,) if state else CANCELLABLE
    chosen = select(target, ids, states, {"state": state, "retrying": retrying, **wanted})
    error = encode(report(Cancel()))

    def cancel(connection: sa.Connection, queue: str, task_ids: list[int]) -> list[int]:
        selection = Selection(queue, CANCELLABLE, {"ids": array_text(task_ids)}, len(task_ids))
        changed: Any = through(
            connection, lambda caller: cancel_many(caller, target.schema, selection, error)
        )
        return list(changed)

    act(target, chosen, cancel, _WORDS, ids=ids, yes=yes, which=since_when(wanted["since"], states))
