"""``apoq show``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Final

import click
import sqlalchemy as sa
from rich.table import Table
from rich.text import Text

from apoq.cli.follow import follow as follow_task
from apoq.cli.follow import progress_text, read
from apoq.cli.graph_tree import drawn
from apoq.cli.list import RETRYING, STYLES, shown_state
from apoq.cli.looking import looking, task_json
from apoq.cli.output import console, json_option, show, show_json
from apoq.cli.target import Target
from apoq.cli.tracebacks import highlighted
from apoq.cli.values import identifier
from apoq.core.places import KEY, POOL
from apoq.core.states import FAILED, RUNNING, WAITING
from apoq.monitor.formatting import ago, clean, local
from apoq.monitor.graphs import graph_of
from apoq.monitor.keys import read_holders, waits_for
from apoq.monitor.tracebacks import Frame, own_frame

_LINES: Final = 40
"""How many lines of data are shown."""

_TIMES: Final = {
    "added": "created_at",
    "tick": "tick_at",
    "due": "process_at",
    "expires": "expires_at",
    "claimed": "claimed_at",
    "completed": "completed_at",
    "last failure": "failed_at",
    "cancelled": "cancelled_at",
}


@click.command("show")
@click.argument("task_id", metavar="ID", type=identifier)
@click.option("--full", is_flag=True, help="Show all of the data and the result, however long they are.")
@click.option("--follow", "-f", is_flag=True, help="Show the progress until the task ends.")
@json_option
@click.pass_obj
def command(target: Target, *, task_id: int, full: bool, follow: bool, as_json: bool) -> None:
    """Show everything that is known about a task.

    Its data, its times and attempts, its progress and its result, the worker that ran it, and its last error:
    first the line of your own code that raised it, then the whole traceback. Times are in this machine's time
    zone. With --follow, a bar shows the progress until the task has completed, failed or been cancelled.

    \b
        apoq show 1652
        apoq show 1652 --follow
        apoq show 1652 --json | jq .data
    """  # noqa: D301 - click's sign
    row = (follow_task if follow else read)(target, task_id)
    held_by = graph = None
    with looking(target) as connection:
        if row["state"] == WAITING and row["waiting_for"] in {KEY, POOL}:
            held_by = read_holders(connection, target.schema, row)
        if not as_json:
            graph = graph_of(connection, target.schema, task_id)
    if as_json:
        show_json(task_json(row))
        return
    show(_facts(row, held_by))
    if graph:
        show(Text())
        show(drawn(row, graph))
    show(Text())
    show(_json(row["data"], None if full else _LINES))
    if row["result"] is not None:
        show(Text("\nresult", "bold"))
        show(_json(row["result"], None if full else _LINES))
    out = console()
    for text in _error(row):
        # Wrapped by the terminal itself, so that a long line can be copied whole.
        out.print(text, soft_wrap=True)


def _facts(row: sa.RowMapping, held_by: Sequence[sa.RowMapping] | None) -> Table:
    state = shown_state(row)
    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    made.add_row("task", f"{row['id']}")
    made.add_row("type", Text(clean(row["type"]), "bold"))
    note = " (pending: waits for its next attempt)" if state == RETRYING else ""
    made.add_row("state", Text(state, STYLES.get(state, "dim")) + Text(note, "dim"))
    made.add_row(
        "queue", Text(clean(row["queue"])) + (f", priority {row['priority']}" if row["priority"] else "")
    )
    if row["schedule"] is not None:
        made.add_row("schedule", Text(clean(row["schedule"])))
    for name, column in _TIMES.items():
        if row[column] is not None:
            heading = "next attempt" if column == "process_at" and state == RETRYING else name
            made.add_row(heading, f"{local(row[column])}  ({ago(row[column], row['now'])})")
    made.add_row("attempt", _attempts(row))
    for name in ("retry_delay", "timeout"):
        if (value := row[name]) is not None:
            text = f"{value.total_seconds():g} s" if isinstance(value, timedelta) else str(value)
            made.add_row(name.replace("_", " "), text)
    _add_keys(made, row, held_by)
    for heading, value in _of_graph(row):
        made.add_row(heading, value)
    if row["progress_done"] is not None:
        when = f"  ({ago(row['progress_at'], row['now'])})"
        made.add_row("progress", Text(progress_text(row)) + Text(when, "dim"))
    if row["meta"] is not None:
        made.add_row("meta", Text(clean(json.dumps(row["meta"], ensure_ascii=False))))
    if row["worker_id"] is not None:
        made.add_row("worker", Text(clean(_worker(row))))
    return made


def _add_keys(made: Table, row: sa.RowMapping, held_by: Sequence[sa.RowMapping] | None) -> None:
    if row["key"] is not None:
        made.add_row("key", Text(clean(row["key"])))
    if held_by is not None:
        made.add_row("waits for", Text(waits_for(row, held_by)))
    if row["unique_key"] is not None:
        made.add_row("unique key", Text(clean(row["unique_key"])) + Text(_held_until(row), "dim"))


def _of_graph(row: sa.RowMapping) -> Iterator[tuple[str, str]]:
    if row["waiting_since"] is not None:
        yield "waiting since", f"{local(row['waiting_since'])}  ({ago(row['waiting_since'], row['now'])})"
    if row["blockers"]:
        yield "waits for", "1 task" if row["blockers"] == 1 else f"{row['blockers']:,} tasks"
    if row["on_parent_failure"] is not None:
        yield "on failure", f"{clean(row['on_parent_failure'])}, if a task that it waits for fails"
    if row["group_id"] is not None:
        yield "group", str(row["group_id"])


def _held_until(row: sa.RowMapping) -> str:
    if row["held_unique_key"] is None:
        return ""
    return f" (held until it has {'ended' if row['unique_until_end'] else 'started'})"


def _attempts(row: sa.RowMapping) -> str:
    """Write how many attempts there were, of how many, and how they ended."""
    limit = _retry_limit(row)
    number = max(row["attempt"], row["fail_count"])
    of = " (the retry limit is that of the function)" if limit is None else f" of {limit + 1:,}"
    if row["state"] == RUNNING:
        parts = [f"{row['attempt']:,}{of}, running"]
    elif not number:
        parts = ["none yet" + ("" if limit is None else f", {limit + 1:,} at most")]
    else:
        parts = [f"{number:,}{of}"]
    if row["fail_count"]:
        parts.append(f"{row['fail_count']:,} failed")
    if count := row["rescue_count"]:
        parts.append(f"{count:,} ended because the worker died")
    return ", ".join(parts)


def _retry_limit(row: sa.RowMapping) -> int | None:
    """Return the task's own retry limit, or the one that its last failed attempt was subject to, if known."""
    if row["retry_limit"] is not None:
        return max(0, int(row["retry_limit"]))
    error = row["error"]
    try:
        return int(error["retry_limit"]) if isinstance(error, dict) else None
    except (KeyError, TypeError, ValueError):
        return None


