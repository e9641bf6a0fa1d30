"""Adds tasks that wait for other tasks in a caller's transaction, for all kinds of sessions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, Final, NamedTuple

from apoq.client import unique_tasks
from apoq.client.session_adapters import Caller, Row
from apoq.core.dependencies import Dependencies, OnParentFailure
from apoq.core.states import CANCELLED, COMPLETED, FAILED
from apoq.core.unique import ADDED, OnConflict
from apoq.errors import InvalidTask
from apoq.schema.models import Task
from apoq.schema.objects import detached, with_outcome
from apoq.schema.statements import links as statements
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.enqueue import added_row
from apoq.schema.statements.notify import has_links, has_tasks

EDGES: Final = 10_000
"""Edges that one statement adds, at most."""

TASKS: Final = 5_000
BATCH_SIZE: Final = 4 * 1024 * 1024
"""Tasks, and characters of data, that one statement adds, at most."""


class Part(NamedTuple):
    """A task that is about to be added."""

    type: str
    document: str
    """Its data, as JSON."""
    key: str | None

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of a statement that adds it."""
        return {"task_type": self.type, "task_data": self.document, "task_key": self.key}


class Edge(NamedTuple):
    """An edge that is about to be added."""

    parent: int
    child: int
    position: int = 0
    is_done: bool = False
    needs_check: bool = False


class Parents:
    """The tasks of `after`, as the caller's transaction sees them."""

    def __init__(self, caller: Caller, schema: str | None, ids: Sequence[int]) -> None:
        rows = caller.execute(statements.look_at_parents(schema), {"ids": array_text(ids)}) if ids else ()
        self._found = {row["id"]: row for row in rows}
        self._ids = ids
        for id_ in ids:
            if id_ not in self._found:
                raise InvalidTask(
                    f"after must have tasks that exist, got the id {id_}: the task was deleted, or is in "
                    "another schema, or its transaction has not been committed"
                )
        self.blockers = sum(row["state"] != COMPLETED for row in rows)
        self.new = [id_ for id_ in ids if self._found[id_]["is_new"]]
        self.is_checked_later = any(self._is_checked_later(id_) for id_ in ids)

    def edges(self, child: int) -> Iterator[Edge]:
        """Yield the edges to a child."""
        for position, id_ in enumerate(self._ids):
            is_done = self._found[id_]["state"] == COMPLETED
            yield Edge(id_, child, position, is_done, self._is_checked_later(id_))

    def _is_checked_later(self, id_: int) -> bool:
        row = self._found[id_]
        return row["state"] != COMPLETED and (not row["is_new"] or row["state"] in {FAILED, CANCELLED})


def add(
    caller: Caller,
    schema: str | None,
    parameters: dict[str, Any],
    dependencies: Dependencies,
    on_conflict: OnConflict | None = None,
    **values: Any,
) -> Task:
    """Add a task that waits for its parents, and return it.

    With `on_conflict`, it has the key `task_unique_key`; a task that is kept gets no parents. `values` are
    further parameters.
    """
    parents = Parents(caller, schema, dependencies.parents)
    parameters = {
        **parameters,
        **dependencies.parameters,
        "task_blockers": parents.blockers,
        **values,
    }
    if on_conflict is None:
        statement = statements.enqueue_linked(schema, mapped=caller.has_orm_listeners)
        task = _added(caller, schema, parameters, statement)
    else:
        task = unique_tasks.add(
            caller, schema, parameters, on_conflict, None, statement=statements.enqueue_unique_linked
        )
        if not task.is_new:
            return task
    link_to(caller, schema, parents, [task.id])
    if not parents.blockers:
        caller.notify(has_tasks(schema, parameters["task_queue"]))
    return task


def add_with_id(caller: Caller, schema: str | None, parameters: dict[str, Any]) -> Task:
    """Add a task with the id `task_id`, without its edges."""
    statement = statements.enqueue_linked(schema, mapped=caller.has_orm_listeners, has_id=True)
    return _added(caller, schema, parameters, statement)


