"""Lets tasks run that wait for others, in the transaction of a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import CursorResult, Executable

from apoq.client.queue import Queue
from apoq.core.states import COMPLETED, FINAL
from apoq.worker.maintenance.links_sweep import LinksSweep
from apoq.worker.settling.unblocking import Ends, unblock

Execute = Callable[[Queue, Executable, dict[str, Any]], CursorResult[Any]]


class InLineEdges:
    """Writes the ends of tasks to the tasks that wait for them, as a worker does after its commits."""

    def __init__(self, execute: Execute) -> None:
        self._execute = execute

    def ended(self, queue: Queue, row: Mapping[Any, Any]) -> None:
        """Write the end of a task, if it has ended, and others wait for it."""
        if row["is_followed"] and row["state"] in FINAL:
            has_completed = row["state"] == COMPLETED
            ids, none = {row["id"]}, set[int]()
            self._unblock(queue, Ends(ids, none, set()) if has_completed else Ends(none, ids, set()))

    def check(self, queue: Queue) -> bool:
        """Look at the edges of a schema that a worker must look at; return whether a task is pending now."""
        found = LinksSweep(queue.schema, self._run_in(queue), 0.0).check()
        return self._unblock(queue, Ends(*found))

    def _unblock(self, queue: Queue, ends: Ends) -> bool:
        free, _ = unblock(self._run_in(queue), queue.schema, ends)
        return bool(free)

    def _run_in(self, queue: Queue) -> Callable[[Executable, dict[str, Any]], Sequence[Mapping[Any, Any]]]:
        def run(statement: Executable, parameters: dict[str, Any]) -> Sequence[Mapping[Any, Any]]:
            result = self._execute(queue, statement, parameters)
            return result.mappings().all() if result.returns_rows else ()

        return run
