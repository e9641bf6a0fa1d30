"""Sends claims, and remembers them in the claim log."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from psycopg import DatabaseError
from psycopg.errors import FeatureNotSupported
from sqlalchemy import Executable
from sqlalchemy.pool import PoolProxiedConnection

from apoq.postgres.connections import (
    STATEMENT_TIMEOUT_SECONDS,
    Sent,
    Transaction,
    execute,
    is_away,
    transaction,
)
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import DATA, ID, META, claim, next_due
from apoq.schema.statements.data import read_short_data
from apoq.schema.statements.notes import note_tasks
from apoq.schema.statements.queues import queues_text, retry_limits_text
from apoq.worker.claim_log import ClaimLog
from apoq.worker.claiming.claimable_queue import ClaimableQueue
from apoq.worker.claiming.strays import Strays
from apoq.worker.database import WorkerDatabase

Row = tuple[Any, ...]
Portions = Mapping[ClaimableQueue, int]
"""How many tasks to claim from each queue at most, in this order."""
Form = dict[str, bool]
"""The options of `claim`."""
On = PoolProxiedConnection | None
"""The connection on which to send a statement; None: one of the pool."""


class ClaimStatement:
    """Claims from several queues of one schema at once."""

    def __init__(
        self,
        database: WorkerDatabase,
        schema: str | None,
        claim_log: ClaimLog,
        strays: Strays,
    ) -> None:
        self._engine = database.engine
        self._schema = schema
        self._claim_log = claim_log
        self._strays = strays
        self._sharded = database.sharded
        self.sent_at = 0.0
        """When the last claim was sent, by time.monotonic()."""

    def execute(
        self, portions: Portions, at_most: int, free: int, on: On, *, bare: bool = False
    ) -> tuple[int, list[Row]]:
        """Claim up to `at_most` tasks for `free` slots; return the claim's number and the unordered tasks."""
        form, parameters = self.form_and_parameters(portions, at_most, free)
        return self.record(lambda of_claim: self._claim(form, parameters | of_claim, on, bare=bare))

    def record(self, claim: Callable[[dict[str, Any]], list[Row]]) -> tuple[int, list[Row]]:
        """Call a function that claims tasks; return the claim's number and the tasks.

        It is given the parameters with which it records the claim.
        """
        number = self._claim_log.begin(self._schema)
        self.sent_at = time.monotonic()
        try:
            rows = claim({"number": number, "by_worker": self._strays.worker_id})
        except BaseException as error:
            self._claim_log.failed(number)
            # Without a response, it may have committed, or may do so until the server ends it. With one that
            # can't be read, it has.
            if has_no_response(error):
                self._strays.expect(STATEMENT_TIMEOUT_SECONDS)
            elif isinstance(error, DatabaseError) and error.sqlstate is None:
                self._strays.expect()
            raise
        self._claim_log.claimed(number, len(rows))
        return number, rows

    def _claim(self, form: Form, parameters: dict[str, Any], on: On, *, bare: bool) -> list[Row]:
        if self._schema not in self._sharded:
            statement = claim(self._schema, **form, bare=bare)
            self.sent_at = time.monotonic()
            try:
                return execute(on or self._engine, statement, parameters).fetchall()
            except FeatureNotSupported:
                pass  # Citus shards the schema, perhaps since a moment ago
        self.sent_at = time.monotonic()
        with transaction(self._engine, timeout=STATEMENT_TIMEOUT_SECONDS) as send:
            first = claim(self._schema, **form, bare=True, noted=False)
            rows = self._send_in_parts(send, first, parameters, bare=bare)
        self._sharded.add(self._schema)
        return rows

    def end_with(
        self,
        send: Transaction,
        take: Callable[..., Executable],
        parameters: dict[str, Any],
        *others: Sent,
    ) -> list[Row]:
        """Execute a statement that claims tasks, and others, and commit; return the tasks."""
        if self._schema in self._sharded:
            first = take(self._schema, bare=True, noted=False)
            rows = self._send_in_parts(send, first, parameters, bare=False)
            send.together(*others, commits=True)
            return rows
        taken, *_ = send.together((take(self._schema), parameters), *others, commits=True)
        return taken.fetchall()

    def _send_in_parts(
        self, send: Transaction, first: Executable, parameters: dict[str, Any], *, bare: bool
    ) -> list[Row]:
        """Claim in several statements of a transaction, each of which writes to one table.

        Citus accepts these, but not the statement that does everything at once.
        """
        rows = send(first, parameters).fetchall()
        if not rows:
            return rows
        ids = {"ids": array_text(row[ID] for row in rows)}
        send(note_tasks(self._schema), parameters | ids)
        if bare:
            return rows
        data = {task_id: its for task_id, *its in send(read_short_data(self._schema), ids)}
        for number, row in enumerate(rows):
            filled = list(row)
            filled[DATA], filled[META] = data[row[ID]]
            rows[number] = tuple(filled)
        return rows

    def next_due(self, queue: ClaimableQueue, free: int) -> list[int]:
        """Return the id of the task that a claim of a single task of this queue would take, if any."""
        form, parameters = self.form_and_parameters({queue: 1}, 1, free)
        statement = next_due(self._schema, **form)
        return [task_id for (task_id,) in execute(self._engine, statement, parameters)]

    def form_and_parameters(
        self, portions: Portions, at_most: int, free: int, types: Collection[str] | None = None
    ) -> tuple[Form, dict[str, Any]]:
        """Return the form of `claim`, and its parameters, for up to `at_most` tasks and `free` slots.

        Of all types of the queues, or only of those among `types`.
        """
        parameters: dict[str, Any] = {
            "queues": queues_text(*(queue.text(portion, types) for queue, portion in portions.items())),
            "retry_limits": self.retry_limits(portions),
            "at_most": at_most,
        }
        if at_most > free:
            parameters["free"] = free
        if passed_over := [task_id for queue in portions for task_id in queue.cursor.passed_over()]:
            parameters["passed_over"] = array_text(passed_over)
        return _form(parameters, portions), parameters

    def retry_limits(self, queues: Iterable[ClaimableQueue]) -> str:
        """Return the retry limits of these queues, as a statement is given them."""
        return retry_limits_text(*(queue.limits_text for queue in queues))


def has_no_response(error: BaseException) -> bool:
    """Return whether a statement failed without a response, so that it may have been executed."""
    return not isinstance(error, DatabaseError) or is_away(error)


def _form(parameters: Mapping[str, object], portions: Portions) -> Form:
    """Return which form of `claim` takes these parameters."""
    return {
        "ahead": "free" in parameters,
        "passes_over": "passed_over" in parameters,
        "overflows": any(queue.cursor.lower_than is not None for queue in portions),
    }