def add_many(
    caller: Caller,
    schema: str | None,
    parameters: dict[str, Any],
    documents: Iterable[str],
    dependencies: Dependencies,
) -> int:
    """Add a task that waits for its parents for each of these documents, and return their number."""
    parents = Parents(caller, schema, dependencies.parents)
    parameters = {**parameters, **dependencies.parameters, "task_blockers": parents.blockers}
    type_, key = parameters["task_type"], parameters["task_key"]
    count = 0
    for rows in added(caller, schema, parameters, (Part(type_, document, key) for document in documents)):
        link_to(caller, schema, parents, [row["id"] for row in rows])
        count += len(rows)
    if not parents.blockers:
        caller.notify(has_tasks(schema, parameters["task_queue"]))
    return count


def added(
    caller: Caller,
    schema: str | None,
    parameters: dict[str, Any],
    parts: Iterable[Part],
    *,
    followed: int = 0,
) -> Iterator[Sequence[Row]]:
    """Add tasks of these types with these documents, and yield what the server returns, in batches.

    The first `followed` of them have children.
    """
    options = {name: value for name, value in parameters.items() if name not in _OF_EACH}
    for batch in _batches(parts):
        each = {
            "task_types": [part.type for part in batch],
            "task_keys": [part.key for part in batch],
            "task_data": "\n".join(part.document for part in batch),  # JSON escapes newlines
            "followed_until": followed + 1,
        }
        yield caller.execute(statements.enqueue_many_linked(schema), {**options, **each})
        followed -= len(batch)


def link_to(caller: Caller, schema: str | None, parents: Parents, children: Iterable[int]) -> None:
    """Add the edges from these parents to new tasks."""
    link(caller, schema, (edge for child in children for edge in parents.edges(child)))
    if parents.new:
        caller.execute(statements.follow_new(schema), {"ids": array_text(sorted(parents.new))})
    if parents.is_checked_later:
        caller.notify(has_links(schema))


def link(caller: Caller, schema: str | None, edges: Iterable[Edge]) -> None:
    """Add these edges."""
    left = iter(edges)
    while batch := list(islice(left, EDGES)):
        caller.execute(
            statements.link(schema),
            {
                "parents": array_text(edge.parent for edge in batch),
                "children": array_text(edge.child for edge in batch),
                "positions": array_text(edge.position for edge in batch),
                "done": array_text(edge.is_done for edge in batch),
                "checked_later": array_text(edge.needs_check for edge in batch),
            },
        )


def chain(
    caller: Caller,
    schema: str | None,
    parameters: dict[str, Any],
    parts: Sequence[Part],
    dependencies: Dependencies | None,
    on_failure: OnParentFailure | None,
) -> list[Task]:
    """Add tasks of which each waits for the one before, and return them."""
    parents = Parents(caller, schema, () if dependencies is None else dependencies.parents)
    given = {**parameters, **Dependencies((), on_failure).parameters}
    last = len(parts) - 1
    steps = (
        ({**given, "task_blockers": parents.blockers}, parts[:1]),
        # Those that wait are due when the one before has completed.
        ({**given, "task_blockers": 1, "task_delay": None, "task_process_at": None}, parts[1:]),
    )
    tasks: list[Task] = []
    for its, some in steps:
        for batch in added(caller, schema, its, some, followed=last - len(tasks)):
            for row in batch:
                is_followed = {"task_is_followed": True if len(tasks) < last else None}
                known = {**parts[len(tasks)].parameters, **is_followed}
                tasks.append(_attached(caller, schema, {**its, **known}, row))
    ids = [task.id for task in tasks]
    link_to(caller, schema, parents, ids[:1])
    link(caller, schema, (Edge(parent, child) for parent, child in pairwise(ids)))
    if not parents.blockers:
        caller.notify(has_tasks(schema, parameters["task_queue"]))
    return tasks


def _added(caller: Caller, schema: str | None, parameters: dict[str, Any], statement: Any) -> Task:
    (row,) = caller.execute(statement, parameters)
    return _attached(caller, schema, parameters, row)


def _attached(caller: Caller, schema: str | None, parameters: dict[str, Any], row: Row) -> Task:
    values = {**added_row(parameters, row), **statements.linked_row(parameters, row)}
    task = with_outcome(detached(schema, values), ADDED)
    caller.attach(task)
    return task


_OF_EACH: Final = frozenset({"task_type", "task_key", "task_data", "task_is_followed"})


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.document)
        if len(batch) >= TASKS or size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
