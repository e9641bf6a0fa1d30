"""Claims from one queue, even if other programs have written invalid values into its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Final
from uuid import UUID

from psycopg import DatabaseError
from sqlalchemy import Engine
from sqlalchemy.pool import PoolProxiedConnection

from apoq.client.queue import Queue
from apoq.core.payload import encode
from apoq.core.registry import Processor, Registry
from apoq.postgres.connections import STATEMENT_TIMEOUT_SECONDS, execute, is_away, is_caused_by_a_row
from apoq.postgres.fast_path import written
from apoq.schema.models import ClaimRow
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import ID, PRIORITY, PROCESS_AT, claim, next_due
from apoq.schema.statements.data import read_data
from apoq.worker import logs
from apoq.worker.claim_log import ClaimLog
from apoq.worker.claiming.cursor import ClaimCursor
from apoq.worker.claiming.strays import Strays
from apoq.worker.execution.attempt import AnyAttempt, longest_data
from apoq.worker.lease import Lease

MAX_CLAIM_SIZE: Final = 1_000
"""Tasks that one statement claims at most."""

NARROWING_FACTOR: Final = 8
"""By what the size of a claim is divided when the server refuses it, until the bad row stands alone."""

MAX_REFUSED: Final = 5
"""Tasks that the server may refuse, one after the other, before the claims are taken to fail as such."""

MAX_TRIES: Final = 20
"""Statements that one claim sends at most, to find the task that the server refuses."""

Row = tuple[Any, ...]


class QueueClaims:
    """Claims tasks of one queue, behind its cursor.

    If the server refuses a claim because of a task, such as one whose values are out of range, the next
    claims are smaller, until that task stands alone. It is passed over for a while, and logged.
    """

    def __init__(
        self,
        engine: Engine,
        queue: Queue,
        cursor: ClaimCursor,
        lease: Lease,
        registry: Registry,
        claim_log: ClaimLog,
        strays: Strays,
    ) -> None:
        self._engine = engine
        self.queue = queue
        self.cursor = cursor
        self.lease = lease
        self._registry = registry
        self._claim_log = claim_log
        self._strays = strays
        self.processors: Mapping[str, Processor] = {}
        """Those of the last claim."""
        self._by_worker: UUID | None = None
        self._parameters: dict[str, str] = {}
        self._at_most = MAX_CLAIM_SIZE
        """Fewer after a claim that the server has refused."""
        self._refused = 0
        """How many tasks the server has refused since a claim last found any."""
        self._refusal: DatabaseError | None = None
        """The last of these errors."""
        self._is_bare = False
        """Whether the next claim leaves out all data, because the server can't write some of it as text."""

    def __repr__(self) -> str:
        return f"the claim from {self.queue!r}"

    def claim(self, limit: int, free: int, where: Engine | PoolProxiedConnection) -> tuple[int, list[Row]]:
        """Claim up to `limit` tasks for `free` slots; return the claim's number, and the tasks in order."""
        processors = self._registry.of(self.queue)
        if not processors:
            return 0, []
        # The registry returns another mapping as soon as there is one more processor.
        if self.processors is not processors or self._by_worker is not self._strays.worker_id:
            self.processors, self._by_worker = processors, self._strays.worker_id
            self._parameters = written(
                {"from_queue": self.queue.name, "by_worker": self._by_worker, **workable(processors)}
            )
        number, rows = self._claim_narrowly(limit, max(free, 0), where)
        # In two steps, for which C's functions do; the second leaves each priority in the order of the first.
        rows.sort(key=itemgetter(PROCESS_AT, ID))
        rows.sort(key=itemgetter(PRIORITY), reverse=True)
        return number, rows

    def fetch(self, attempt: AnyAttempt) -> list[Row]:
        """Read the data of a task that is too large for the result of its claim."""
        parameters = {
            "task_id": attempt.id,
            "held_under": attempt.claim_token,
            "longest_data": longest_data(self.queue),
        }
        return execute(self._engine, read_data(self.queue.schema), parameters).fetchall()

    def _claim_narrowly(
        self, limit: int, free: int, where: Engine | PoolProxiedConnection
    ) -> tuple[int, list[Row]]:
        """Claim; if the server refuses that, claim less, until the bad task is passed over."""
        for _ in range(MAX_TRIES):
            at_most = min(limit, self._at_most)
            try:
                number, rows = self._execute(at_most, free, where)
            except DatabaseError as error:
                # The note is written by the same statement, and is not the row of a task.
                is_of_note = error.diag.table_name == ClaimRow.__tablename__
                if is_of_note or not is_caused_by_a_row(error):
                    raise
                if self._is_bare:
                    self._narrow(at_most, free, error)
                self._is_bare = True
                continue
            self._at_most, self._is_bare = min(MAX_CLAIM_SIZE, 2 * self._at_most), False
            if rows or not self.cursor.passed_over():
                self._refused = 0
            elif self._refused > MAX_REFUSED and self._refusal is not None:
                raise self._refusal  # although others may be claimable, all claims fail as long as it does
            return number, rows
        raise self._refusal or RuntimeError(f"tasks of {self.queue!r} can't be claimed")

    def _narrow(self, at_most: int, free: int, error: DatabaseError) -> None:
        """Claim less the next time, or pass over the next task; raise the error if neither helps."""
        if at_most > 1:
            self._at_most = at_most // NARROWING_FACTOR or 1
            return
        self._strays.release()  # if it was the result that couldn't be read
        self._execute(0, free, self._engine)  # which fails if it isn't because of a task
        parameters = self._asked(1, free)
        due = next_due(self.queue.schema, **_form(parameters))
        for (task_id,) in execute(self._engine, due, parameters):
            logs.task_passed_over(task_id, self.cursor.pass_over(task_id), error)
            self._refused, self._refusal = self._refused + 1, error
            if self._refused > MAX_REFUSED:
                raise error

    def _execute(
        self, at_most: int, free: int, where: Engine | PoolProxiedConnection
    ) -> tuple[int, list[Row]]:
        parameters = self._asked(at_most, free)
        statement = claim(self.queue.schema, **_form(parameters), bare=self._is_bare)
        number = self._claim_log.begin(self.queue.schema)
        try:
            rows = execute(where, statement, parameters | {"number": number}).fetchall()
        except BaseException as error:
            self._claim_log.failed(number)
            # Without a response, it may have committed, or may do so until the server ends it. With one that
            # can't be read, it has.
            if not isinstance(error, DatabaseError) or is_away(error):
                self._strays.expect(STATEMENT_TIMEOUT_SECONDS)
                # It may have asked for more than the server can do in time.
                self._at_most, self._is_bare = max(1, at_most // NARROWING_FACTOR), True
            elif error.sqlstate is None:
                self._strays.expect()
            raise
        self._claim_log.claimed(number, len(rows))
        return number, rows

    def _asked(self, at_most: int, free: int) -> dict[str, Any]:
        parameters = {**self._parameters, **self.cursor.parameters(), "at_most": at_most}
        if at_most > free:
            parameters["free"] = free
        if passed_over := self.cursor.passed_over():
            parameters["passed_over"] = array_text(passed_over)
        return parameters


def _form(parameters: Mapping[str, object]) -> dict[str, bool]:
    """Return which form of `claim` takes these parameters."""
    return {
        "ahead": "free" in parameters,
        "passes_over": "passed_over" in parameters,
        "overflows": "lower_than" in parameters,
    }


def workable(processors: Mapping[str, Processor]) -> dict[str, Any]:
    """Return which tasks may be claimed for these processors, as parameters of `claim`."""
    limits = {type_: processor.policy.limit for type_, processor in processors.items()}
    return {"of_types": list(processors), "retry_limits": encode(limits)}
