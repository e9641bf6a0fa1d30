"""``apoq failures``."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table
from rich.text import Text

from apoq.cli.exits import warn
from apoq.cli.looking import looking
from apoq.cli.output import json_option, show, show_json_lines, table, widest
from apoq.cli.selection import filters, parameters_of, since_when
from apoq.cli.target import Target
from apoq.core.states import FAILED
from apoq.monitor.failures import EXAMINED, FailureGroup, Failures, failures
from apoq.monitor.formatting import ago, clean


@click.command("failures")
@filters
@json_option
@click.pass_obj
def command(target: Target, /, *, as_json: bool, **wanted: Any) -> None:
    """Group the failed tasks by type, error and place, the largest group first.

    The place is the innermost line of your own code in the traceback.

    \b
        apoq failures --since 1d
        apoq retry --state failed --type charge --error ConnectionError --since 1d

    The newest 10,000 failed tasks are examined. With --json, one line of JSON is printed for each group.
    """  # noqa: D301 - click's sign
    with looking(target) as connection:
        found = failures(connection, target.schema, parameters_of(wanted))
    if as_json:
        show_json_lines(map(_json, found.groups))
    elif found.groups:
        show(_listed(found))
        if since := since_when(wanted["since"], [FAILED]):
            warn(f"Only tasks{since}.")
    else:
        click.echo("No failed tasks.")
    if not found.is_all:
        warn(f"Examined the newest {EXAMINED:,} failed tasks: there may be more.")


def _listed(found: Failures) -> Table:
    made = table("tasks", "type", "error", "where", "last", "id", right={"tasks", "id"}, widest=widest(30))
    made.expand = widest(1) is not None
    made.add_column("message", no_wrap=True, ratio=1 if made.expand else None, overflow="ellipsis")
    for group in found.groups:
        last = ago(group.last_at, found.now) if group.last_at and found.now else ""
        made.add_row(
            f"{group.count:,}",
            Text(clean(group.type)),
            Text(clean(group.error_class), "red"),
            Text(clean(group.where or "")),
            last,
            str(group.last_id),
            Text(clean(group.message), "dim"),
        )
    return made


def _json(group: FailureGroup) -> dict[str, Any]:
    return {**vars(group), "queues": sorted(group.queues)}
