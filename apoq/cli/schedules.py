"""``apoq schedules``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import click
import sqlalchemy as sa
from rich.table import Table
from rich.text import Text

from apoq.cli.exits import Failure, warn
from apoq.cli.looking import looking
from apoq.cli.output import json_option, show, show_json, show_json_lines, table, widest
from apoq.cli.target import Target
from apoq.client.schedules import pause, resume, run_now, unschedule
from apoq.client.session_adapters import Caller, through
from apoq.monitor.formatting import ago, clean, length
from apoq.schema.models import DEFAULT_QUEUE
from apoq.schema.statements.schedules import all_schedules, is_orphan

MOST: Final = 10_000

Action = Callable[[Caller, str | None, dict[str, Any]], Any]

ACTIONS: Final[Mapping[str, tuple[Action, str, str]]] = {
    "pause": (pause, "Paused the schedule {name!r}.", "The schedule {name!r} is paused already."),
    "resume": (resume, "Resumed the schedule {name!r}.", "The schedule {name!r} is not paused."),
    "run-now": (run_now, "Added task {result}.", ""),
    "remove": (unschedule, "Removed the schedule {name!r}; its tasks stay.", ""),
}
"""The operation of each action, and its messages if it has changed something, and if it hasn't."""


@click.command("schedules")
@click.argument("action", metavar="[ACTION]", required=False, type=click.Choice(list(ACTIONS)))
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--queue", metavar="NAME", help="Only schedules of this queue.")
@click.option(
    "--limit", type=click.IntRange(1, MOST), default=100, show_default=True, help="How many to list."
)
@json_option
@click.pass_obj
def command(
    target: Target,
    /,
    *,
    action: str | None,
    name: str | None,
    queue: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List the schedules, or pause, resume, run or remove one of them.

    Without an action, they are listed with their next and their last tick, and with the number of ticks that
    were skipped because the last task had not ended. An orphan is a schedule that the code of no live worker
    declares any more. It still adds tasks until it is removed.

    \b
        apoq schedules
        apoq schedules pause digest-7
        apoq schedules resume digest-7
        apoq schedules run-now digest-7     # a task in addition to those of its ticks
        apoq schedules remove digest-7 --queue emails

    A paused schedule stays paused when the code is deployed again. When it is resumed, its `catch_up` decides
    what becomes of the ticks that were missed.
    """  # noqa: D301 - click's sign
    if action is None:
        _list(target, queue, limit, as_json=as_json)
    elif name is None:
        raise click.UsageError(f"Which schedule? Give its name: schedules {action} NAME.")
    else:
        _change(target, action, name, queue, as_json=as_json)


def _list(target: Target, queue: str | None, limit: int, *, as_json: bool) -> None:
    rows = _find(target, {"from_queue": queue, "named": None, "at_most": limit})
    if as_json:
        show_json_lines(_plain(row) for row in rows)
        return
    if not rows:
        click.echo("No schedules.")
        return
    show(listed(rows))
    if len(rows) == limit:
        warn("There may be more: raise --limit, or choose a queue by --queue.")


def _change(target: Target, action: str, name: str, queue: str | None, *, as_json: bool) -> None:
    found = [row["queue"] for row in _find(target, {"from_queue": queue, "named": name, "at_most": MOST})]
    if not found:
        where = "" if queue is None else f" in the queue {queue!r}"
        raise Failure(f"there is no schedule {name!r}{where}: `apoq schedules` lists them")
    if len(found) > 1:
        raise Failure(f"the queues {', '.join(found)} have a schedule {name!r}: choose one by --queue")
    do, done, not_done = ACTIONS[action]
    parameters = {"schedule_queue": found[0], "schedule_name": name}
    with target.begin() as connection:
        result = through(connection, lambda caller: do(caller, target.schema, parameters))
    if as_json:
        show_json({"queue": found[0], "name": name, "changed": bool(result)})
    else:
        click.echo((done if result else not_done).format(name=name, result=result))


def _find(target: Target, parameters: dict[str, Any]) -> Sequence[sa.RowMapping]:
    with looking(target) as connection:
        return connection.execute(all_schedules(target.schema), parameters).mappings().all()


def listed(rows: Sequence[sa.RowMapping]) -> Table:
    """Return a table of schedules; with the queues if there are others than the default one."""
    shows_queue = any(row["queue"] != DEFAULT_QUEUE for row in rows)
    made = table(
        "name",
        *(["queue"] if shows_queue else []),
        "times",
        "next",
        "last",
        "skipped",
        "state",
        right={"skipped"},
        widest=widest(32),
    )
    for row in rows:
        queue = [Text(clean(row["queue"]))] if shows_queue else []
        state, style = _state(row)
        made.add_row(
            Text(clean(row["name"])),
            *queue,
            Text(clean(times(row))),
            Text(_next(row)),
            ago(row["last_tick_at"], row["now"]),
            f"{row['skipped_count']:,}",
            Text(state, style),
        )
    return made


def times(row: Mapping[Any, Any]) -> str:
    """Write when the ticks of a schedule are."""
    if row["every"] is not None:
        return f"every {length(row['every'].total_seconds())}"
    return f"{row['cron']} {row['timezone']}"


def _next(row: sa.RowMapping) -> str:
    if row["paused_at"] is not None:
        return ""
    late = (row["now"] - row["next_at"]).total_seconds()
    return f"due {length(late)} ago" if late >= 0 else f"in {length(-late)}"


def _state(row: sa.RowMapping) -> tuple[str, str]:
    if row["paused_at"] is not None:
        return f"paused {ago(row['paused_at'], row['now'])}", "yellow"
    if is_orphan(row):
        return "orphan", "yellow"
    return ("", "") if row["is_worked"] else ("no worker", "yellow")


def _plain(row: sa.RowMapping) -> dict[str, Any]:
    """Return what ``--json`` prints of a schedule."""
    hidden = {"now", "is_declared", "last_due_for"}
    return {
        **{name: value for name, value in row.items() if name not in hidden},
        "is_orphan": is_orphan(row),
    }
