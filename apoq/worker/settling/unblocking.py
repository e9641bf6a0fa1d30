"""Lets tasks run that have waited for others, after these have ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from psycopg.errors import LockNotAvailable
from sqlalchemy import Executable

from apoq.client.cascades import Execute, Report, batches, fail_children
from apoq.events import Events, TaskCancelled
from apoq.postgres.connections import execute
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.notify import arrays, has_tasks, notify
from apoq.schema.statements.unblock import count_off
from apoq.worker import reports
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.database import WorkerDatabase
from apoq.worker.maintenance.links_sweep import LinksSweep
from apoq.worker.service import Service

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.005, 0.25
"""Seconds after which children that another session had locked are tried again: at first, and at most.

Another worker that counts edges off the same child has it locked for a millisecond.
"""


class Ends(NamedTuple):
    """Tasks of a schema that have ended, and whose children don't know it yet."""

    completed: set[int]
    failed: set[int]
    """Those that failed, were cancelled or were deleted."""
    done: set[int]
    """Those of which only the edges that are done already are counted."""

    def update(self, other: Ends) -> None:
        """Add those of another one."""
        self.completed.update(other.completed)
        self.failed.update(other.failed)
        self.done.update(other.done)

    def __bool__(self) -> bool:
        return any(map(bool, tuple(self)))


def no_ends() -> Ends:
    """Return an empty `Ends`."""
    return Ends(set(), set(), set())


def unblock(
    run: Execute, schema: str | None, ends: Ends, report: Report | None = None
) -> tuple[dict[str, float], Ends]:
    """Write the ends of tasks to their children, as far as these aren't locked.

    `report` is called for each child that is cancelled. Returns the queues in which tasks are pending now,
    with the seconds until the first is due, and those whose children were locked.
    """
    left = no_ends()
    free: dict[str, float] = {}
    done = ends.done | _fail(run, schema, ends.failed, left, report)
    for ids in batches(ends.completed | done):
        completed = [id_ for id_ in ids if id_ in ends.completed]
        parameters = {"ids": array_text(ids), "completed": array_text(completed)}
        for row in run(count_off(schema), parameters):
            id_, queue = row["id"], row["queue"]
            if queue is not None:
                free[queue] = min(row["due_in"], free.get(queue, row["due_in"]))
            else:
                (left.completed if id_ in ends.completed else left.done).add(id_)
    return free, left


def _fail(run: Execute, schema: str | None, failed: set[int], left: Ends, report: Report | None) -> set[int]:
    """Write the failures of tasks to their children; return those whose children go on, and add to `left`."""
    if not failed:
        return set()
    try:
        cascade = fail_children(run, schema, failed, report=report)
    except LockNotAvailable:
        # A task that has timed out and goes on holds an edge if it has added tasks to its group.
        if len(failed) == 1:
            left.failed.update(failed)
            return set()
        return {id_ for one in failed for id_ in _fail(run, schema, {one}, left, report)}
    left.failed.update(cascade.left)
    return cascade.free


class _Schema:
    """The ends in a schema, and those whose children were locked."""

    def __init__(self) -> None:
        self.ends = no_ends()
        self.put_off = no_ends()
        self.looks_at = 0.0
        self.pause = FIRST_PAUSE_SECONDS


