"""``apoq stats``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any, Final, NamedTuple

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from apoq.cli.looking import looking
from apoq.cli.output import console, has_cursor, json_option, show_json, table, widest
from apoq.cli.target import Target
from apoq.cli.values import duration
from apoq.core.states import CANCELLED, COMPLETED, FAILED, PENDING, RUNNING, WAITING
from apoq.monitor.formatting import clean, length, number, size, tasks
from apoq.monitor.stats import MAX_QUEUES, Figures, QueueFigures, WorkerFigures, figures
from apoq.schema.statements.count import COUNTED

MAX_DATABASE_SHARE: Final = 0.05
"""The share of the time that --watch spends in the database at most."""

LATE_AFTER_SECONDS: Final = 10.0
"""Seconds: if a worker has a free slot, no task waits this long."""

MAX_WORKERS_SHOWN: Final = 20
MAX_DEAD_WORKERS_SHOWN: Final = 3
"""How many workers are in the table; of those that have died, the last ones."""

MAX_NAME_COLUMNS: Final = 12
"""How many columns of a terminal a name takes: with the numbers of a table, that makes 80."""


@click.command("stats")
@click.option("--types", "by_type", is_flag=True, help="Also show the numbers for each type of task.")
@click.option("--disk", "by_size", is_flag=True, help="Show the space on disk of each queue instead.")
@click.option("--watch", "-w", is_flag=True, help="Refresh the output until Ctrl-C.")
@click.option("--every", type=duration, default="2s", show_default=True, help="How often --watch refreshes.")
@json_option
@click.pass_obj
def command(target: Target, *, by_type: bool, by_size: bool, watch: bool, every: Any, as_json: bool) -> None:
    """Show the tasks of each queue by their state, and the workers.

    Pending tasks are "ready" (due now), "scheduled" (due later) or "retrying" (due later, after a failed
    attempt). "lag" is for how long the oldest ready task has been due: alert on it. On a narrow terminal,
    columns with no task in any queue are left out.

    \b
        apoq stats --watch
        apoq stats --types
        apoq stats --disk
        apoq stats --json | jq '.queues[] | {name, ready, lag}'

    Counts stop at 10,000 (shown as 10,000+) to keep the queries cheap. Pruned tasks are not counted. A worker
    has claimed the tasks that it runs, and short tasks ahead of that. The space of a queue is its share of
    the table by the last ANALYZE, and "per day" is what a day of completed tasks takes at the rate of the
    last hour, while none of them is deleted.
    """  # noqa: D301 - click's sign
    if watch and as_json:
        raise click.UsageError("--watch prints for people: run `apoq stats --json` repeatedly instead.")
    if watch and by_size:
        raise click.UsageError("--disk changes slowly: leave out --watch.")
    found = _figures(target, by_type=by_type)
    if as_json:
        show_json(found.as_json())
    elif watch:
        _watch(target, found, by_type=by_type, every=every.total_seconds())
    else:
        out = console()
        most = widest(MAX_NAME_COLUMNS)
        out.print(Group(_disk(found, most), "", _foot(found)) if by_size else shown(found, most, out.width))


def _figures(target: Target, *, by_type: bool) -> Figures:
    with looking(target) as connection:
        return figures(connection, target.schema, by_type=by_type)


def _watch(target: Target, found: Figures, *, by_type: bool, every: float) -> None:
    out = console()
    # If the cursor can't be moved, the outputs follow each other.
    screen = Live(console=out, screen=True, auto_refresh=False) if has_cursor(out) else None
    with screen or nullcontext(), suppress(KeyboardInterrupt):
        while True:
            if screen is not None:
                screen.update(shown(found, MAX_NAME_COLUMNS, out.width), refresh=True)
            else:
                out.print(shown(found, widest(MAX_NAME_COLUMNS), out.width), "")
            time.sleep(max(every, found.took * (1 / MAX_DATABASE_SHARE - 1)))
            found = _figures(target, by_type=by_type)


def shown(found: Figures, most: int | None = None, width: int = 80) -> RenderableType:
    """Return everything, for a terminal of this width, with names of `most` columns."""
    parts: list[RenderableType] = [*_queues(found, most, width)]
    if found.has_more_queues:
        parts.append(Text(f"… and more: these are the first {MAX_QUEUES} queues", "dim"))
    parts += [Text(f"{pause}", "yellow") for pause in found.pauses]
    parts += [Text("there are more pauses", "yellow")] if found.has_more_pauses else []
    if found.types:
        parts += ["", _types(found, most)]
    if found.workers:
        parts += ["", *_workers(found, most)]
    return Group(*parts, "", _foot(found))


class _Column(NamedTuple):
    """A column of the table of queues."""

    heading: str
    cell: Callable[[QueueFigures], Text]
    is_in_use: Callable[[QueueFigures], bool] = lambda _queue: True
    """Whether it has something to show; it may be left out if it hasn't for any queue."""


def _upcoming(queue: QueueFigures) -> int:
    return queue.scheduled + queue.retrying


def _ended(queue: QueueFigures) -> int:
    return queue.failed + queue.cancelled


