"""The settlers of a worker: one for tasks that have places, and one for all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from apoq.schema.statements.claim import CLAIM
from apoq.worker.execution.attempt import AnyAttempt, Claimed
from apoq.worker.execution.runner import AttemptResult
from apoq.worker.settling.settler import Settler


class Settlers:
    """Gives each result to its settler.

    The next tasks of a key wait for the places of those that have ended, and should not wait until hundreds
    of other tasks are settled.
    """

    def __init__(self, make: Callable[[str], Settler]) -> None:
        """`make` is called with the name of each settler's thread."""
        self.plain = make("apoq-settler")
        self.of_places = make("apoq-place-settler")

    def __iter__(self) -> Iterator[Settler]:
        return iter((self.plain, self.of_places))

    def put(self, end: AttemptResult) -> None:
        """Settle this attempt soon."""
        self._of(end.attempt.row).put(end)

    def put_overdue(self, attempt: AnyAttempt, thread_id: int) -> None:
        """Settle an attempt that runs longer than its timeout, on this thread."""
        self._of(attempt.row).put_overdue(attempt, thread_id)

    def turn(self) -> None:
        """Write the results that have come until now, on the caller's thread."""
        for settler in self:
            settler.turn()

    def flush(self, patience: float) -> None:
        """Write all results; each settler waits up to `patience` seconds for locked tasks."""
        for settler in self:
            settler.flush(patience)

    def _of(self, row: Claimed) -> Settler:
        return self.of_places if row[CLAIM].is_placed else self.plain