class Unblocker(Service):
    """Writes the ends of tasks to their children, and makes those pending that wait for no more.

    It waits for no lock: children that a caller has locked are put off by themselves. When it has nothing to
    do, it looks for edges that callers have added, and for what other workers have left behind.
    """

    def __init__(
        self,
        database: WorkerDatabase,
        events: Events,
        *,
        poll_interval: float,
        on_unblocked: Callable[[str | None, dict[str, float]], None],
    ) -> None:
        """`on_unblocked` is called with a schema, and the seconds until a task is due in its queues."""
        super().__init__("apoq-unblocker", database.outage)
        self._database = database
        self._events = events
        schemas = database.schemas
        self._schemas = {schema: _Schema() for schema in schemas}
        self._sweeps = {
            schema: LinksSweep(schema, self._execute, poll_interval, len(schemas)) for schema in schemas
        }
        self._breaker: CircuitBreaker[str | None] = CircuitBreaker(_describe, database.outage)
        self._on_unblocked = on_unblocked
        self._lock = threading.Lock()
        self._count = 0
        """How often tasks were unblocked."""

    def put(self, schema: str | None, *, completed: Iterable[int] = (), failed: Iterable[int] = ()) -> None:
        """Write the ends of these tasks to their children soon."""
        with self._lock:
            self._schemas[schema].ends.update(Ends(set(completed), set(failed), set()))
        self.wake()

    def check(self, schema: str | None) -> None:
        """Look soon at the edges that callers have added in a schema."""
        self._sweeps[schema].check_soon()
        self.wake()

    def hurry(self, schema: str | None) -> None:
        """Look soon for what a worker that has died has left behind."""
        self._sweeps[schema].hurry()
        self.wake()

    def look_now(self) -> bool:
        """Look at them on the caller's thread; return whether a task is pending now."""
        before = self._count
        for sweep in self._sweeps.values():
            sweep.check_soon()
        self.turn()
        return self._count > before

    def turn(self) -> float | None:
        """Do what there is to do in each schema; return when to go on."""
        looks_at = min(self._isolate(schema) for schema in self._schemas)
        return max(0.0, looks_at - time.monotonic())

    def after_last_turn(self) -> None:
        """Write what is left; other workers would find it later."""
        for schema, its in self._schemas.items():
            if its.ends:
                self._unblock(schema, its)

    def _isolate(self, schema: str | None) -> float:
        its = self._schemas[schema]
        later = time.monotonic() + LONGEST_PAUSE_SECONDS
        return self._breaker.call(schema, self._schemas, partial(self._look, schema, its), later)

    def _look(self, schema: str | None, its: _Schema) -> float:
        self._unblock(schema, its)
        sweep = self._sweeps[schema]
        if self._database.leases[schema].is_held and not its.ends:
            found = Ends(*sweep.look())
            its.ends.update(found)
            if found:
                self._unblock(schema, its)
        looks_at = sweep.looks_at
        if its.ends:
            return 0.0
        return min(looks_at, its.looks_at) if its.put_off else looks_at

    def _unblock(self, schema: str | None, its: _Schema) -> None:
        is_again = bool(its.put_off) and time.monotonic() >= its.looks_at
        with self._lock:
            taken, its.ends = its.ends, no_ends()
        if is_again:
            taken.update(its.put_off)
            its.put_off = no_ends()
        if not taken:
            return
        try:
            free, left = unblock(self._execute, schema, taken, self._reporter(schema))
        except BaseException:
            with self._lock:
                its.ends.update(taken)
            raise
        if left:
            its.put_off.update(left)
            its.pause = min(2 * its.pause, LONGEST_PAUSE_SECONDS) if is_again else FIRST_PAUSE_SECONDS
            its.looks_at = time.monotonic() + its.pause
        if free:
            self._count += 1
            self._on_unblocked(schema, free)
            if due := [has_tasks(schema, queue) for queue, due_in in free.items() if due_in <= 0]:
                execute(self._database.engine, notify(), arrays(due))

    def _reporter(self, schema: str | None) -> Report | None:
        """Return what reports cancelled tasks; None without a listener, and then they aren't read."""
        if not self._events.has_listeners(TaskCancelled):
            return None
        return lambda row: self._events.report(reports.cancelled_with_parent(schema, row))

    def _execute(self, statement: Executable, parameters: dict[str, Any]) -> Iterable[Mapping[Any, Any]]:
        result = execute(self._database.engine, statement, parameters)
        return result.mappings()


def _describe(schema: str | None) -> str:
    return "unblocking tasks" if schema is None else f"unblocking tasks in the schema {schema!r}"
