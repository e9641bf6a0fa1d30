"""``apoq keys``."""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.table import Table
from rich.text import Text

from apoq.cli.exits import warn
from apoq.cli.looking import looking
from apoq.cli.output import json_option, show, show_json_lines, table, widest
from apoq.cli.target import Target
from apoq.monitor.formatting import clean, length, number
from apoq.monitor.keys import COUNTED, KeyFigures, read_keys
from apoq.schema.models import DEFAULT_QUEUE


@click.command("keys")
@click.option("--queue", metavar="NAME", help="Only keys of this queue.")
@click.option("--full", is_flag=True, help="Only those of which no more tasks may begin.")
@click.option(
    "--limit", type=click.IntRange(1, 1_000), default=100, show_default=True, help="How many to list."
)
@json_option
@click.pass_obj
def command(target: Target, /, *, queue: str | None, full: bool, limit: int, as_json: bool) -> None:
    """List the concurrency keys, types and queues with limits of which tasks run or wait.

    "for" is since when the first of the running tasks runs, and since when the first of the waiting tasks
    waits. A key with a strict order may be held up by a failed task, until that is retried or deleted.

    \b
        apoq keys --full
        apoq keys --queue charges --json
    """  # noqa: D301 - click's sign
    with looking(target) as connection:
        found = read_keys(connection, target.schema, queue)
    found = [each for each in found if each.is_full or not full]
    if as_json:
        show_json_lines({**asdict(each), "is_full": each.is_full} for each in found[:limit])
    elif found:
        show(_listed(found[:limit]))
    else:
        click.echo("No full keys." if full else "No tasks with places run or wait.")
    if len(found) > limit:
        warn(f"There are {len(found):,}: raise --limit, or choose a queue by --queue.")


def _listed(found: list[KeyFigures]) -> Table:
    shows_queue = any(each.queue != DEFAULT_QUEUE for each in found)
    headings = ["queue"] if shows_queue else []
    made = table(
        *headings,
        *("key or type", "running", "at most", "for", "worker", "waiting", "for", "held by"),
        right={"running", "at most", "waiting"},
        widest=widest(24),
    )
    for each in found:
        made.add_row(
            *([Text(clean(each.queue))] if shows_queue else []),
            _name(each),
            number(each.running, COUNTED.running),
            "" if each.at_most is None else Text(f"{each.at_most:,}", "yellow" if each.is_full else ""),
            "" if each.running_for is None else length(each.running_for),
            Text(clean(each.worker or "")),
            number(each.waiting, COUNTED.waiting),
            "" if each.waiting_for is None else length(each.waiting_for),
            "" if each.held_by is None else Text(f"failed task {each.held_by}", "red"),
        )
    return made


def _name(each: KeyFigures) -> Text:
    if each.key is not None:
        return Text(clean(each.key), "bold")
    return Text("whole queue" if each.type is None else f"type {clean(each.type)}")
