"""Lists of tasks, one page at a time, in the order of an index.

A page is the result of one statement that reads a bounded number of tasks, and of one that reads the details
of the tasks that are shown. There is no OFFSET and no total: the next page starts at an `Edge`, the place of
the last task in the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from apoq.core.states import CANCELLED, COMPLETED, FAILED, RUNNING, WAITING
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.browse import (
    browse_all,
    browse_completed,
    browse_failed,
    browse_pending,
    browse_running,
    browse_waiting,
    find_holders,
    read_briefs,
    read_task,
)
from apoq.schema.statements.overview import count_noted, name_queues

READY: Final = "ready"
SCHEDULED: Final = "scheduled"
RETRYING: Final = "retrying"
"""The names for pending tasks: due, due later, and due later after a failed attempt."""

VIEWS: Final = (READY, SCHEDULED, RETRYING, WAITING, RUNNING, COMPLETED, FAILED, CANCELLED)
"""The states by which tasks are listed."""

PAGE: Final = 25
"""How many tasks are on a page."""

EXAMINED: Final = 1_000
"""How many tasks are examined for a page that is filtered."""

EXAMINED_ERRORS: Final = 300
"""The same if their errors must be read, which are long and may be stored elsewhere."""

MAX_QUEUES: Final = 20
"""Of how many queues the tasks are listed together."""

LEVELS: Final = 3
"""In how many levels of a queue there are tasks, as a guess: each of them is examined."""

LEAST: Final = 10
"""How many tasks of each queue, or of each level of a queue, are examined at least."""

EXCERPT: Final = 300
"""Characters of an error in a list."""

LARGEST: Final = 1024 * 1024
"""Stored bytes of data that are read for the page of a task."""

_HIGHEST_ID, _LOWEST_ID = 2**63 - 1, -(2**63)
_LAST, _FIRST = datetime.max.replace(tzinfo=UTC), datetime.min.replace(tzinfo=UTC)


class Edge(NamedTuple):
    """A place in the order of tasks, behind which a page begins."""

    at: datetime
    id: int

    def __str__(self) -> str:
        return f"{self.at.astimezone(UTC).replace(tzinfo=None).isoformat()}~{self.id}"


def read_edge(text: str) -> Edge | None:
    """Read the text of an edge; None if it isn't one."""
    at, _, id_ = text.partition("~")
    try:
        edge = Edge(datetime.fromisoformat(at).replace(tzinfo=UTC), int(id_))
    except ValueError:
        return None
    return edge if _LOWEST_ID <= edge.id <= _HIGHEST_ID else None


@dataclass(frozen=True)
class Wanted:
    """Which tasks are listed; None: any."""

    state: str | None = None
    """One of `VIEWS`."""
    queue: str | None = None
    type: str | None = None
    key: str | None = None
    """A unique key, or a concurrency key."""
    error: str | None = None
    """The class of the last error."""

    @property
    def is_filtered(self) -> bool:
        """Whether tasks are examined for something that no index has."""
        return any(value is not None for value in (self.type, self.key, self.error))

    def accepts(self, row: Any) -> bool:
        """Return whether a task is listed."""
        return (
            self.queue in {None, row.queue}
            and (self.state not in {FAILED, CANCELLED} or row.state == self.state)
            and (self.state != RETRYING or row.fail_count > 0)
            and self.type in {None, row.type}
            and (self.key is None or self.key in {row.unique_key, row.key})
            and self.error in {None, row.error_class}
        )


@dataclass
class Listing:
    """A page of tasks."""

    tasks: Sequence[sa.RowMapping]
    next: Edge | None
    """Where the next page begins, if there may be more tasks."""
    examined: int
    """How many tasks were examined."""
    has_more_queues: bool = False
    """Whether only tasks of the first `MAX_QUEUES` queues are listed."""
    is_partial: bool = False
    """Whether there may be running tasks that were not examined."""
    skips_some: bool = False
    """Whether so many tasks ended at the same time that the next page doesn't have all of them."""


