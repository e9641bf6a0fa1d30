"""Which tasks a command is about, and doing something with each of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from apoq.client.queue import Queue
from apoq.monitor.formatting import tasks
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.find import details, find_ids, find_queues

MOST: Final = 100_000
"""Tasks that one command changes at most."""

BATCH: Final = 100
"""Tasks that one transaction changes at most: it is to hold no lock for long."""

FIRST_ID, LAST_ID = -(2**63), 2**63 - 1
TASK_ID: Final = click.IntRange(FIRST_ID, LAST_ID)
"""A task's id, on the command line."""

REASONS: Final = 10
"""Tasks of which it is said why they were left alone."""


class Words(NamedTuple):
    """How people speak of what is done to tasks."""

    verb: str
    done: str
    can: str
    """To which tasks it can be done."""


def filters(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take ``--type``, ``--queue`` and ``--since``, as `task_type`, `queue` and `since`."""
    for option in (
        click.option("--since", type=past_time, metavar="TIME", help="Added since then: 1h, or a time."),
        click.option("--queue", metavar="NAME", help="Of this queue."),
        click.option("--type", "task_type", metavar="TYPE", help="Of this type."),
    ):
        function = option(function)
    return function


def select(
    target: Target, ids: Sequence[int], states: Sequence[str], options: Mapping[str, Any]
) -> dict[int, str]:
    """Answer ids and queues: of these tasks, or of those in one of these states that the options let through.

    A task that doesn't exist isn't among them.
    """
    is_filtered = any(value is not None for value in options.values())
    if ids and is_filtered:
        raise click.UsageError("give IDs, or options that choose tasks, not both.")
    if not ids and not is_filtered:
        raise click.UsageError("which tasks? Give IDs, or choose by --state, --type, --queue or --since.")
    with looking(target) as connection:
        if ids:
            rows = connection.execute(find_queues(target.schema), {"ids": array_text(ids)}).all()
        else:
            parameters = {
                "of_type": options["task_type"],
                "in_queue": options["queue"],
                "since": options["since"],
                "at_most": MOST,
            }
            found = (connection.execute(find_ids(target.schema, state), parameters) for state in states)
            rows = list(chain.from_iterable(found))[:MOST]
    return dict(sorted((task_id, queue) for task_id, queue in rows))


def act(
    target: Target,
    chosen: Mapping[int, str],
    action: Callable[[Queue, sa.Connection, int], bool],
    words: Words,
    *,
    ids: Collection[int],
    yes: bool,
) -> None:
    """Do something with each task, once somebody has agreed; fails where it can't with one that was named."""
    if len(chosen) > 1:
        confirm(f"{words.verb.capitalize()} {tasks(len(chosen))}?", yes=yes)
    changed: set[int] = set()
    remaining = iter(chosen.items())
    with progress(words.verb, len(chosen)) as advance:
        while batch := list(islice(remaining, BATCH)):
            with target.begin() as connection:
                for task_id, name in batch:
                    if action(_StoredQueue(name, target.schema), connection, task_id):
                        changed.add(task_id)
            advance(len(batch))
    unchanged = [task_id for task_id in dict.fromkeys(ids) if task_id not in changed]
    if changed or not unchanged:
        click.echo(f"{words.done} {tasks(len(changed))}.")
    if len(chosen) == MOST:
        warn("There may be more: call this again.")
    if unchanged:
        raise _why(target, unchanged, words)


class _StoredQueue(Queue):
    """A queue by the name that a task's row has, even if no queue may be given it."""

    def __init__(self, name: str, schema: str | None) -> None:
        self.name, self.schema = name, schema


def _why(target: Target, ids: Collection[int], words: Words) -> Failure:
    """Say why these tasks were left as they are."""
    reasons: list[str] = []
    with looking(target) as connection:
        for task_id in islice(ids, REASONS):
            row = connection.execute(details(target.schema), {"task_id": task_id}).mappings().one_or_none()
            reasons.append(
                missing(task_id) if row is None else f"task {task_id} is {row['state']}, and {words.can}"
            )
    if len(ids) > REASONS:
        reasons.append(f"and so on: {len(ids):,} were left alone")
    return Failure("\n".join(reasons))


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show how far something long has come, on a terminal's stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not has_cursor(console) or (total is not None and total <= BATCH):
        yield lambda _count: None
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
