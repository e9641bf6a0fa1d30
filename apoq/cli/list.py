"""``apoq list``."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import click
import sqlalchemy as sa
from rich.table import Table
from rich.text import Text

from apoq.cli.exits import warn
from apoq.cli.looking import looking, task_json
from apoq.cli.output import json_option, show, show_json_lines, table, widest
from apoq.cli.selection import FIRST_ID, LAST_ID, TASK_ID, filters
from apoq.cli.target import Target
from apoq.core.states import COMPLETED, FAILED, PENDING, RUNNING, STATES
from apoq.monitor.formatting import ago, clean, length
from apoq.schema.models import DEFAULT_QUEUE
from apoq.schema.statements.find import LOOKED_AT, find, horizon

STYLES: Final = {PENDING: "", RUNNING: "cyan", COMPLETED: "green", FAILED: "red"}
"""The colour of a state."""

MOST: Final = 10_000
_EXCERPT: Final = 200
_WHOLE: Final = 2**31 - 1


@click.command("list")
@click.option("--state", type=click.Choice(STATES), help="Only those in this state.")
@filters
@click.option(
    "--limit", type=click.IntRange(1, MOST), default=20, show_default=True, help="How many at most."
)
@click.option(
    "--before", "before_id", type=TASK_ID, metavar="ID", help="Only those with a lower id: the next page."
)
@json_option
@click.pass_obj
def command(
    target: Target,
    *,
    state: str | None,
    task_type: str | None,
    queue: str | None,
    since: datetime | None,
    limit: int,
    before_id: int | None,
    as_json: bool,
) -> None:
    """List tasks, the newest first.

    With --json a line of JSON for each, with its data. No index knows of types, nor of when a task was added:
    a search for those looks at 100,000 tasks at most, and says how to go on.
    """
    parameters = {
        "up_to_id": LAST_ID if before_id is None else max(before_id - 1, FIRST_ID),
        "in_queue": queue,
        "of_type": task_type,
        "since": since,
        "at_most": limit,
        "excerpt": _WHOLE if as_json else _EXCERPT,
    }
    with looking(target) as connection:
        rows = connection.execute(find(target.schema, state), parameters).mappings().all()
        looked_at, lowest_id = (0, None)
        if len(rows) < limit:
            looked_at, lowest_id = connection.execute(horizon(target.schema, state), parameters).one()
    if as_json:
        show_json_lines(map(task_json, rows))
    elif rows:
        show(listed(rows))
    else:
        click.echo("No tasks.")
    if len(rows) == limit and not as_json:
        warn(f"There may be more: --before {rows[-1]['id']} shows the next page.")
    elif looked_at == LOOKED_AT:
        warn(f"Looked at {LOOKED_AT:,} tasks: --before {lowest_id} looks further.")


def listed(rows: Any) -> Table:
    """Make a table of tasks; the queue is in it where there is more than the default one."""
    shows_queue = any(row["queue"] != DEFAULT_QUEUE for row in rows)
    headings = ["id", "type", "queue"] if shows_queue else ["id", "type"]
    made = table(*headings, "state", "when", right={"id"}, widest=widest(24))
    # What is left of a terminal's line; a program gets it whole.
    made.expand = widest(1) is not None
    made.add_column("data", no_wrap=True, ratio=1 if made.expand else None, overflow="ellipsis")
    for row in rows:
        queue = [Text(clean(row["queue"]))] if shows_queue else []
        style = STYLES.get(row["state"], "dim")
        made.add_row(
            str(row["id"]),
            Text(clean(row["type"])),
            *queue,
            Text(row["state"], style),
            when(row),
            _about(row),
        )
    return made


def when(row: sa.RowMapping) -> str:
    """Say what time means to a task in its state: when it is due, since when it runs, when it ended."""
    now = row["now"]
    match row["state"]:
        case "pending":
            late = (now - row["process_at"]).total_seconds()
            return f"due {length(late)} ago" if late >= 0 else f"in {length(-late)}"
        case "waiting":
            return ""
        case "running":
            return f"for {length((now - row['claimed_at']).total_seconds())}" if row["claimed_at"] else ""
        case "completed":
            return ago(row["completed_at"], now)
    return ago(row["cancelled_at"] or row["failed_at"] or row["process_at"], now)


def _about(row: sa.RowMapping) -> Text:
    """Show why a task failed, or else what it is about."""
    error = row["error"]
    if row["state"] == FAILED and isinstance(error, dict):
        return Text(clean(f"{error.get('class', '')}: {error.get('message', '')}"), "red")
    return Text("" if row["data"] == "{}" else clean(row["data"]), "dim")
