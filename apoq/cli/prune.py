"""``apoq prune``."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

import click
import sqlalchemy as sa

from apoq.cli.exits import Failure
from apoq.cli.looking import looking
from apoq.cli.output import confirm, json_option, show_json, yes_option
from apoq.cli.selection import progress
from apoq.cli.target import Target
from apoq.cli.values import duration
from apoq.cli.wording import tasks
from apoq.statements.count import COUNTED, queues
from apoq.statements.prune import (
    count_prunable_completed,
    count_prunable_failed,
    prune_completed,
    prune_failed,
)

BATCH: Final = 1_000
"""Rows that one transaction deletes at most."""

QUEUES: Final = 10_000
"""Queues that are looked through at most."""


@click.command("prune")
@click.option("--completed-before", type=duration, help="Those that completed longer ago.")
@click.option("--failed-before", type=duration, help="Those that failed, or were cancelled, longer ago.")
@click.option("--queue", metavar="NAME", help="Only those of this queue.")
@yes_option
@json_option
@click.pass_obj
def command(
    target: Target,
    *,
    completed_before: timedelta | None,
    failed_before: timedelta | None,
    queue: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete tasks that ended long ago.

    Workers do so by themselves, a day after a completion and a week after a failure unless they are told
    otherwise. What has not ended is never deleted. Many small transactions, so that no worker waits for it.

    \b
        apoq prune --completed-before 1h --failed-before 30d
    """  # noqa: D301 - click's sign
    if completed_before is None and failed_before is None:
        raise click.UsageError("what is to be deleted? Give --completed-before, --failed-before, or both.")
    kinds = [
        (keep, count_of(target.schema), prune(target.schema))
        for keep, count_of, prune in (
            (completed_before, count_prunable_completed, prune_completed),
            (failed_before, count_prunable_failed, prune_failed),
        )
        if keep is not None
    ]
    with looking(target) as connection:
        names = connection.scalars(queues(target.schema), {"at_most": QUEUES}).all()
        if queue is not None and queue not in names:
            raise Failure(f"there is no queue {queue!r}: `apoq stats` shows those that have tasks or workers")
        chosen = names if queue is None else [queue]
        work: list[tuple[sa.Delete, dict[str, Any]]] = []
        counts: list[int] = []
        for name in chosen:
            for keep, count, prune in kinds:
                parameters = {"from_queue": name, "keep": keep}
                found = connection.scalar(count, {**parameters, "at_most": COUNTED + 1})
                if found:
                    work.append((prune, parameters))
                    counts.append(found)
    is_known = max(counts, default=0) <= COUNTED
    total = sum(min(count, COUNTED) for count in counts)
    if total > 1:
        confirm(f"Delete {tasks(total)}{'' if is_known else ' or more'} for good?", yes=yes)
    deleted = _delete(target, work, total if is_known else None)
    if as_json:
        show_json({"deleted": deleted})
    else:
        click.echo(f"Deleted {tasks(deleted)}." if deleted else "Nothing ended that long ago.")


def _delete(target: Target, work: list[tuple[sa.Delete, dict[str, Any]]], total: int | None) -> int:
    deleted = 0
    with progress("delete", total) as advance:
        for prune, parameters in work:
            count = BATCH
            while count == BATCH:
                with target.begin() as connection:
                    count = connection.execute(prune, {**parameters, "at_most": BATCH}).rowcount
                deleted += count
                advance(count)
    return deleted
