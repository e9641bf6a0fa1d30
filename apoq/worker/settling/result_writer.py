"""Writes the results of attempts with one statement for many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache, partial
from operator import itemgetter
from typing import Any, Final

from psycopg import DatabaseError
from sqlalchemy import Executable

from apoq.core import states
from apoq.events import FAILED, RETRIED, Events
from apoq.postgres.connections import Transaction, execute, is_away, is_caused_by_a_row, transaction
from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import CLAIM_TOKEN, ID
from apoq.schema.statements.notify import arrays, has_tasks, notify
from apoq.schema.statements.settle import settle
from apoq.worker import logs
from apoq.worker.database import WorkerDatabase
from apoq.worker.execution.attempt import Claimed
from apoq.worker.execution.completion import Completion, reported_columns
from apoq.worker.execution.runner import AttemptResult
from apoq.worker.settling.batches import Unsettled, settlement_arrays, token_arrays
from apoq.worker.settling.failure_tasks import add_failure_tasks, has_failure_task
from apoq.worker.unique_keys import pending_without_key, take_free_keys

Rows = dict[int, Mapping[Any, Any] | None]
"""The tasks that were written, by id; with their rows, if there are listeners."""


class ResultWriter:
    """Writes the results of many attempts in one schema, with one statement."""

    def __init__(
        self,
        database: WorkerDatabase,
        events: Events,
        completion: Completion,
        on_followed: Callable[[str | None, list[int], list[int]], None],
    ) -> None:
        """`on_followed` is called with a schema and the ids of ended tasks for which others wait.

        It gets the ids of those that have completed, and those of the others.
        """
        self._database = database
        self._events = events
        self._completion = completion
        self._on_followed = on_followed
        self.linking: set[str | None] = set()
        """The schemas in which other tasks waited for the last tasks that have completed."""

    def complete(self, unsettled: Unsettled, tasks: list[Claimed]) -> Rows:
        """Write that these tasks have completed."""
        is_full, token = self._completion.has_listeners, tasks[0][CLAIM_TOKEN]
        alike = len(set(map(itemgetter(CLAIM_TOKEN), tasks))) == 1
        statement = self._completion.statement(
            unsettled.schema,
            full=is_full,
            alike=alike,
            skips_locked=unsettled.skips_locked,
            linked=unsettled.is_linked,
        )
        held = {"held_under": token} if alike else token_arrays(tasks)
        return self._write_completions(unsettled, statement, tasks, held, is_full=is_full)

    def complete_with_results(
        self, unsettled: Unsettled, tasks: list[Claimed], results: list[str | None]
    ) -> Rows:
        """Write that these tasks have completed, with what their processors have returned."""
        is_full = self._completion.has_listeners
        statement = self._completion.statement_with_results(
            unsettled.schema,
            full=is_full,
            skips_locked=unsettled.skips_locked,
            linked=unsettled.is_linked,
        )
        its = {"results": results, **token_arrays(tasks)}
        return self._write_completions(unsettled, statement, tasks, its, is_full=is_full)

    def settle(self, schema: str | None, ends: list[AttemptResult], *, skips_locked: bool) -> Rows:
        """Write the settlements of attempts, and add the tasks of `on_failure`."""
        is_full = self._events.has_listeners(FAILED) or self._events.has_listeners(RETRIED)
        tasks = [end.attempt.row for end in ends]
        parameters = {
            "ids": array_text([task[ID] for task in tasks]),
            **token_arrays(tasks),
            **settlement_arrays(ends),
        }
        statement = write_settlements(schema, full=is_full, skips_locked=skips_locked)
        followed = {end.attempt.id: end for end in ends if has_failure_task(end)}
        if followed:
            written = self._settle_with_failure_tasks(schema, statement, parameters, followed)
        else:
            written = execute(self._database.engine, statement, parameters).mappings()
        self._report_followed(schema, written)
        if schema not in self._database.sharded:
            take_free_keys(partial(execute, self._database.engine), schema, pending_without_key(written))
        return {row["id"]: row if is_full else None for row in written}

    def _write_completions(
        self,
        unsettled: Unsettled,
        statement: Executable,
        tasks: list[Claimed],
        arrays: dict[str, Any],
        *,
        is_full: bool,
    ) -> Rows:
        ids = list(map(itemgetter(ID), tasks))
        written = execute(self._database.engine, statement, {"ids": array_text(ids), **arrays})
        if unsettled.is_linked:
            rows = written.mappings()
            self._note_followed(unsettled.schema, [row["id"] for row in rows if row["is_followed"]])
            return {row["id"]: row if is_full else None for row in rows}
        if is_full:
            return {row["id"]: row for row in written.mappings()}
        if written.rowcount == len(ids):
            return dict.fromkeys(ids)  # none was lost, as nearly always: their ids needn't be read
        return dict.fromkeys(id_ for (id_,) in written.fetchall())

    def _note_followed(self, schema: str | None, completed: list[int]) -> None:
        # Most tasks of a graph are followed: the next are written with their edges at once.
        (self.linking.add if completed else self.linking.discard)(schema)
        if completed:
            self._on_followed(schema, completed, [])

    def _settle_with_failure_tasks(
        self,
        schema: str | None,
        statement: Executable,
        parameters: dict[str, Any],
        followed: Mapping[int, AttemptResult],
    ) -> list[dict[str, Any]]:
        """Write settlements, and add the tasks of `on_failure` in the same transaction."""
        engine = self._database.engine
        try:
            with transaction(engine) as send:
                written = send(statement, parameters).mappings()
                failed = [row["id"] for row in written if row["state"] == states.FAILED]
                ends = [followed[task_id] for task_id in failed if task_id in followed]
                queues = add_failure_tasks(partial(_add, send), schema, ends)
        except _NotAdded as error:
            if len(followed) > 1 and is_caused_by_a_row(error.cause):
                raise error.cause from None  # each is written by itself
            # Such as a missing right. The tasks must not stay unsettled because of it.
            logs.failure_task_not_added(followed, error.cause)
            return execute(engine, statement, parameters).mappings()
        if queues:
            with suppress(Exception):  # workers find the tasks at their next poll
                execute(engine, notify(), arrays(has_tasks(schema, queue) for queue in queues))
        return written

    def _report_followed(self, schema: str | None, rows: Iterable[Mapping[Any, Any]]) -> None:
        ended = [row for row in rows if row["is_followed"] and row["state"] in states.FINAL]
        if ended:
            completed = [row["id"] for row in ended if row["state"] == states.COMPLETED]
            failed = [row["id"] for row in ended if row["state"] != states.COMPLETED]
            self._on_followed(schema, completed, failed)


class _NotAdded(Exception):
    """The server has refused a task of `on_failure`."""

    def __init__(self, cause: DatabaseError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _add(send: Transaction, statement: Executable, parameters: Mapping[str, Any]) -> None:
    try:
        send(statement, parameters)
    except DatabaseError as error:
        if is_away(error) or (error.sqlstate or "").startswith(_PASSES):
            raise
        raise _NotAdded(error) from error


_PASSES: Final = ("40", "53", "55", "57")
"""Classes of errors after which the same statement may succeed, such as a lock that was not available."""


@cache
def write_settlements(schema: str | None, *, full: bool, skips_locked: bool = False) -> Executable:
    """Write the settlements of `settlement_arrays` to the tasks of `ids`; return their rows, or a part."""
    tasks = tasks_table(schema)
    part = (tasks.c.id, tasks.c.state, tasks.c.unique_key, tasks.c.held_unique_key, tasks.c.is_followed)
    return settle(schema, skips_locked=skips_locked).returning(*(reported_columns(schema) if full else part))
