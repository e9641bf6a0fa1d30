"""``apoq show``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

import click
import sqlalchemy as sa
from rich.table import Table
from rich.text import Text

from apoq.cli.exits import Failure
from apoq.cli.list import STYLES
from apoq.cli.looking import looking, missing, task_json
from apoq.cli.output import json_option, show, show_json
from apoq.cli.selection import TASK_ID
from apoq.cli.target import Target
from apoq.monitor.formatting import ago, clean
from apoq.schema.statements.find import details

_LINES: Final = 40
"""Of data that are shown."""

_TIMES: Final = {
    "added": "created_at",
    "due": "process_at",
    "claimed": "claimed_at",
    "completed": "completed_at",
    "failed": "failed_at",
    "cancelled": "cancelled_at",
}


@click.command("show")
@click.argument("task_id", metavar="ID", type=TASK_ID)
@click.option("--full", is_flag=True, help="Show data whole, however long it is.")
@json_option
@click.pass_obj
def command(target: Target, *, task_id: int, full: bool, as_json: bool) -> None:
    """Show all that is known of a task.

    Its data, when what happened to it, and its last error with the traceback.
    """
    with looking(target) as connection:
        row = connection.execute(details(target.schema), {"task_id": task_id}).mappings().one_or_none()
    if row is None:
        raise Failure(missing(task_id))
    if as_json:
        show_json(task_json(row))
        return
    show(_facts(row))
    for text in _data(row["data"], None if full else _LINES), *_error(row["error"]):
        show(Text())
        show(text)


def _facts(row: sa.RowMapping) -> Table:
    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    made.add_row("task", f"{row['id']}")
    made.add_row("type", Text(clean(row["type"]), "bold"))
    made.add_row("state", Text(row["state"], STYLES.get(row["state"], "dim")))
    made.add_row(
        "queue", Text(clean(row["queue"])) + (f", priority {row['priority']}" if row["priority"] else "")
    )
    for name, column in _TIMES.items():
        if row[column] is not None:
            made.add_row(name, f"{row[column].isoformat(' ', 'seconds')}  ({ago(row[column], row['now'])})")
    made.add_row("attempts", _attempts(row))
    for name in ("retry_limit", "retry_delay", "timeout"):
        if (value := row[name]) is not None:
            text = f"{value.total_seconds():g} s" if isinstance(value, timedelta) else str(value)
            made.add_row(name.replace("_", " "), text)
    if row["meta"] is not None:
        made.add_row("meta", Text(clean(json.dumps(row["meta"], ensure_ascii=False))))
    if row["worker_id"] is not None:
        made.add_row("worker", str(row["worker_id"]))
    return made


def _attempts(row: sa.RowMapping) -> str:
    parts = [f"{row['attempt']}"]
    if row["fail_count"]:
        parts.append(f"{row['fail_count']} failed")
    if row["rescue_count"]:
        parts.append(f"taken from a dead worker {row['rescue_count']} times")
    return ", ".join(parts)


def _data(text: str, most: int | None) -> Text:
    try:
        lines = json.dumps(json.loads(text), indent=2, ensure_ascii=False).splitlines()
    except (ValueError, RecursionError):
        lines = [text]  # what Python can't read is shown as it stands
    shown = [clean(line) if most is None else _cut(clean(line)) for line in lines[:most]]
    if len(lines) > len(shown):
        shown.append(f"… {len(lines) - len(shown):,} more lines: --full shows them")
    return Text("\n".join(shown))


def _cut(line: str, most: int = 1_000) -> str:
    return (
        line
        if len(line) <= most
        else f"{line[:most]}… {len(line) - most:,} more characters: --full shows them"
    )


def _error(error: Any) -> Iterator[Text]:
    """Show the last failure, and beneath it where it came from."""
    if not isinstance(error, dict):
        return
    yield Text(clean(f"{error.get('class', 'error')}: {error.get('message', '')}"), "red")
    if trace := error.get("traceback"):
        yield Text("\n".join(map(clean, str(trace).rstrip().splitlines())), "dim")
