"""``apoq list``."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Final

import click
import sqlalchemy as sa
from rich.table import Table
from rich.text import Text

from apoq.cli.exits import warn
from apoq.cli.looking import looking, task_json
from apoq.cli.output import json_option, show, show_json_lines, table, widest
from apoq.cli.selection import (
    filters,
    parameters_of,
    retrying_option,
    since_when,
)
from apoq.cli.target import Target
from apoq.cli.values import FIRST_ID, LAST_ID, identifier
from apoq.core.states import COMPLETED, FAILED, PENDING, RUNNING, STATES, WAITING
from apoq.monitor.formatting import ago, clean, length
from apoq.monitor.pauses import read_pauses
from apoq.schema.models import DEFAULT_QUEUE
from apoq.schema.statements.find import LOOKED_AT, find, horizon

RETRYING: Final = "retrying"

_PLACES: Final = {"key": "key full", "pool": "type full", "parents": "parents"}
"""Why a task waits."""
"""Shown instead of `pending` if an attempt has failed and the next one has not started."""

STYLES: Final = {PENDING: "", RETRYING: "yellow", RUNNING: "cyan", COMPLETED: "green", FAILED: "red"}
"""The color of a state."""

MOST: Final = 10_000
_EXCERPT: Final = 200
_WHOLE: Final = 2**31 - 1


@click.command("list")
@click.option("--state", type=click.Choice(STATES), help="Only tasks in this state.")
@retrying_option
@filters
@click.option(
    "--limit", type=click.IntRange(1, MOST), default=20, show_default=True, help="How many tasks to list."
)
@click.option(
    "--before", "before_id", type=identifier, metavar="ID", help="Only tasks with a lower ID: the next page."
)
@json_option
@click.pass_obj
def command(
    target: Target,
    /,
    *,
    state: str | None,
    limit: int,
    before_id: int | None,
    as_json: bool,
    **wanted: Any,
) -> None:
    """List tasks, the newest first.

    A task that is "retrying" is pending: an attempt has failed, and it waits for the next one. Failed and
    retrying tasks are shown with their error, all others with their data.

    \b
        apoq list --state failed --since 2h
        apoq list --retrying --error ConnectionError

    With --json, one line of JSON is printed for each task, with all of its data. Types, errors and times are
    not indexed: a search for them examines up to 100,000 tasks, and then prints how to continue.
    """  # noqa: D301 - click's sign
    if wanted["retrying"]:
        if state not in {None, PENDING}:
            raise click.UsageError(f"--retrying selects pending tasks: leave out --state {state}.")
        state = PENDING
    parameters = {
        **parameters_of(wanted),
        "up_to_id": LAST_ID if before_id is None else max(before_id - 1, FIRST_ID),
        "at_most": limit,
        "excerpt": _WHOLE if as_json else _EXCERPT,
    }
    with looking(target) as connection:
        rows = connection.execute(find(target.schema, state), parameters).mappings().all()
        paused = {(pause.queue, pause.type) for pause in read_pauses(connection, target.schema)}
        looked_at, lowest_id = (0, None)
        if len(rows) < limit:
            looked_at, lowest_id = connection.execute(horizon(target.schema, state), parameters).one()
    if as_json:
        show_json_lines(map(task_json, rows))
    else:
        if rows:
            show(listed(rows, paused))
        else:
            click.echo("No tasks.")
        if since := since_when(wanted["since"], STATES if state is None else (state,)):
            warn(f"Only tasks{since}.")
    if len(rows) == limit and not as_json:
        warn(f"There may be more: add --before {rows[-1]['id']} for the next page.")
    elif looked_at == LOOKED_AT:
        warn(f"Examined {LOOKED_AT:,} tasks: add --before {lowest_id} to continue.")


def listed(rows: Any, paused: Container[tuple[str, str | None]] = ()) -> Table:
    """Return a table of tasks; with the queues if there are others than the default one.

    `paused` has the paused queues (with None) and types. The unique keys are shown if tasks hold some.
    """
    shows_queue = any(row["queue"] != DEFAULT_QUEUE for row in rows)
    shows_key = any(row["held_unique_key"] for row in rows)
    headings = ["id", "type", "queue"] if shows_queue else ["id", "type"]
    headings += ["unique key"] if shows_key else []
    made = table(*headings, "state", "when", right={"id"}, widest=widest(24))
    # On a terminal, the last column gets the rest of the line; a program gets everything.
    made.expand = widest(1) is not None
    heading = "data or error" if any(map(_error, rows)) else "data"
    made.add_column(heading, no_wrap=True, ratio=1 if made.expand else None, overflow="ellipsis")
    for row in rows:
        queue = [Text(clean(row["queue"]))] if shows_queue else []
        state = shown_state(row)
        made.add_row(
            str(row["id"]),
            Text(clean(row["type"])),
            *queue,
            *([Text(clean(row["held_unique_key"] or ""))] if shows_key else []),
            Text(state, STYLES.get(state, "dim")),
            "paused" if _is_paused(row, paused) else when(row),
            _about(row),
        )
    return made


def _is_paused(row: sa.RowMapping, paused: Container[tuple[str, str | None]]) -> bool:
    is_pending = row["state"] == PENDING
    return is_pending and ((row["queue"], None) in paused or (row["queue"], row["type"]) in paused)


def shown_state(row: sa.RowMapping) -> str:
    """Return a task's state as people see it."""
    if row["state"] == WAITING and row["waiting_for"]:
        return f"waiting ({_PLACES.get(row['waiting_for'], clean(row['waiting_for']))})"
    return RETRYING if row["state"] == PENDING and row["fail_count"] > 0 else str(row["state"])


def when(row: sa.RowMapping) -> str:
    """Write the time that matters in the task's state: when it is due, since when it runs, when it ended."""
    now = row["now"]
    match row["state"]:
        case "pending":
            late = (now - row["process_at"]).total_seconds()
            return f"due {length(late)} ago" if late >= 0 else f"in {length(-late)}"
        case "waiting":
            since = row["waiting_since"]
            return "" if since is None else f"for {length((now - since).total_seconds())}"
        case "running":
            return f"for {length((now - row['claimed_at']).total_seconds())}" if row["claimed_at"] else ""
        case "completed":
            return ago(row["completed_at"], now)
    return ago(row["cancelled_at"] or row["failed_at"] or row["process_at"], now)


def _error(row: sa.RowMapping) -> dict[str, Any] | None:
    """Return the error of a task that has failed, for good or until its next attempt."""
    error = row["error"]
    return error if shown_state(row) in {FAILED, RETRYING} and isinstance(error, dict) else None


def _about(row: sa.RowMapping) -> Text:
    """Write why a task has failed, or otherwise its data."""
    if error := _error(row):
        style = STYLES[shown_state(row)]
        return Text(clean(f"{error.get('class', '')}: {error.get('message', '')}"), style)
    return Text("" if row["data"] == "{}" else clean(row["data"]), "dim")
