"""``apoq groups``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import click
import sqlalchemy as sa
from rich.text import Text

from apoq.cli.list import STYLES
from apoq.cli.looking import looking
from apoq.cli.output import json_option, show, show_json_lines, table, widest
from apoq.cli.target import Target
from apoq.core.states import STATES
from apoq.monitor.formatting import ago, clean
from apoq.schema.statements.graph import groups

MOST: Final = 1_000


@click.command("groups")
@click.option(
    "--limit", type=click.IntRange(1, MOST), default=20, show_default=True, help="How many to list."
)
@json_option
@click.pass_obj
def command(target: Target, *, limit: int, as_json: bool) -> None:
    """List groups of tasks, with the states of their tasks, the newest first.

    The ID is that of the first task that runs after the group, and the last column has its state.

    \b
        apoq groups
        apoq groups --limit 100 --json
    """  # noqa: D301 - click's sign
    with looking(target) as connection:
        rows = connection.execute(groups(target.schema), {"at_most": limit}).mappings().all()
    if as_json:
        show_json_lines(_json(row) for row in rows)
        return
    if not rows:
        show(Text("There are no groups.", "dim"))
        return
    made = table("id", "name", "queue", "added", "tasks", "then", widest=widest(40))
    for row in rows:
        made.add_row(
            str(row["id"]),
            clean(row["name"] or "-"),
            clean(row["queue"] or "-"),
            "-" if row["created_at"] is None else ago(row["created_at"], row["now"]),
            _counts(counts_of(row)),
            Text(row["state"] or "deleted", STYLES.get(row["state"] or "", "dim")),
        )
    show(made)


def counts_of(row: sa.RowMapping) -> dict[str, int]:
    """Return how many tasks of a group are in each state, if there are any."""
    return {state: number for state in STATES if (number := row[f"{state}_count"])}


def _counts(counts: Mapping[str, int]) -> Text:
    parts = [Text(f"{number:,} {state}", STYLES.get(state, "")) for state, number in counts.items()]
    return Text(", ").join(parts) if parts else Text("none", "dim")


def _json(row: sa.RowMapping) -> dict[str, Any]:
    return {
        "id": row["id"],
        "name": row["name"],
        "queue": row["queue"],
        "created_at": row["created_at"],
        "state": row["state"],
        "tasks": counts_of(row),
    }
