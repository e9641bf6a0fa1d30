"""Reads the graph around a task, for people: a bounded part of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

import sqlalchemy as sa

from apoq.monitor.check import OK, WARNING, Finding
from apoq.monitor.formatting import clean
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.graph import children_of, count_edges, parents_of, stuck

MAX_DEPTH: Final = 6
"""Levels below a task that are shown."""

MAX_CHILDREN: Final = 20
"""Children of a task, and parents, that are shown."""

MAX_NODES: Final = 60
"""Tasks that are shown in all."""

DELETED: Final = "deleted"
"""The state of a task that doesn't exist any more."""

MAX_COUNTED: Final = 10_000
"""How many of the others are counted."""

LATE_AFTER: Final = timedelta(minutes=1)

MAX_NAMED: Final = 5


@dataclass
class Node:
    """A task in a graph."""

    id: int
    type: str | None
    """None if the task was deleted."""
    state: str
    message: str | None = None
    """The error on the edge, if the parent did not complete."""
    children: list[Node] = field(default_factory=list)
    has_more: bool = False
    """Whether there are children that aren't shown."""
    is_repeated: bool = False
    """Whether the task is shown elsewhere, with its children."""


@dataclass
class Graph:
    """The parents of a task, and the tasks that wait for it."""

    parents: list[Node]
    more_parents: int
    """How many parents aren't shown; more than `MAX_COUNTED`: there may be any number."""
    children: list[Node]
    more_children: int
    """The same for its children."""

    def __bool__(self) -> bool:
        return bool(self.parents or self.children)


def graph_of(connection: sa.Connection, schema: str | None, task_id: int) -> Graph:
    """Read the parents of a task, and some levels of the tasks that wait for it."""
    parameters = {"task_id": task_id, "at_most": MAX_CHILDREN + 1}
    above = connection.execute(parents_of(schema), parameters).mappings().all()
    root = Node(task_id, "", "")
    seen, level = {task_id: root}, [root]
    for _ in range(MAX_DEPTH):
        level = _next_level(connection, schema, level, seen)
    for node in level:
        node.has_more = True
    parents = [_node(row, row["parent_id"]) for row in above[:MAX_CHILDREN]]
    more_parents = more_children = 0
    if len(above) > MAX_CHILDREN or root.has_more:
        bounds = {"task_id": task_id, "at_most": MAX_COUNTED + MAX_CHILDREN + 1}
        counted = connection.execute(count_edges(schema), bounds).one()
        more_parents, more_children = counted.parents - len(parents), counted.children - len(root.children)
    return Graph(parents, more_parents, root.children, more_children)


def _next_level(
    connection: sa.Connection, schema: str | None, level: list[Node], seen: dict[int, Node]
) -> list[Node]:
    """Add the children of the nodes of a level; return those that have children themselves.

    If there are many nodes, each gets only some of its children, so that a bounded number of rows is read.
    """
    by_id = {node.id: node for node in level}
    room = MAX_NODES - (len(seen) - 1)
    if not by_id or room <= 0:
        return level
    most = min(MAX_CHILDREN, max(1, room // len(level)))
    parameters = {"ids": array_text(sorted(by_id)), "at_most": most + 1}
    below: list[Node] = []
    for row in connection.execute(children_of(schema), parameters).mappings():
        parent = by_id[row["parent_id"]]
        if len(parent.children) >= most or len(seen) > MAX_NODES:
            parent.has_more = True
            continue
        node = _node(row, row["child_id"])
        parent.children.append(node)
        if node.id in seen:
            node.is_repeated = True
        else:
            seen[node.id] = node
            if row["is_followed"]:
                below.append(node)
    return below


def _node(row: sa.RowMapping, id_: int) -> Node:
    return Node(id_, row["type"], row["state"] or DELETED, row["message"])


def check_waiting(connection: sa.Connection, schema: str | None) -> Iterator[Finding]:
    """Check for tasks that wait for parents which don't complete by themselves."""
    parameters = {"at_most": 100, "late": LATE_AFTER}
    rows = connection.execute(stuck(schema), parameters).mappings().all()
    for row in rows[:MAX_NAMED]:
        yield Finding(WARNING, "waiting", reason_of(row), _cure(row))
    if len(rows) > MAX_NAMED:
        yield Finding(WARNING, "waiting", f"{len(rows) - MAX_NAMED:,} more reasons", "run apoq stats --json")
    if not rows:
        yield Finding(OK, "waiting", "no task waits for one that has failed or was deleted")


def reason_of(row: sa.RowMapping) -> str:
    """Describe why tasks wait."""
    number = "1 task" if row["number"] == 1 else f"{row['number']:,} tasks"
    verb = "waits" if row["number"] == 1 else "wait"
    text = f"{number} in {clean(row['queue'])!r} {verb} for others"
    type_ = "" if row["parent_type"] is None else f" of type {clean(row['parent_type'])!r}"
    example = f"task {row['task_id']} for task {row['parent_id']}{type_}"
    match row["reason"]:
        case "no worker":
            return f"{text} on whose queue no live worker works, such as {example}"
        case "late":
            return f"{text} that have been due for more than a minute, such as {example}"
        case "deleted":
            return f"{text} that were deleted, such as {example}"
    return (
        f"{text} that {'have failed' if row['reason'] == 'failed' else 'were cancelled'}, such as {example}"
    )


def _cure(row: sa.RowMapping) -> str:
    match row["reason"]:
        case "no worker":
            return "start a worker for this queue"
        case "late":
            return "if no worker has a processor for this type, start one that has"
        case "deleted":
            return f"apoq cancel {row['task_id']}"
    return f"apoq retry {row['parent_id']}, or apoq cancel {row['task_id']}"
