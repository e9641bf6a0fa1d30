"""``apoq retry``."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click
import sqlalchemy as sa

from apoq.cli.output import yes_option
from apoq.cli.selection import Words, act, filters, select, since_when
from apoq.cli.target import Target
from apoq.cli.values import duration, identifier
from apoq.client.bulk import Selection, retry_many
from apoq.client.session_adapters import through
from apoq.core.retry import LONGEST_DELAY
from apoq.core.states import FAILED, FINAL
from apoq.monitor.formatting import length, local
from apoq.schema.statements.arrays import array_text

_WORDS: Final = Words("retry", "Retried", "only completed, failed and cancelled tasks can be retried", FINAL)


@click.command("retry")
@click.argument("ids", metavar="[ID]...", nargs=-1, type=identifier)
@click.option(
    "--state", type=click.Choice(FINAL), help="Only tasks in this state. Default: failed, if you give no IDs."
)
@filters
@click.option("--delay", type=duration, help="Run them after this time, such as 10m, and not at once.")
@click.option(
    "--every",
    type=duration,
    help="Leave this time between one task and the next, such as 2s, so that they are not all due at once.",
)
@yes_option
@click.pass_obj
def command(
    target: Target,
    /,
    *,
    ids: tuple[int, ...],
    state: str | None,
    delay: timedelta | None,
    every: timedelta | None,
    yes: bool,
    **wanted: Any,
) -> None:
    """Run tasks again that failed, were cancelled or completed.

    Select them by their IDs, or by options. They become pending, with all their attempts available again. By
    default they are due at once. More than one task is changed only after a confirmation.

    \b
        apoq retry 7
        apoq retry --state failed --type send_welcome --since 1h
        apoq retry --error ConnectionError --delay 10m --every 2s
    """  # noqa: D301 - click's sign
    states = (state or FAILED,)
    chosen = select(target, ids, states, {"state": state, **wanted})
    first, step = delay or timedelta(), every or timedelta()
    longest = first.total_seconds() + step.total_seconds() * max(0, len(chosen) - 1)
    if longest > LONGEST_DELAY.total_seconds():
        raise click.UsageError(
            f"The last of {len(chosen):,} tasks would be due more than a century from now: give a shorter "
            "--delay or --every."
        )
    retried: list[int] = []

    def retry(connection: sa.Connection, queue: str, task_ids: list[int]) -> list[int]:
        selection = Selection(queue, (None,), {"ids": array_text(task_ids)}, len(task_ids))
        begins = first + step * len(retried)
        result: Any = through(
            connection, lambda caller: retry_many(caller, target.schema, selection, begins, step)
        )
        retried.extend(result.ids)
        return list(result.ids)

    def when(changed: int) -> str:
        if not first and not step:
            return ""
        begins = f"due {_in(first)}"
        if not step or changed == 1:
            return f": {begins} ({local(datetime.now(UTC) + first)})"
        last = first + step * (changed - 1)
        return f": the first is {begins}, the last {_in(last)} ({local(datetime.now(UTC) + last)})"

    which = since_when(wanted["since"], states)
    act(target, chosen, retry, _WORDS, ids=ids, yes=yes, which=which, finally_=when)


def _in(delay: timedelta) -> str:
    return f"in {length(delay.total_seconds())}" if delay else "now"
