"""Choose tasks by their IDs or by filters, and change each of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import chain, islice
from typing import Any, Final, NamedTuple

import click
import sqlalchemy as sa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from apoq.cli.exits import Failure, warn
from apoq.cli.looking import looking, missing
from apoq.cli.output import confirm, has_cursor
from apoq.cli.target import Target
from apoq.cli.values import past_time
from apoq.core.states import CANCELLED, COMPLETED, FAILED, FINAL, PENDING, RUNNING, WAITING
from apoq.monitor.formatting import local, tasks
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.find import details, find_ids, find_queues

MOST: Final = 100_000
"""How many tasks one command changes at most."""

BATCH: Final = 100
"""How many tasks one transaction changes at most, so that it holds no lock for long."""


REASONS: Final = 10
"""For how many tasks an error says why they were not changed."""


Action = Callable[[sa.Connection, str, list[int]], Iterable[int]]


class Words(NamedTuple):
    """The words for a change."""

    verb: str
    done: str
    can: str
    """Which tasks can be changed."""
    states: Sequence[str]
    """The states of these."""


def filters(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--type``, ``--queue``, ``--error`` and ``--since`` to a command."""
    for option in (
        click.option(
            "--since",
            type=past_time,
            metavar="TIME",
            help="Only tasks that ended since then: 2h, '30 min', yesterday, 2031-05-04, 2031-05-04T12:00Z. "
            "Running tasks must have started since then, and pending ones must have been added since then.",
        ),
        click.option(
            "--error",
            "error_class",
            metavar="CLASS",
            help="Only tasks whose last error is of this class, such as ValueError.",
        ),
        click.option("--queue", metavar="NAME", help="Only tasks of this queue."),
        click.option("--type", "task_type", metavar="TYPE", help="Only tasks of this type."),
    ):
        function = option(function)
    return function


retrying_option = click.option(
    "--retrying", is_flag=True, help="Only tasks that have failed and are waiting for their next attempt."
)


def select(
    target: Target, ids: Sequence[int], states: Sequence[str], options: Mapping[str, Any]
) -> dict[int, str]:
    """Return the IDs and queues of the tasks with these `ids`, or of those that the `options` select.

    The `options` select tasks in one of the `states`. IDs that don't exist are left out.
    """
    is_filtered = any(value is not None and value is not False for value in options.values())
    if ids and is_filtered:
        raise click.UsageError("Give either IDs or options that select tasks, not both.")
    if not ids and not is_filtered:
        names = ", ".join(f"--{_NAMES.get(name, name)}" for name in options)
        raise click.UsageError(f"Which tasks? Give their IDs, or select them by one of {names}.")
    with looking(target) as connection:
        if ids:
            rows = connection.execute(find_queues(target.schema), {"ids": array_text(ids)}).all()
        else:
            parameters = {**parameters_of(options), "at_most": MOST}
            found = (connection.execute(find_ids(target.schema, state), parameters) for state in states)
            rows = list(chain.from_iterable(found))[:MOST]
    return dict(sorted((task_id, queue) for task_id, queue in rows))


_NAMES: Final = {"task_type": "type", "error_class": "error"}


def parameters_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the statements of `apoq.schema.statements.find` take for these options."""
    return {
        "of_type": options["task_type"],
        "in_queue": options["queue"],
        "since": options["since"],
        "error_class": options["error_class"],
        "is_retrying": options.get("retrying", False),
    }


_HAPPENED: Final = {
    PENDING: "were added",
    WAITING: "were added",
    RUNNING: "started",
    COMPLETED: "completed",
    FAILED: "failed",
    CANCELLED: "were cancelled",
}


def since_when(since: datetime | None, states: Sequence[str]) -> str:
    """Say what ``--since`` means for tasks in these states; nothing if it isn't given."""
    if since is None:
        return ""
    what = list(dict.fromkeys(_HAPPENED[state] for state in states))
    happened = what[0] if len(what) == 1 else f"{', '.join(what[:-1])} or {what[-1]}"
    return f" that {happened} since {local(since)}"


def act(
    target: Target,
    chosen: Mapping[int, str],
    action: Action,
    words: Words,
    *,
    ids: Collection[int],
    yes: bool,
    which: str = "",
    finally_: Callable[[int], str] = lambda _count: "",
) -> None:
    """Change the tasks after a confirmation; fail if a task that was given by its ID can't be changed.

    `action` is called with up to `BATCH` tasks of one queue, and returns the ids of those that it changed.
    `which` describes the tasks. `finally_` returns the end of the last sentence, by the number of changes.
    """
    if len(chosen) > 1:
        confirm(f"{words.verb.capitalize()} {tasks(len(chosen))}{which}?", yes=yes)
    changed: set[int] = set()
    remaining = iter(chosen.items())
    with progress(words.verb, len(chosen)) as advance:
        while batch := list(islice(remaining, BATCH)):
            with target.begin() as connection:
                for name in dict.fromkeys(queue for _, queue in batch):
                    its = [task_id for task_id, queue in batch if queue == name]
                    changed.update(action(connection, name, its))
            advance(len(batch))
    unchanged = [task_id for task_id in dict.fromkeys(ids) if task_id not in changed]
    if changed or not unchanged:
        more = finally_(len(changed)) if changed else ""
        click.echo(f"{words.done} {tasks(len(changed))}{which}{more}.")
    if len(chosen) == MOST:
        warn(f"That is the most that one call changes ({MOST:,}). There may be more: run the command again.")
    if unchanged:
        raise _why(target, unchanged, words)


def _why(target: Target, ids: Collection[int], words: Words) -> Failure:
    """Say why these tasks were not changed."""
    reasons: list[str] = []
    with looking(target) as connection:
        for task_id in islice(ids, REASONS):
            row = connection.execute(details(target.schema), {"task_id": task_id}).mappings().one_or_none()
            reasons.append(missing(task_id) if row is None else f"task {task_id} {_is(row, words)}")
    if len(ids) > REASONS:
        reasons.append(f"and so on: {len(ids):,} tasks were not changed")
    return Failure("\n".join(reasons))


def _is(row: sa.RowMapping, words: Words) -> str:
    """Say why a task was not changed."""
    if row["state"] not in words.states:
        return f"is {row['state']}: {words.can}"
    if row["state"] not in FINAL:
        return "is locked by another session: run the command again"
    if row["expires_at"] is not None and row["expires_at"] <= row["now"]:
        return "has expired: add it again, with another time"
    if row["unique_key"] is not None:
        return f"has the unique key {row['unique_key']!r}, which another task holds"
    return "is locked by another session: run the command again"


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show the progress of something long on stderr, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not has_cursor(console) or (total is not None and total <= BATCH):
        yield lambda _count: None
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
