"""Claims from the queues of one schema: from all in one statement, unless one of them makes that fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import itemgetter
from typing import NamedTuple

from apoq.schema.statements.claim import ID, PRIORITY, PROCESS_AT, QUEUE
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.claim_log import ClaimLog
from apoq.worker.claiming.claim_statement import ClaimStatement, On, Portions, Row, has_no_response
from apoq.worker.claiming.claimable_queue import ClaimableQueue
from apoq.worker.claiming.placed_claims import MAX_KEYS, PlacedClaims, PlacedTasks
from apoq.worker.claiming.queue_claims import QueueClaims
from apoq.worker.claiming.strays import Strays
from apoq.worker.database import WorkerDatabase
from apoq.worker.places import Places

Others = Callable[[], Iterable[ClaimableQueue]]
"""Returns all queues from which the worker may claim."""


class Taken(NamedTuple):
    """The tasks that a claim has taken from a queue."""

    queue: ClaimableQueue
    number: int
    """Of the claim."""
    rows: list[Row]
    """The tasks, in order."""
    has_more: bool
    """Whether there may be more due tasks in the queue."""
    is_ahead: bool
    """Whether the claim has taken more tasks than there were free slots."""
    sent_at: float
    """When the claim was sent, by time.monotonic()."""
    placed: PlacedTasks | None = None
    """The whole result, if it was a claim under limits."""

    @classmethod
    def under_limits(cls, queue: ClaimableQueue, placed: PlacedTasks, free: int) -> Taken:
        """Return the tasks that a claim under limits has taken for `free` slots."""
        is_ahead = len(placed.rows) > free
        return cls(queue, placed.number, placed.rows, placed.has_more, is_ahead, placed.sent_at, placed)


class SchemaClaims:
    """Claims tasks from the queues of a schema."""

    def __init__(
        self,
        database: WorkerDatabase,
        schema: str | None,
        queues: Iterable[ClaimableQueue],
        claim_log: ClaimLog,
        strays: Strays,
        places: Places,
        breaker: CircuitBreaker[ClaimableQueue],
    ) -> None:
        self._statement = ClaimStatement(database, schema, claim_log, strays)
        self._alone = {queue: QueueClaims(queue, self._statement, strays) for queue in queues}
        self._placed = PlacedClaims(database.engine, schema, self._statement, places)
        self._breaker = breaker

    def claim(
        self, portions: Portions, limit: int, free: int, room: int, on: On, others: Others
    ) -> Iterator[Taken]:
        """Claim up to `limit` tasks for `free` slots; yield what was taken from each queue that was reached.

        Queues whose tasks need places are claimed from one after the other, up to `room` tasks. That takes
        longer, so it comes before the others, whose tasks then begin at once; unless it may leave nothing of
        the `limit`, and one of the others comes first in `portions`.
        """
        placed = {queue: its for queue, its in portions.items() if queue.needs_places}
        plain = {queue: its for queue, its in portions.items() if queue not in placed}
        claims = [partial(self._claim_placed, placed, room), partial(self._claim_plain, plain)]
        if min(room, MAX_KEYS) >= limit and next(iter(portions)) in plain:
            claims.reverse()
        for claim in claims:
            for taken in claim(limit, free, on, others):
                limit -= len(taken.rows)
                free -= len(taken.rows)
                yield taken

    def _claim_plain(
        self, portions: Portions, limit: int, free: int, on: On, others: Others
    ) -> Iterator[Taken]:
        """Claim from all queues together.

        If that fails, each of them claims alone until it succeeds. A queue whose own claim fails is left out
        for a while, unless there are no `others` whose claims succeed.
        """
        if limit <= 0:
            return
        reached: set[ClaimableQueue] = set()
        count = 0
        if len(portions) > 1:
            together = {queue: its for queue, its in portions.items() if not self._alone[queue].is_doubtful}
            for taken in self._claim_together(together, limit, free, on):
                reached.add(taken.queue)
                count += len(taken.rows)
                yield taken
        for queue, portion in portions.items():
            if queue not in reached and count < limit:
                at_most = min(portion, limit - count)
                claim = partial(self._claim_alone, queue, at_most, free - count, on)
                its = self._breaker.call(queue, others(), claim, _nothing(queue))
                count += len(its.rows)
                yield its

    def _claim_placed(
        self, portions: Portions, room: int, limit: int, free: int, _on: On, others: Others
    ) -> Iterator[Taken]:
        limit = min(limit, room)
        for queue, portion in portions.items():
            if limit <= 0:
                return
            claim = partial(self._placed.claim, queue, min(portion, limit), free)
            placed = self._breaker.call(queue, others(), claim, None)
            if placed is None:
                yield _nothing(queue)
                continue
            yield Taken.under_limits(queue, placed, free)
            limit -= len(placed.rows)
            free -= len(placed.rows)

    def _claim_together(self, portions: Portions, limit: int, free: int, on: On) -> list[Taken]:
        try:
            number, rows = self._statement.execute(portions, limit, max(free, 0), on)
        except Exception as error:
            for queue in portions:
                self._alone[queue].doubt(limit if has_no_response(error) else None)
            if has_no_response(error):
                raise
            return []
        of_queue: dict[str, list[Row]] = {}
        for row in rows:
            of_queue.setdefault(row[QUEUE], []).append(row)
        taken = []
        for queue, portion in portions.items():
            its = of_queue.pop(queue.queue.name, [])
            is_last = len(rows) == limit and not of_queue
            has_more = is_last or len(its) == portion
            is_ahead = len(rows) > free
            taken.append(Taken(queue, number, _in_order(its), has_more, is_ahead, self._statement.sent_at))
            if is_last:
                break  # the others were not reached
        return taken

    def _claim_alone(self, queue: ClaimableQueue, limit: int, free: int, on: On) -> Taken:
        number, rows, has_more = self._alone[queue].claim(limit, max(free, 0), on)
        is_ahead = len(rows) > free
        return Taken(queue, number, _in_order(rows), has_more, is_ahead, self._statement.sent_at)


def _nothing(queue: ClaimableQueue) -> Taken:
    return Taken(queue, 0, [], has_more=False, is_ahead=False, sent_at=0.0)


def _in_order(rows: list[Row]) -> list[Row]:
    """Sort tasks of one queue in the order in which they should begin."""
    # In two steps, for which C's functions do; the second leaves each priority in the order of the first.
    rows.sort(key=itemgetter(PROCESS_AT, ID))
    rows.sort(key=itemgetter(PRIORITY), reverse=True)
    return rows
