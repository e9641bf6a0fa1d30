"""Goes through the levels of a graph when a task of it has not completed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy import Executable

from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.cascade import (
    CASCADE_SIZE,
    EDGE,
    FREE,
    LEFT,
    NEXT,
    REPORT,
    apply_failures,
    reopen,
)

Execute = Callable[[Executable, dict[str, Any]], Iterable[Mapping[Any, Any]]]
"""Executes a statement, and returns its rows."""

Report = Callable[[Mapping[Any, Any]], None]
"""Takes a task that was cancelled: its id, type, queue, attempt, and the reason."""


class Cascade(NamedTuple):
    """The work that is left after a cascade."""

    free: set[int]
    """Parents whose edges to some children are done, but not counted."""
    left: set[int]
    """Parents of which a child was locked."""


def fail_children(
    execute: Execute,
    schema: str | None,
    ids: Iterable[int],
    *,
    waits: bool = False,
    report: Report | None = None,
) -> Cascade:
    """Apply the ends of tasks that have not completed to the tasks that wait for them, level by level.

    `waits`: as for `apply_failures`. `report` is called for each task that is cancelled.
    """
    cascade = Cascade(set(), set())
    statement = apply_failures(schema, waits=waits, reports=report is not None)
    level = set(ids)
    while level:
        below: set[int] = set()
        for batch in batches(level):
            looked_at = written = CASCADE_SIZE
            while written and looked_at >= CASCADE_SIZE:
                looked_at = written = 0
                parameters = {"ids": array_text(batch), "at_most": CASCADE_SIZE}
                for row in execute(statement, parameters):
                    kind, id_ = row["kind"], row["id"]
                    written += kind == EDGE
                    looked_at += kind in {EDGE, LEFT}
                    if kind == REPORT and report is not None:
                        report(row)
                    elif kind == NEXT:
                        below.add(id_)
                    elif kind == FREE:
                        cascade.free.add(id_)
                    elif kind == LEFT:
                        cascade.left.add(id_)
        level = below
    return cascade


def reopen_edges(execute: Execute, schema: str | None, ids: Sequence[int]) -> None:
    """Let the next end of tasks that were retried be applied to the tasks that wait for them."""
    execute(reopen(schema), {"ids": array_text(ids)})


def batches(ids: Iterable[int]) -> Iterator[list[int]]:
    """Yield ids in order, in batches of at most `CASCADE_SIZE`."""
    left = iter(sorted(ids))
    while batch := list(islice(left, CASCADE_SIZE)):
        yield batch
