"""Finds edges that callers have added or changed, and what workers that died have left behind."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from apoq.client.cascades import Execute
from apoq.core.states import CANCELLED, COMPLETED, FAILED
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.check_links import checked, edges_to_check, follow, next_waiting, open_edges

STEP_SIZE: Final = 1_000
"""Edges, or waiting tasks, that one statement looks at, at most."""

DATABASE_SHARE: Final = 0.02
"""The share of its time that the sweep spends in the database."""

HURRIED_SHARE: Final = 0.2
"""The same for one pass, after a start and when another worker has died: that may have left something."""

CHECK_SECONDS: Final = 5.0
"""Seconds between two looks if no notification asks for one, at least."""

PASS_SECONDS: Final = 15.0
"""Seconds between two passes through all waiting tasks, at least."""

LOCKED_SECONDS: Final = 0.25
"""Seconds after which an edge is looked at again whose parent or child another session has locked."""

START: Final = {"queue": "", "id": -(2**63)}
FIRST_EDGE: Final = {"behind_child": -(2**63), "behind_position": -(2**31), "behind_parent": -(2**63)}

Found = tuple[set[int], set[int], set[int]]
"""Parents that have completed, that have ended otherwise, and those with edges that are done."""

Edge = Mapping[Any, Any]


class LinksSweep:
    """Looks at the edges of a schema that need a check, and walks slowly through all waiting tasks.

    A caller who adds a task after older ones locks none of these; a worker does, after the commit, so that
    their completions are written to their edges. The walk finds edges of which a worker that died has not
    told the children, and parents that were deleted, or completed by a program that knows of no edges.
    """

    def __init__(self, schema: str | None, run: Execute, poll_interval: float, pace: int = 1) -> None:
        """`pace`: the number of schemas among which the worker shares its time."""
        self._schema = schema
        self._run = run
        self._pace = pace
        self._interval = max(poll_interval, CHECK_SECONDS) * pace
        self._checks_at = 0.0
        self._walks_at = time.monotonic() + self._interval * random.random()  # noqa: S311
        self._behind: dict[str, Any] = START
        self._children: list[int] = []
        self._behind_edge = FIRST_EDGE
        self._share = HURRIED_SHARE
        self._checked: list[tuple[int, int]] = []
        """The edges that the last check has looked at."""

    def hurry(self) -> None:
        """Begin a pass now, and take more time for it."""
        self._share = HURRIED_SHARE
        self._behind, self._children, self._walks_at = START, [], 0.0

    def check_soon(self) -> None:
        """Look at the edges that need a check at the next turn."""
        self._checks_at = 0.0

    @property
    def looks_at(self) -> float:
        """When there is something to look at, by time.monotonic()."""
        return min(self._checks_at, self._walks_at)

    def look(self) -> Found:
        """Look at the next edges; return the tasks whose ends must be written to their children."""
        began = time.monotonic()
        found: Found = (set(), set(), set())
        if began >= self._checks_at:
            try:
                found = self.check()
            except BaseException:
                self.check_soon()  # the next turn must not seem to succeed because it does nothing
                raise
        if time.monotonic() >= self._walks_at:
            is_over = self._walk(found)
            took = time.monotonic() - began
            pause = PASS_SECONDS * self._pace * random.uniform(1.0, 1.2) if is_over else 0.0  # noqa: S311
            self._walks_at = time.monotonic() + max(pause, took * (1 / self._share - 1))
            if is_over:
                self._share = DATABASE_SHARE
        return found

    def check(self) -> Found:
        """Look at the edges that need a check."""
        self._checks_at = time.monotonic() + self._interval
        found: Found = (set(), set(), set())
        edges = list(self._run(edges_to_check(self._schema), {"at_most": STEP_SIZE}))
        if not edges:
            return found
        if unfollowed := {edge["parent_id"] for edge in edges if _is_unfollowed(edge)}:
            self._run(follow(self._schema), {"ids": array_text(sorted(unfollowed))})
            # With the states of now: one may have ended before it was followed.
            edges = list(self._run(edges_to_check(self._schema), {"at_most": STEP_SIZE}))
        _sort(edges, found)
        pairs = {
            "parents": array_text(edge["parent_id"] for edge in edges),
            "children": array_text(edge["child_id"] for edge in edges),
        }
        self._run(checked(self._schema), pairs)
        before, self._checked = self._checked, [(edge["parent_id"], edge["child_id"]) for edge in edges]
        is_full = len(edges) == STEP_SIZE
        is_locked = any(map(_is_unfollowed, edges)) or (is_full and self._checked == before)
        if is_locked or is_full:
            self._checks_at = time.monotonic() + (LOCKED_SECONDS if is_locked else 0.0)
        return found

    def _walk(self, found: Found) -> bool:
        """Go on with the pass through the waiting tasks; return whether it is over."""
        if not self._children:
            rows = list(self._run(next_waiting(self._schema), {**self._behind, "at_most": STEP_SIZE}))
            if not rows:
                self._behind = START
                return True
            self._behind = {"queue": rows[-1]["queue"], "id": rows[-1]["id"]}
            self._children = [row["id"] for row in rows if row["has_parents"]]
            self._behind_edge = FIRST_EDGE
            if not self._children:
                return False
        parameters = {**self._behind_edge, "children": array_text(self._children), "at_most": STEP_SIZE}
        edges = list(self._run(open_edges(self._schema), parameters))
        _sort((edge for edge in edges if not edge["has_error"] or edge["is_done"]), found)
        if len(edges) < STEP_SIZE:
            self._children = []
        else:
            last = edges[-1]
            self._behind_edge = {
                "behind_child": last["child_id"],
                "behind_position": last["position"],
                "behind_parent": last["parent_id"],
            }
        return False


def _is_unfollowed(edge: Edge) -> bool:
    """Return whether the parent has not ended, and its completion would not be written to the edge."""
    state = edge["parent_state"]
    return (
        not edge["parent_is_followed"] and state is not None and state not in {COMPLETED, FAILED, CANCELLED}
    )


def _sort(edges: Iterable[Edge], found: Found) -> None:
    completed, failed, done = found
    for edge in edges:
        id_, state = edge["parent_id"], edge["parent_state"]
        if edge["is_done"]:
            done.add(id_)
        elif state == COMPLETED:
            completed.add(id_)
        elif state in {None, FAILED, CANCELLED}:
            failed.add(id_)
