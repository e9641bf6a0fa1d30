"""Follows the progress of a task until it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import click
import sqlalchemy as sa
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from apoq.cli.exits import Failure
from apoq.cli.list import shown_state
from apoq.cli.looking import looking, missing
from apoq.cli.output import has_cursor
from apoq.cli.target import Target
from apoq.core.states import FINAL
from apoq.monitor.formatting import clean
from apoq.schema.statements.find import details

LOOK_SECONDS: Final = 1.0
"""Seconds between two looks: workers write progress that often."""

Draw = Callable[[sa.RowMapping], None]


def read(target: Target, task_id: int) -> sa.RowMapping:
    """Return everything that is known about a task; fail if there is no such task."""
    with looking(target) as connection:
        row = connection.execute(details(target.schema), {"task_id": task_id}).mappings().one_or_none()
    if row is None:
        raise Failure(missing(task_id))
    return row


def follow(target: Target, task_id: int) -> sa.RowMapping:
    """Draw a task's progress on stderr until it has ended; return everything that is known about it then."""
    row = read(target, task_id)
    with _drawing() as draw:
        while True:
            draw(row)
            if row["state"] in FINAL:
                return row
            time.sleep(LOOK_SECONDS)
            row = read(target, task_id)


@contextmanager
def _drawing() -> Iterator[Draw]:
    """Yield a function that draws a bar on a terminal, and elsewhere prints a line for each change."""
    console = Console(stderr=True)
    if not has_cursor(console):
        yield _Lines().draw
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        drawn = bar.add_task("", total=None, amount="")

        def draw(row: sa.RowMapping) -> None:
            total = row["progress_total"]
            amounts = {"completed": row["progress_done"] or 0.0, "total": total}
            # No markup from the application's text.
            bar.update(drawn, description=shown_state(row), amount=escape(progress_text(row)), **amounts)

        yield draw


class _Lines:
    """Prints a line whenever the state or the progress has changed."""

    def __init__(self) -> None:
        self._last = ""

    def draw(self, row: sa.RowMapping) -> None:
        line = " ".join(filter(None, [shown_state(row), progress_text(row)]))
        if line != self._last:
            click.echo(line, err=True)
        self._last = line


def progress_text(row: sa.RowMapping) -> str:
    """Write a task's progress, such as "120 of 300 (40 %), the second file"; nothing if there is none."""
    done, total = row["progress_done"], row["progress_total"]
    if done is None:
        return ""
    text = _number(done)
    if total is not None:
        share = f" ({min(1.0, done / total):.0%})".replace("%", " %") if total else ""
        text += f" of {_number(total)}{share}"
    return ", ".join(filter(None, [text, clean(row["progress_note"])]))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.2f}"