class _View(NamedTuple):
    """How the tasks in a state are read."""

    statement: Callable[[str | None], sa.Select[Any]]
    is_descending: bool = True
    is_by_id: bool = False
    """Whether the order is that of the ids, and not of a time."""
    has_ties: bool = False
    """Whether the index doesn't contain the id, so that tasks with the same time are in no order."""
    is_whole: bool = False
    """Whether the statement ignores the edge, and returns all tasks that can be listed."""


_ENDED: Final = _View(browse_failed, has_ties=True)
_PENDING: Final = _View(browse_pending, is_descending=False)
_VIEWS: Final = {
    None: _View(browse_all, is_by_id=True),
    READY: _PENDING,
    SCHEDULED: _PENDING,
    RETRYING: _PENDING,
    WAITING: _View(browse_waiting, is_by_id=True),
    RUNNING: _View(browse_running, is_whole=True),
    COMPLETED: _View(browse_completed, has_ties=True),
    FAILED: _ENDED,
    CANCELLED: _ENDED,
}


class Found(NamedTuple):
    """The ids of tasks of a list."""

    ids: list[int]
    next: Edge | None
    """Behind which task the list goes on, if it does."""
    examined: int
    has_more_queues: bool
    is_partial: bool
    skips_some: bool


def browse(connection: sa.Connection, schema: str | None, wanted: Wanted, edge: Edge | None) -> Listing:
    """Return the page of tasks that begins behind `edge`, or the first one."""
    found = find_matching(connection, schema, wanted, edge, at_most=PAGE)
    return Listing(read_tasks(connection, schema, found.ids), *found[1:])


def find_matching(
    connection: sa.Connection,
    schema: str | None,
    wanted: Wanted,
    edge: Edge | None = None,
    *,
    at_most: int,
) -> Found:
    """Return the ids of up to `at_most` tasks behind `edge`, of those that are examined for a page."""
    view = _VIEWS[wanted.state]
    queues, has_more = _queues(connection, schema, wanted)
    start = edge or (Edge(_LAST, _HIGHEST_ID) if view.is_descending else Edge(_FIRST, _LOWEST_ID))
    per_level = _per_level(view, wanted, len(queues), at_most)
    parameters = {
        "in_queues": queues,
        "edge_time": start.at,
        "edge_id": start.id,
        "per_level": per_level,
        "from_now": wanted.state in {SCHEDULED, RETRYING},
        "until_now": wanted.state == READY,
        "with_error": wanted.error is not None,
    }
    rows = connection.execute(view.statement(schema), parameters).all()
    ids, following, is_stuck = _page(rows, view, wanted, start, per_level, at_most)
    if wanted.key is not None and edge is None:
        ids = list(dict.fromkeys([*_holders(connection, schema, parameters, wanted), *ids]))
    is_partial = (
        view.is_whole
        and per_level < connection.execute(count_noted(schema), {"counted": per_level + 1}).scalar_one()
    )
    return Found(ids, following, len(rows), has_more, is_partial, is_stuck)


def read_tasks(connection: sa.Connection, schema: str | None, ids: Sequence[int]) -> list[sa.RowMapping]:
    """Return what a list shows of these tasks, in this order."""
    if not ids:
        return []
    parameters = {"ids": array_text(ids), "excerpt": EXCERPT}
    rows = {row["id"]: row for row in connection.execute(read_briefs(schema), parameters).mappings()}
    return [rows[task_id] for task_id in ids if task_id in rows]


def read_one(connection: sa.Connection, schema: str | None, task_id: int) -> sa.RowMapping | None:
    """Return everything about a task, if it exists."""
    parameters = {"task_id": task_id, "largest": LARGEST}
    return connection.execute(read_task(schema), parameters).mappings().one_or_none()


