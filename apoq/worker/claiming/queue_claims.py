"""Claims from one queue, even if other programs have written invalid values into its tasks."""

from __future__ import annotations

from typing import Final

from psycopg import DatabaseError

from apoq.postgres.connections import is_caused_by_a_row
from apoq.schema.tables import ClaimRow
from apoq.worker import logs
from apoq.worker.claiming.claim_statement import ClaimStatement, On, Row, has_no_response
from apoq.worker.claiming.claimable_queue import ClaimableQueue
from apoq.worker.claiming.strays import Strays

MAX_CLAIM_SIZE: Final = 1_000
"""Tasks that one statement claims at most."""

NARROWING_FACTOR: Final = 8
"""By what the size of a claim is divided when the server refuses it, until the bad row stands alone."""

MAX_REFUSED: Final = 5
"""Tasks that the server may refuse, one after the other, before the claims are taken to fail as such."""

MAX_TRIES: Final = 20
"""Statements that one claim sends at most, to find the task that the server refuses."""


class QueueClaims:
    """Claims tasks of one queue with statements of its own.

    If the server refuses a claim because of a task, such as one whose values are out of range, the next
    claims are smaller, until that task stands alone. It is passed over for a while, and logged.
    """

    def __init__(self, queue: ClaimableQueue, statement: ClaimStatement, strays: Strays) -> None:
        self._queue = queue
        self._statement = statement
        self._strays = strays
        self.is_doubtful = False
        """Whether its next claim may fail, and must not be one together with other queues."""
        self._at_most = MAX_CLAIM_SIZE
        """Fewer after a claim that the server has refused."""
        self._refused = 0
        """How many tasks the server has refused since a claim last found any."""
        self._refusal: DatabaseError | None = None
        """The last of these errors."""
        self._is_bare = False
        """Whether the next claim leaves out all data, because the server can't write some of it as text."""

    def doubt(self, at_most: int | None = None) -> None:
        """Note that a claim with this queue failed; of how many tasks, if there was no response.

        Then the next one is smaller: it may have been too much to do in time.
        """
        self.is_doubtful = True
        if at_most is not None:
            self._at_most, self._is_bare = max(1, at_most // NARROWING_FACTOR), True

    def claim(self, limit: int, free: int, on: On) -> tuple[int, list[Row], bool]:
        """Claim up to `limit` tasks; return the claim's number, the tasks, and whether there may be more."""
        for _ in range(MAX_TRIES):
            at_most = min(limit, self._at_most)
            try:
                number, rows = self._execute(at_most, free, on)
            except DatabaseError as error:
                # The note is written by the same statement, and is not the row of a task.
                is_of_note = error.diag.table_name == ClaimRow.__tablename__
                if is_of_note or not is_caused_by_a_row(error):
                    raise
                if self._is_bare:
                    self._narrow_down(at_most, free, error)
                self._is_bare = True
                continue
            self._at_most, self._is_bare = min(MAX_CLAIM_SIZE, 2 * self._at_most), False
            self.is_doubtful = self._at_most < MAX_CLAIM_SIZE
            if rows or not self._queue.cursor.passed_over():
                self._refused = 0
            elif self._refused > MAX_REFUSED and self._refusal is not None:
                raise self._refusal  # although others may be claimable, all claims fail as long as it does
            return number, rows, len(rows) == at_most
        raise self._refusal or RuntimeError(f"tasks of {self._queue!r} can't be claimed")

    def _narrow_down(self, at_most: int, free: int, error: DatabaseError) -> None:
        """Claim less the next time, or pass over the next task; raise the error if neither helps."""
        if at_most > 1:
            self._at_most = at_most // NARROWING_FACTOR or 1
            return
        self._strays.release()  # if it was the result that couldn't be read
        self._execute(0, free, None)  # which fails if it isn't because of a task
        for task_id in self._statement.next_due(self._queue, free):
            logs.task_passed_over(task_id, self._queue.cursor.pass_over(task_id), error)
            self._refused, self._refusal = self._refused + 1, error
            if self._refused > MAX_REFUSED:
                raise error

    def _execute(self, at_most: int, free: int, on: On) -> tuple[int, list[Row]]:
        try:
            return self._statement.execute({self._queue: at_most}, at_most, free, on, bare=self._is_bare)
        except BaseException as error:
            self.doubt(at_most if has_no_response(error) else None)
            raise
