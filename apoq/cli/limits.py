"""``apoq limits``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import sqlalchemy as sa
from rich.table import Table
from rich.text import Text

from apoq.cli.looking import looking
from apoq.cli.output import json_option, show, show_json_lines, table, widest
from apoq.cli.target import Target
from apoq.client.queue import Queue
from apoq.core.limits import MAX_OF_POOL
from apoq.monitor.formatting import clean
from apoq.monitor.keys import limited
from apoq.schema.models import DEFAULT_QUEUE
from apoq.schema.statements.limits import all_limits


@click.command("limits")
@click.argument("action", metavar="[ACTION]", required=False, type=click.Choice(["set", "remove"]))
@click.argument("at_most", metavar="[NUMBER]", required=False, type=click.IntRange(0, MAX_OF_POOL))
@click.option("--queue", metavar="NAME", help="The queue; with an action, the default one if not given.")
@click.option("--type", "type_", metavar="TYPE", help="The type of tasks that the limit is for.")
@click.option("--key", metavar="KEY", help="The concurrency key that the limit is for.")
@json_option
@click.pass_obj
def command(
    target: Target,
    /,
    *,
    action: str | None,
    at_most: int | None,
    queue: str | None,
    type_: str | None,
    key: str | None,
    as_json: bool,
) -> None:
    """List the limits, or set or remove one.

    A limit that is set takes precedence over the one that the code declares, until it is removed. With 0, no
    task begins. Running tasks continue.

    \b
        apoq limits
        apoq limits set 5 --key tenant-7
        apoq limits set 0 --type charge --queue billing
        apoq limits remove --key tenant-7
    """  # noqa: D301 - click's sign
    if action is None:
        _list(target, queue, as_json=as_json)
        return
    if (action == "set") != (at_most is not None):
        raise click.UsageError("Give a number to set, and none to remove: limits set 5, limits remove.")
    its = Queue(queue or DEFAULT_QUEUE, schema=target.schema)
    with target.begin() as connection:
        its.limit(connection, at_most, type=type_, key=key)
    _list(target, its.name, as_json=as_json)


def _list(target: Target, queue: str | None, *, as_json: bool) -> None:
    with looking(target) as connection:
        rows = connection.execute(all_limits(target.schema), {"from_queue": queue}).mappings().all()
    if as_json:
        show_json_lines(map(_json, rows))
    elif rows:
        show(_listed(rows))
    else:
        click.echo("No limits.")


def _json(row: sa.RowMapping) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "release"}


def _listed(rows: Sequence[sa.RowMapping]) -> Table:
    made = table(
        *("queue", "of", "at most", "declared", "order", "after a failure", "changed by"),
        right={"at most", "declared"},
        widest=widest(24),
    )
    for row in rows:
        made.add_row(
            Text(clean(row["queue"])),
            Text(limited(row)),
            Text("none" if row["in_force"] is None else f"{row['in_force']:,}", "bold"),
            "" if row["declared"] is None else f"{row['declared']:,}",
            "strict" if row["is_strict"] else "",
            "hold" if row["holds"] else "",
            Text(clean(row["changed_by"])),
        )
    return made
