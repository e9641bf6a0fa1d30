"""Reads the results of the tasks that a running task has waited for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any, Final, NamedTuple, cast

from apoq.client.session_adapters import AsyncioSession, Caller, SyncSession, through
from apoq.postgres.loaders import read_json
from apoq.schema.statements.parents import parent_counts, parent_results

PAGE_SIZE: Final = 100
"""Results that one statement reads: each may be large."""

_START: Final = {"behind_position": -(2**31), "behind_parent": -(2**63)}


class ParentCounts(NamedTuple):
    """How many of the tasks that a task has waited for have completed, and how many have not."""

    completed: int
    failed: int
    """Those that failed, were cancelled or were deleted."""


def read_results(session: SyncSession, schema: str | None, task_id: int) -> Iterator[Any]:
    """Yield the results of the parents of a task, in the order of `after`."""
    behind = _START
    while page := cast(
        "_Page", through(session, partial(_page, schema=schema, task_id=task_id, behind=behind))
    ):
        yield from page.results
        behind = page.behind


async def read_results_async(session: AsyncioSession, schema: str | None, task_id: int) -> AsyncIterator[Any]:
    """Do the same through an asyncio session."""
    behind = _START
    while page := await cast(
        "Any", through(session, partial(_page, schema=schema, task_id=task_id, behind=behind))
    ):
        for result in page.results:
            yield result
        behind = page.behind


def count_parents(session: SyncSession | AsyncioSession, schema: str | None, task_id: int) -> Any:
    """Return the `ParentCounts` of a task; an awaitable of them if the session is asyncio's."""

    def count(caller: Caller) -> ParentCounts:
        (row,) = caller.execute(parent_counts(schema), {"task_id": task_id})
        return ParentCounts(row["completed"], row["failed"])

    return through(session, count)


class _Page(NamedTuple):
    results: list[Any]
    behind: dict[str, int]


def _page(caller: Caller, *, schema: str | None, task_id: int, behind: dict[str, int]) -> _Page | None:
    rows = caller.execute(parent_results(schema), {"task_id": task_id, "at_most": PAGE_SIZE, **behind})
    if not rows:
        return None
    last = {"behind_position": rows[-1]["position"], "behind_parent": rows[-1]["parent_id"]}
    return _Page([None if row["result"] is None else read_json(row["result"]) for row in rows], last)
