"""The output of commands: tables for people, JSON for programs, and questions before changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any, Final

import click
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from apoq.cli.streams import NARROWEST, is_narrow, is_terminal

_UNLIMITED: Final = 10_000
"""Columns if the output is not a terminal, because programs and files get whole values."""


def console() -> Console:
    """Return a console on the current stdout."""
    width = None if is_terminal(sys.stdout) else _UNLIMITED
    # No markup, and no emoji by name, because the output contains texts of users.
    made = Console(highlight=False, markup=False, emoji=False, soft_wrap=width is not None, width=width)
    made.width = max(made.width, NARROWEST)
    return made


def has_cursor(console: Console) -> bool:
    """Return whether the console is a terminal on which output can be replaced."""
    return console.is_terminal and not console.is_dumb_terminal


def table(*columns: str, right: Iterable[str] = (), widest: int | None = None) -> Table:
    """Return a table with these headings; those in `right` are for numbers.

    `widest` is how many columns of a terminal a text may take; longer texts are cut.
    """
    made = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    numbers = set(right)
    for column in columns:
        if column in numbers:
            made.add_column(column, justify="right", no_wrap=True)
        else:
            made.add_column(column, overflow="ellipsis", no_wrap=True, max_width=widest)
    return made


def widest(columns: int) -> int | None:
    """Return this number if the output is a terminal, and otherwise None: no limit."""
    return columns if is_terminal(sys.stdout) else None


def show(shown: RenderableType) -> None:
    """Print a table, or anything else that rich can print."""
    console().print(shown)


def json_text(
    value: Any,
    *,
    is_ascii: bool = True,
    indent: int | None = None,
    default: Callable[[Any], Any] | None = None,
) -> str:
    """Return JSON; with `is_ascii`, without characters that a terminal could obey."""
    options: dict[str, Any] = {
        "default": default or _plain,
        "ensure_ascii": is_ascii,
        "indent": indent,
        "allow_nan": False,
    }
    try:
        return json.dumps(value, **options)
    except ValueError:
        return json.dumps(_finite(value), **options)


def show_json(value: Any) -> None:
    """Print one JSON document; times in ISO 8601, durations in seconds."""
    click.echo(json_text(value, is_ascii=_wants_ascii(), indent=2))


def show_json_lines(values: Iterable[Any]) -> None:
    """Print a line of JSON for each value."""
    for value in values:
        click.echo(json_text(value, is_ascii=_wants_ascii()))


def _wants_ascii() -> bool:
    return is_terminal(sys.stdout) or is_narrow(sys.stdout)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take ``--json``, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


def yes_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take ``--yes``, as `yes`."""
    return click.option("--yes", "-y", is_flag=True, help="Don't ask for a confirmation.")(function)


def confirm(question: str, *, yes: bool) -> None:
    """End the command unless the user agrees; without a terminal, only ``--yes`` agrees."""
    if yes:
        return
    if not is_terminal(sys.stdin):
        raise click.UsageError(f"{question} The input is not a terminal: pass --yes to confirm.")
    click.confirm(question, abort=True, err=True)


def _finite(value: Any) -> Any:
    """Replace numbers that JSON doesn't have, such as infinity, by texts."""
    match value:
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case float() if not isfinite(value):
            return str(value)
    return value


def _plain(value: Any) -> Any:
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "total_seconds"):
        return value.total_seconds()
    return str(value)