_OPEN: Final = (
    _Column("ready", lambda queue: _count(queue.ready, "bold")),
    _Column("scheduled", lambda queue: _count(queue.scheduled, total=_upcoming(queue))),
    _Column(
        "retrying",
        lambda queue: _count(queue.retrying, "yellow", total=_upcoming(queue)),
        lambda queue: queue.retrying > 0 or _upcoming(queue) > COUNTED,
    ),
    _Column("waiting", lambda queue: _count(queue.waiting), lambda queue: queue.waiting > 0),
    _Column("running", lambda queue: _count(queue.running, "cyan")),
)
_ENDED: Final = (
    _Column("completed", lambda queue: _count(queue.completed, "green")),
    _Column("failed", lambda queue: _count(queue.failed, "red", total=_ended(queue))),
    _Column(
        "cancelled",
        lambda queue: _count(queue.cancelled, total=_ended(queue)),
        lambda queue: queue.cancelled > 0 or _ended(queue) > COUNTED,
    ),
)
_LAG: Final = _Column("lag", lambda queue: _lag(queue.lag))
_RATE: Final = _Column("per min", lambda queue: _count(round(queue.per_minute), bound=None))


def _queues(found: Figures, most: int | None, width: int) -> list[RenderableType]:
    """Return a table of the queues; if it is too wide, one for open and one for ended tasks."""
    columns = (*_OPEN, *_ENDED, _LAG, _RATE)
    whole = _queue_table(found, most, columns)
    if most is None or _width(whole) <= width:
        return [whole]
    used = [column for column in columns if any(map(column.is_in_use, found.queues))]
    shorter = _queue_table(found, most, used)
    if _width(shorter) <= width:
        return [shorter]
    return [_queue_table(found, most, (*_OPEN, _LAG)), "", _queue_table(found, most, (*_ENDED, _RATE))]


def _width(table: Table) -> int:
    unlimited = console()
    unlimited.width = 10_000
    return Measurement.get(unlimited, unlimited.options, table).maximum


def _queue_table(found: Figures, most: int | None, columns: Sequence[_Column]) -> Table:
    headings = [column.heading for column in columns]
    made = table("queue", *headings, right=headings, widest=most)
    for queue in found.queues:
        made.add_row(Text(clean(queue.name)), *(column.cell(queue) for column in columns))
    return made


def _disk(found: Figures, most: int | None) -> Table:
    made = table("queue", "size", "per day", right=("size", "per day"), widest=most and 2 * most)
    for queue in found.queues:
        sizes = (queue.bytes, queue.bytes_per_day)
        made.add_row(Text(clean(queue.name)), *("?" if each is None else size(each) for each in sizes))
    return made


def _types(found: Figures, most: int | None) -> Table:
    states = [PENDING, WAITING, RUNNING, COMPLETED, FAILED, CANCELLED]
    if most is not None:  # on a terminal
        rare = {WAITING, CANCELLED}
        states = [s for s in states if s not in rare or any(each.counts.get(s) for each in found.types)]
    made = table("type", *states, right=states, widest=most and 2 * most)
    names_queue = len(found.queues) > 1
    for each in found.types:
        counts = (each.counts.get(state, 0) for state in states)
        name = f"{each.queue}: {each.type}" if names_queue else each.type
        made.add_row(Text(clean(name)), *map(_count, counts))
    return made


def _workers(found: Figures, most: int | None) -> list[RenderableType]:
    """Return a table of the workers: those that are alive, and the last ones that have died."""
    alive = [worker for worker in found.workers if worker.is_alive]
    dead = [worker for worker in found.workers if not worker.is_alive]
    listed = [*alive[:MAX_WORKERS_SHOWN], *dead[:MAX_DEAD_WORKERS_SHOWN]]
    columns = ("worker", "queues", "slots", "claimed", "up", "heartbeat")
    made = table(*columns, right={"slots", "claimed", "up"}, widest=most)
    made.columns[0].max_width = most and 2 * most
    made.columns[-1].max_width = None
    for worker in listed:
        made.add_row(*_worker(worker))
    more = [
        f"{count:,} more {what}"
        for count, what in (
            (len(alive) - MAX_WORKERS_SHOWN, "are alive"),
            (len(dead) - MAX_DEAD_WORKERS_SHOWN, "have died in the last hour"),
        )
        if count > 0
    ]
    return [made, *([Text(f"… and {', '.join(more)}", "dim")] if more else [])]


def _worker(worker: WorkerFigures) -> tuple[str | Text, ...]:
    seen = f"{length(worker.unseen_for)} ago"
    return (
        Text(clean(f"{worker.host} {worker.pid}")),
        Text(clean(", ".join(map(str, worker.queues)))),
        f"{worker.concurrency:,}",
        f"{worker.running:,}",
        length(worker.up_for),
        Text(seen, "green") if worker.is_alive else Text(f"{seen}: dead", "red"),
    )


def _foot(found: Figures) -> Text:
    """Return a line with the numbers that are in no table."""
    alive = sum(worker.is_alive for worker in found.workers)
    workers = "1 worker is" if alive == 1 else f"{alive or 'no'} workers are"
    parts = [(f"{workers} alive", "dim" if alive else "yellow")]
    if found.orphans:
        parts.append((f"{tasks(found.orphans, COUNTED)} running without a live worker", "red"))
    if found.unnoted:
        parts.append((f"{tasks(found.unnoted, COUNTED)} running that no claim has recorded", "red"))
    rows = "" if found.rows < 0 else f"about {tasks(found.rows)} in "
    parts.append((f"the table has {rows}{size(found.bytes)}", "dim"))
    return Text("; ").join(Text(*part) for part in parts)


def _count(count: int, style: str = "", *, bound: int | None = COUNTED, total: int | None = None) -> Text:
    if not count and (total is None or total <= COUNTED):
        return Text("·", "dim")
    return Text(f"{count:,}" if bound is None else number(count, bound, total=total), style)


def _lag(seconds: float | None) -> Text:
    """Write how late the oldest ready task is, in color if a worker with a free slot would have run it."""
    if seconds is None:
        return Text("·", "dim")
    return Text(length(seconds), "yellow" if seconds > LATE_AFTER_SECONDS else "")