def first_queues(
    connection: sa.Connection, schema: str | None, at_most: int = MAX_QUEUES, after: str = ""
) -> tuple[list[str], bool]:
    """Return the names of the first queues after this one, and whether there are more."""
    parameters = {"after_queue": after, "at_most": at_most + 1}
    names = list(connection.scalars(name_queues(schema), parameters))
    return names[:at_most], len(names) > at_most


def _queues(connection: sa.Connection, schema: str | None, wanted: Wanted) -> tuple[list[str], bool]:
    if wanted.queue is not None:
        return [wanted.queue], False
    if wanted.state in {None, RUNNING} and wanted.key is None:
        return [], False
    return first_queues(connection, schema)


def _holders(
    connection: sa.Connection, schema: str | None, parameters: dict[str, Any], wanted: Wanted
) -> list[int]:
    """Return the tasks that hold the key, which an index has, if they are wanted."""
    if not parameters["in_queues"]:
        return []
    rows = connection.execute(find_holders(schema), {**parameters, "held_key": wanted.key}).all()
    view = replace(wanted, state=None) if wanted.state in {READY, SCHEDULED, RETRYING} else wanted
    states = {None: None, READY: "pending", SCHEDULED: "pending", RETRYING: "pending"}
    state = states.get(wanted.state, wanted.state)
    return [row.id for row in rows if view.accepts(row) and state in {None, row.state}]


def _per_level(view: _View, wanted: Wanted, queues: int, at_most: int) -> int:
    """Return how many tasks of a queue, or of a level of a queue, are examined."""
    examined = EXAMINED_ERRORS if wanted.error is not None else EXAMINED
    levels = 1 if view.is_whole else max(1, queues) * (LEVELS if view.statement is browse_pending else 1)
    most = max(LEAST, examined // levels)
    is_examined = wanted.is_filtered or wanted.state == RETRYING or view.has_ties or view.is_whole
    if is_examined or (view.statement is browse_all and wanted.queue is not None):
        return most
    return min(at_most + 1, most)


def _page(
    rows: Sequence[Any], view: _View, wanted: Wanted, start: Edge, per_level: int, at_most: int
) -> tuple[list[int], Edge | None, bool]:
    """Choose the tasks of a page from the examined ones; return also its end, and whether it skips some."""

    def place(row: Any) -> Edge:
        return Edge(_LAST if view.is_by_id or row.at is None else row.at, row.id)

    def is_behind(one: Edge, other: Edge) -> bool:
        if view.is_by_id:
            return one.id < other.id
        return one < other if view.is_descending else one > other

    horizon = None if view.is_whole else _horizon(rows, view, place, per_level)
    is_stuck = horizon is not None and view.has_ties and horizon.at >= start.at
    if horizon is not None and view.has_ties:
        # The examined tasks may not be all tasks at the horizon. They are on the next page, unless all of
        # the examined ones are there: then the list goes on behind that time.
        before = horizon.at - timedelta(microseconds=1) if is_stuck else horizon.at
        horizon = Edge(before, _HIGHEST_ID)
    usable = [
        row
        for row in sorted(rows, key=place, reverse=view.is_descending)
        if is_behind(place(row), start)
        and (horizon is None or place(row) == horizon or not is_behind(place(row), horizon))
        and wanted.accepts(row)
    ]
    shown = usable[:at_most]
    ids = [row.id for row in shown]
    return (ids, place(shown[-1]), False) if len(usable) > at_most else (ids, horizon, is_stuck)


def _horizon(rows: Sequence[Any], view: _View, place: Callable[[Any], Edge], per_level: int) -> Edge | None:
    """Return up to where all tasks were examined, if there are more: where the first full level ends."""

    def level(row: Any) -> tuple[str, int]:
        return ("", 0) if view.statement is browse_all else (row.queue, row.level or 0)

    levels = [list(each) for _, each in groupby(sorted(rows, key=level), key=level)]
    ends = [
        (min if view.is_descending else max)(map(place, each)) for each in levels if len(each) >= per_level
    ]
    return (max if view.is_descending else min)(ends) if ends else None