def _worker(row: sa.RowMapping) -> str:
    if row["worker_host"] is None:
        return f"{row['worker_id']}, which has stopped"
    return f"{row['worker_host']}, process {row['worker_pid']}"


def _json(text: str, most: int | None) -> Text:
    try:
        lines = json.dumps(json.loads(text), indent=2, ensure_ascii=False).splitlines()
    except (ValueError, RecursionError):
        lines = [text]  # Python can't read it
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


def _error(row: sa.RowMapping) -> Iterator[Text]:
    """Write the last error: what it was, the user's own line, and the whole traceback."""
    error = row["error"]
    if not isinstance(error, dict):
        return
    is_current = shown_state(row) in {FAILED, RETRYING}
    heading = "error" if row["state"] == FAILED else "last error"
    when = f" ({ago(row['failed_at'], row['now'])})" if row["failed_at"] and row["state"] != FAILED else ""
    yield Text(f"\n{heading}{when}", "bold")
    said = f"{error.get('class', 'error')}: {error.get('message', '')}"
    yield Text(clean(said), STYLES[FAILED] if is_current else "")
    lines = [clean(line) for line in str(error.get("traceback") or "").rstrip().splitlines()]
    if frame := own_frame(lines):
        yield _own(frame)
    if lines:
        yield Text()
        yield highlighted(lines)


def _own(frame: Frame) -> Text:
    text = Text(f"  in {frame.function}, {frame.file}, line {frame.line}")
    if frame.code:
        text.append(f"\n    {frame.code}", "bold")
    return text
