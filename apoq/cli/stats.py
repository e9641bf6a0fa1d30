"""``apoq stats``."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from typing import Any, Final

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from apoq.cli.looking import looking
from apoq.cli.output import console, has_cursor, json_option, show, show_json, table, widest
from apoq.cli.target import Target
from apoq.cli.values import duration
from apoq.core.states import COMPLETED, FAILED, PENDING, RUNNING
from apoq.monitor.formatting import clean, length, number, size, tasks
from apoq.monitor.stats import MAX_QUEUES, Figures, figures
from apoq.schema.statements.count import COUNTED

MAX_DATABASE_SHARE: Final = 0.05
"""The share of its time that --watch spends in the database at most."""

LATE_AFTER_SECONDS: Final = 10.0
"""Seconds: no task of a worker that has a free slot is late by that much."""

MAX_WORKERS_SHOWN: Final = 20
"""Workers in the table."""

MAX_NAME_COLUMNS: Final = 12
"""Columns that a name has: with all the numbers beside it, that makes 80."""


@click.command("stats")
@click.option("--types", "by_type", is_flag=True, help="Break them down by type.")
@click.option("--watch", "-w", is_flag=True, help="Show them again and again, until Ctrl-C.")
@click.option("--every", type=duration, default="2s", show_default=True, help="How often --watch does.")
@json_option
@click.pass_obj
def command(target: Target, *, by_type: bool, watch: bool, every: Any, as_json: bool) -> None:
    """Show queues and workers: how much waits, runs and has ended.

    Counts are exact up to 10,000, and end there (10,000+), for counting must not become the database's work.
    What is done or failed was not pruned yet. Lag is for how long the first of the due tasks has been due. A
    worker has claimed what runs in its slots, and short tasks ahead of that.
    """
    if watch and as_json:
        raise click.UsageError("--watch is for people: call `apoq stats --json` as often as you like.")
    found = _figures(target, by_type=by_type)
    if as_json:
        show_json(found.as_json())
    elif watch:
        _watch(target, found, by_type=by_type, every=every.total_seconds())
    else:
        show(shown(found, widest(MAX_NAME_COLUMNS)))


def _figures(target: Target, *, by_type: bool) -> Figures:
    with looking(target) as connection:
        return figures(connection, target.schema, by_type=by_type)


def _watch(target: Target, found: Figures, *, by_type: bool, every: float) -> None:
    out = console()
    # Where the cursor can't be moved, one below the other.
    screen = Live(console=out, screen=True, auto_refresh=False) if has_cursor(out) else None
    with screen or nullcontext(), suppress(KeyboardInterrupt):
        while True:
            if screen is not None:
                screen.update(shown(found, MAX_NAME_COLUMNS), refresh=True)
            else:
                out.print(shown(found, widest(MAX_NAME_COLUMNS)), "")
            time.sleep(max(every, found.took * (1 / MAX_DATABASE_SHARE - 1)))
            found = _figures(target, by_type=by_type)


def shown(found: Figures, most: int | None = None) -> RenderableType:
    """Make a screen of the figures."""
    parts: list[RenderableType] = [_queues(found, most)]
    if found.has_more_queues:
        parts.append(Text(f"… and more: these are the first {MAX_QUEUES} queues", "dim"))
    if found.types:
        parts += ["", _types(found, most)]
    if found.workers:
        parts += ["", _workers(found, most)]
    return Group(*parts, "", _foot(found))


def _queues(found: Figures, most: int | None) -> Table:
    # Most applications have no task that waits.
    waiting = ["waiting"] if any(queue.waiting for queue in found.queues) else []
    columns = ("queue", "ready", "lag", "scheduled", *waiting, "running", "per min", "done", "failed")
    made = table(*columns, right=columns[1:], widest=most)
    for queue in found.queues:
        made.add_row(
            Text(clean(queue.name)),
            _count(queue.ready, "bold"),
            _lag(queue.lag),
            _count(queue.scheduled),
            *(_count(queue.waiting) for _ in waiting),
            _count(queue.running, "cyan"),
            _count(round(queue.per_minute), bound=None),
            _count(queue.completed, "green"),
            _count(queue.failed, "red"),
        )
    return made


def _types(found: Figures, most: int | None) -> Table:
    columns = ("type", "pending", "running", "done", "failed")
    made = table(*columns, right=columns[1:], widest=most and 2 * most)
    names_queue = len(found.queues) > 1
    for each in found.types:
        counts = (each.counts.get(state, 0) for state in (PENDING, RUNNING, COMPLETED, FAILED))
        name = f"{each.queue}: {each.type}" if names_queue else each.type
        made.add_row(Text(clean(name)), *map(_count, counts))
    return made


def _workers(found: Figures, most: int | None) -> Table:
    columns = ("worker", "queues", "slots", "claimed", "up", "seen")
    made = table(*columns, right={"slots", "claimed", "up"}, widest=most)
    for worker in found.workers[:MAX_WORKERS_SHOWN]:
        seen = f"{length(worker.unseen_for)} ago"
        made.add_row(
            Text(clean(f"{worker.host} {worker.pid}")),
            Text(clean(", ".join(map(str, worker.queues)))),
            f"{worker.concurrency:,}",
            f"{worker.running:,}",
            length(worker.up_for),
            Text(seen, "green") if worker.is_alive else Text(f"{seen}: dead?", "red"),
        )
    return made


def _foot(found: Figures) -> Text:
    """Say in a line what no table says."""
    alive = sum(worker.is_alive for worker in found.workers)
    workers = "1 worker is" if alive == 1 else f"{alive or 'no'} workers are"
    parts = [(f"{workers} alive", "dim" if alive else "yellow")]
    if found.orphans:
        parts.append((f"{tasks(found.orphans, COUNTED)} running without a live one", "red"))
    if found.unnoted:
        parts.append((f"{tasks(found.unnoted, COUNTED)} running that no claim has noted", "red"))
    rows = "" if found.rows < 0 else f"about {tasks(found.rows)} in "
    parts.append((f"the table has {rows}{size(found.bytes)}", "dim"))
    return Text("; ").join(Text(*part) for part in parts)


def _count(count: int, style: str = "", bound: int | None = COUNTED) -> Text:
    if not count:
        return Text("·", "dim")
    return Text(f"{count:,}" if bound is None else number(count, bound), style)


def _lag(seconds: float | None) -> Text:
    """Show how late the first task is; in colour where it is longer than a worker looks away."""
    if seconds is None:
        return Text("·", "dim")
    return Text(length(seconds), "yellow" if seconds > LATE_AFTER_SECONDS else "")
