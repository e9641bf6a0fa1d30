"""``apoq prune``."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

import click

from apoq.cli.exits import Failure, warn
from apoq.cli.looking import looking
from apoq.cli.output import confirm, json_option, show_json, yes_option
from apoq.cli.selection import progress
from apoq.cli.target import Target
from apoq.cli.values import age
from apoq.monitor.formatting import tasks
from apoq.postgres.connections import own_engine
from apoq.schema.statements.count import COUNTED, queues
from apoq.schema.statements.prune import (
    count_prunable_completed,
    count_prunable_failed,
    prune_completed,
    prune_failed,
)
from apoq.worker.maintenance.pruner import Rule, retention

MAX_QUEUES: Final = 10_000
"""How many queues are examined at most."""


@click.command("prune")
@click.option("--completed-before", type=age, help="Tasks that completed longer ago, such as 12h.")
@click.option("--failed-before", type=age, help="Tasks that failed or were cancelled longer ago.")
@click.option("--queue", metavar="NAME", help="Only tasks of this queue.")
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
    """Delete tasks that ended some time ago.

    Workers do this by themselves: by default, a day after a completion and a week after a failure. Tasks that
    have not ended are never deleted. Many small transactions are used, so that workers don't have to wait.

    \b
        apoq prune --completed-before 1h --failed-before 30d
    """  # noqa: D301 - click's sign
    if completed_before is None and failed_before is None:
        raise click.UsageError("Which tasks? Give --completed-before, --failed-before, or both.")
    kinds = [
        (keep, count_of(target.schema), prune(target.schema))
        for keep, count_of, prune in (
            (completed_before, count_prunable_completed, prune_completed),
            (failed_before, count_prunable_failed, prune_failed),
        )
        if keep is not None
    ]
    with looking(target) as connection:
        names = connection.scalars(queues(target.schema), {"at_most": MAX_QUEUES + 1}).all()
        has_more = len(names) > MAX_QUEUES
        if queue is not None and queue not in names and not has_more:
            raise Failure(f"there is no queue {queue!r}: `apoq stats` shows those that have tasks or workers")
        chosen = names[:MAX_QUEUES] if queue is None else [queue]
        rules: list[Rule] = []
        counts: list[int] = []
        for name in chosen:
            for keep, count, prune in kinds:
                parameters = {"from_queue": name, "keep": keep, "at_most": COUNTED + 1}
                if found := connection.scalar(count, parameters):
                    rules.append(retention(f"the pruning of the queue {name!r}", prune, name, keep))
                    counts.append(found)
    is_known = max(counts, default=0) <= COUNTED
    total = sum(min(count, COUNTED) for count in counts)
    if total > 1:
        confirm(f"Delete {tasks(total)}{'' if is_known else ' or more'} permanently?", yes=yes)
    _delete(target, rules, total if is_known else None)
    deleted, kept = sum(rule.deleted for rule in rules), sum(rule.kept for rule in rules)
    if has_more and queue is None:
        warn(f"Only the first {MAX_QUEUES:,} queues were examined: give another one by --queue.")
    if as_json:
        show_json({"deleted": deleted, "kept": kept})
        return
    click.echo(f"Deleted {tasks(deleted)}." if deleted or kept else "No tasks ended that long ago.")
    if kept:
        click.echo(f"{tasks(kept)} can't be deleted, such as because of a foreign key.")


def _delete(target: Target, rules: list[Rule], total: int | None) -> None:
    engine = own_engine(target.engine)
    try:
        with target.explained(), progress("delete", total) as advance:
            for rule in rules:
                more = True
                while more:
                    before = rule.deleted
                    more = rule.prune(engine)
                    advance(rule.deleted - before)
    finally:
        engine.dispose()
