"""Claims due tasks for the slots, as many as they can start soon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, Final
from uuid import UUID

from psycopg import DatabaseError
from sqlalchemy import Engine
from sqlalchemy.pool import PoolProxiedConnection

from apoq.client.queue import Queue
from apoq.core.outcomes import WorkerDied
from apoq.core.payload import encode
from apoq.core.registry import Processor, Registry
from apoq.events import Events, TaskClaimed, TaskCompleted, TaskStarted
from apoq.postgres.connections import STATEMENT_TIMEOUT_SECONDS, execute, is_away, is_caused_by_a_row
from apoq.postgres.fast_path import written
from apoq.schema.models import ClaimRow
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import CLAIM, FAIL_COUNT, ID, PRIORITY, PROCESS_AT, claim, next_due
from apoq.schema.statements.data import read_data
from apoq.schema.statements.notes import forget_settled
from apoq.schema.statements.recover import forget_unknown, give_back
from apoq.worker import logs, reports
from apoq.worker.claim_log import ClaimLog
from apoq.worker.claiming.cursor import ClaimCursor
from apoq.worker.claiming.scanner import QueueScanner
from apoq.worker.execution.attempt import AnyAttempt, Claim, Claimed, StopSignal, longest_data
from apoq.worker.execution.executor import Executor, released
from apoq.worker.execution.runner import AttemptResult, ended
from apoq.worker.failures import Outage
from apoq.worker.isolation import Isolation
from apoq.worker.lease import Lease
from apoq.worker.service import Service

MAX_CLAIM_SIZE: Final = 1_000
"""Tasks that one statement claims at most."""

MAX_PREFETCHED: Final = 2_000
"""Tasks that are claimed at most beyond those that run."""

PREFETCH_SECONDS: Final = 0.25
"""Seconds of work that are claimed ahead: what the slots start within them."""

REST_FACTOR: Final = 5
"""How many times as long as it took a claim that came short it is to the next: so they are few."""

MAX_REST_SECONDS: Final = 0.02
"""Seconds to it, at most: as long as a busy client's notification is late."""

LEASE_POLL_SECONDS: Final = 0.1
"""Seconds after which a claimer whose lease has ended looks whether it is renewed."""

GIVE_BACK_AFTER_SECONDS: Final = 2.0
"""Seconds after which a task that has not begun is given back, for others may have a free slot."""

STRAYS_POLL_SECONDS: Final = 1.0
"""Seconds after which it is looked again for what a claim has taken whose answer was lost."""

NARROWING_FACTOR: Final = 8
"""By what the size of a claim is divided when the server refuses it, until the bad row stands alone."""

MAX_REFUSED: Final = 5
"""Tasks that the server may refuse, one after the other, before the claims are taken to fail as such."""

MAX_TRIES: Final = 20
"""Claims that one turn sends at most, to find what the server refuses."""


def ahead(concurrency: int, run_time: float | None) -> int:
    """Answer how many tasks to claim beyond those that run, if one takes `run_time` seconds.

    Short ones by the hundred; none of those that would wait longer than `PREFETCH_SECONDS` for a slot, nor of
    tasks of which nothing is known yet: what sits here claimed, another worker can't begin.
    """
    if run_time is None:
        return 0
    return min(MAX_PREFETCHED, int(concurrency * PREFETCH_SECONDS / max(run_time, 1e-6)))


@dataclass(slots=True, eq=False)
class _Source:
    """A queue that is claimed from, and what a claim from it asks each time."""

    queue: Queue
    position: ClaimCursor
    lease: Lease
    processors: Mapping[str, Processor] = field(default_factory=dict)
    by_worker: UUID | None = None
    asked: dict[str, str] = field(default_factory=dict)
    at_most: int = MAX_CLAIM_SIZE
    """Fewer after a claim that the server has refused."""
    refused: int = 0
    """How many tasks the server has refused since a claim last found any."""
    refusal: DatabaseError | None = None
    """The last of these."""
    is_bare: bool = False
    """Whether the next claim leaves out all data, because the server could not write some of it as text."""


class Claimer(Service):
    """Keeps the slots busy: one statement claims tasks for all, and commits before any of them begins."""

    def __init__(
        self,
        engine: Engine,
        queues: tuple[Queue, ...],
        registry: Registry,
        executor: Executor,
        claim_log: ClaimLog,
        outage: Outage,
        events: Events,
        scanner: QueueScanner,
        *,
        positions: dict[Queue, ClaimCursor],
        leases: Mapping[str | None, Lease],
        signals: Mapping[str | None, StopSignal],
        on_ended: Callable[[AttemptResult], None],
    ) -> None:
        """`on_ended` is called with the results of tasks that end without having run."""
        super().__init__("apoq-claimer", outage)
        self._engine = engine
        self._sources = [_Source(queue, positions[queue], leases[queue.schema]) for queue in queues]
        self._leases = leases
        self._signals = signals
        self._claiming: Isolation[_Source] = Isolation(
            lambda source: f"the claim from {source.queue!r}", outage
        )
        self._tidying: Isolation[str | None] = Isolation(_describe_tidying, outage)
        self._registry = registry
        self._events = events
        self._executor = executor
        self._scanner = scanner
        self._on_ended = on_ended
        self.worker_id = UUID(int=0)
        self._moves: list[tuple[ClaimCursor, list[tuple[Any, ...]], bool]] = []
        self._claim_log = claim_log
        self._waits_for_room = True
        """Whether a slot that becomes free is a reason to take a turn."""
        self._lock = threading.Lock()
        self._doubt_ends: float | None = None
        self._looked_at = 0.0
        self._must_look = True
        self._rested_at = 0.0

    def look_for_tasks(self) -> None:
        """Claim now, even if the last claim found nothing."""
        self._must_look = True
        self.wake()

    def notified(self, connection: PoolProxiedConnection | None) -> None:
        """Claim now, on the caller's thread, and on this connection if one is given.

        That is the connection that received the notification: its session is awake, and any other would have
        to wake up first.
        """
        self._must_look = True
        self.take_turn(partial(self.turn, connection))

    def slot_is_free(self) -> None:
        """Claim now if the last turn found too few free slots."""
        if self._waits_for_room:
            self.wake()

    def look_for_strays(self, seconds: float = 0.0) -> None:
        """Release the tasks of claims whose results were lost; one may commit within so many seconds."""
        self._doubt_ends = max(self._doubt_ends or 0.0, time.monotonic() + seconds)

    def turn(self, connection: PoolProxiedConnection | None = None) -> float | None:
        """Claim what the slots have room for; return when to look again.

        On one of the engine's connections, if the caller has that in hand.
        """
        # Before looking at the room, or else a slot that is freed meanwhile would wake nothing.
        self._waits_for_room = True
        pause = self._give_back_overdue()
        if self._doubt_ends is not None:
            pause = STRAYS_POLL_SECONDS  # it may commit at any time, and nothing would tell
            if time.monotonic() >= self._looked_at + STRAYS_POLL_SECONDS:
                with self._lock:
                    self._give_back_strays()
                self._must_look = True
        if not self._must_look:
            self._waits_for_room = False
            return pause
        if not any(source.lease.is_held for source in self._sources):
            return LEASE_POLL_SECONDS
        is_careful = any(source.position.is_careful for source in self._sources)
        in_line = 0 if is_careful else ahead(self._executor.concurrency, self._executor.run_time)
        self._executor.low_water = in_line // 2
        room = self._executor.concurrency + in_line - self._executor.load
        free = self._executor.free
        if room < 1 or (free == 0 and room <= in_line // 2):
            return pause  # woken when there is more room
        began = time.monotonic()
        if began < self._rested_at:
            self._waits_for_room = False
            return self._rested_at - began
        self._must_look = False
        wanted = min(room, MAX_CLAIM_SIZE)
        claimed = self.claim(wanted, free, connection)
        self._executor.put(self._startable(claimed))
        self._move()
        self._scanner.claimed(len(claimed), wanted)
        if len(claimed) == wanted:
            self._must_look = True
        else:
            took = time.monotonic() - began
            self._rested_at = began + min(MAX_REST_SECONDS, REST_FACTOR * took)
        self._forget_settled(connection)
        return 0.0

    def claim_one(self) -> AnyAttempt | None:
        """Claim a single task, and return the attempt that the caller is to run."""
        self._forget_settled()
        while claimed := self.claim(1, 1):
            self._move()
            for task in self._startable(claimed):
                return self._executor.attempt_of(task)
        return None

    def claim(self, limit: int, free: int, connection: PoolProxiedConnection | None = None) -> list[Claimed]:
        """Claim up to `limit` tasks, while `free` slots have nothing to do.

        One queue whose claim fails is passed over for a while. Raises its error if it fails for all of them,
        unless an earlier one has given some: these are to run.
        """
        tasks: list[Claimed] = []
        where = connection or self._engine

        with self._lock:
            try:
                self._give_back_strays()
                sources = [source for source in self._rotated() if source.lease.is_held]
                for source in sources:
                    if len(tasks) < limit:
                        left = limit - len(tasks), free - len(tasks)
                        claim_from = partial(self._claim_from, source, *left, where)
                        tasks += self._claiming.call(source, sources, claim_from, [])
            except BaseException:
                self._must_look = True
                if not tasks:
                    raise
        return tasks

    def _startable(self, tasks: list[Claimed]) -> Iterator[Claimed]:
        for row in tasks:
            if row[FAIL_COUNT]:
                attempt = self._executor.attempt_of(row)
                if not may_begin(attempt):
                    self._on_ended(ended(attempt, WorkerDied(WorkerDied.__doc__)))
                    continue
            yield row

    def _claim_from(
        self, source: _Source, limit: int, free: int, where: Engine | PoolProxiedConnection
    ) -> list[Claimed]:
        queue = source.queue
        processors = self._registry.of(queue)
        if not processors:
            return []
        # Another mapping, as soon as there is one more.
        if source.processors is not processors or source.by_worker is not self.worker_id:
            source.processors, source.by_worker = processors, self.worker_id
            source.asked = written(
                {
                    "from_queue": queue.name,
                    "by_worker": self.worker_id,
                    **workable(processors),
                }
            )
        number, rows = self._narrowly(source, limit, max(free, 0), where)
        # In two steps, for which C's functions do; the second leaves each priority in the order of the first.
        rows.sort(key=itemgetter(PROCESS_AT, ID))
        rows.sort(key=itemgetter(PRIORITY), reverse=True)
        batch = Claim(
            queue,
            processors,
            time.monotonic(),
            source.lease,
            self._signals[queue.schema],
            self._fetch,
            number,
            self._report_start if self._is_followed() else None,
            is_ahead=len(rows) > free,
        )
        if rows:
            self._moves.append((source.position, rows, len(rows) < limit))
        tasks: list[Claimed] = [(*row, batch) for row in rows]
        self._claim_log.hold(tasks)
        if self._events.heard(TaskClaimed):
            for task in tasks:
                self._events.report(reports.claimed(task))
        return tasks

    def _is_followed(self) -> bool:
        """Return whether anybody wants to know of each task that begins, or how long it takes."""
        return self._events.heard(TaskStarted) or self._events.heard(TaskCompleted)

    def _report_start(self, row: Claimed) -> None:
        if self._events.heard(TaskStarted):
            self._events.report(reports.started(row))

    def _narrowly(
        self, source: _Source, limit: int, free: int, where: Engine | PoolProxiedConnection
    ) -> tuple[int, list[tuple[Any, ...]]]:
        """Claim from a queue; if the server refuses that, claim less, until the bad row is passed over."""
        for _ in range(MAX_TRIES):
            at_most = min(limit, source.at_most)
            try:
                number, rows = self._execute(source, at_most, free, where)
            except DatabaseError as error:
                # The note of a claim is written with it, and is no task's row.
                is_of_note = error.diag.table_name == ClaimRow.__tablename__
                if is_of_note or not is_caused_by_a_row(error):
                    raise
                if source.is_bare:
                    self._narrow(source, at_most, free, error)
                source.is_bare = True
                continue
            source.at_most, source.is_bare = min(MAX_CLAIM_SIZE, 2 * source.at_most), False
            if rows or not source.position.passed_over():
                source.refused = 0
            elif source.refused > MAX_REFUSED and source.refusal is not None:
                raise source.refusal  # whatever it finds
            return number, rows
        raise source.refusal or RuntimeError(f"tasks of {source.queue!r} can't be claimed")

    def _narrow(self, source: _Source, at_most: int, free: int, error: DatabaseError) -> None:
        """Claim less the next time, or pass over the next task; raise the error if neither helps."""
        if at_most > 1:
            source.at_most = at_most // NARROWING_FACTOR or 1
            return
        self._give_back_strays()  # if it was the answer that couldn't be read
        self._execute(source, 0, free, self._engine)  # which fails if it isn't because of a task
        parameters = self._parameters(source, 1, free)
        due = next_due(source.queue.schema, **_kind(parameters))
        for (task_id,) in execute(self._engine, due, parameters):
            seconds = source.position.pass_over(task_id)
            logs.task_passed_over(task_id, seconds, error)
            source.refused, source.refusal = source.refused + 1, error
            if source.refused > MAX_REFUSED:
                raise error

    def _execute(
        self,
        source: _Source,
        at_most: int,
        free: int,
        where: Engine | PoolProxiedConnection,
    ) -> tuple[int, list[tuple[Any, ...]]]:
        schema = source.queue.schema
        parameters = self._parameters(source, at_most, free)
        statement = claim(schema, **_kind(parameters), bare=source.is_bare)
        number = self._claim_log.begin(schema)
        try:
            rows = execute(where, statement, parameters | {"number": number}).fetchall()
        except BaseException as error:
            self._claim_log.failed(number)
            # Without an answer, it may have committed, or may do so until the server ends it. With one that
            # can't be read, it has.
            if not isinstance(error, DatabaseError) or is_away(error):
                self.look_for_strays(STATEMENT_TIMEOUT_SECONDS)
                # It may have asked for more than the server can do in time.
                source.at_most, source.is_bare = max(1, at_most // NARROWING_FACTOR), True
            elif error.sqlstate is None:
                self.look_for_strays()
            raise
        self._claim_log.claimed(number, len(rows))
        return number, rows

    @staticmethod
    def _parameters(source: _Source, at_most: int, free: int) -> dict[str, Any]:
        parameters = {**source.asked, **source.position.parameters(), "at_most": at_most}
        if at_most > free:
            parameters["free"] = free
        if passed_over := source.position.passed_over():
            parameters["passed_over"] = array_text(passed_over)
        return parameters

    def _fetch(self, attempt: AnyAttempt) -> list[tuple[Any, ...]]:
        """Read the data of a task that is too large for its claim's answer."""
        queue = attempt.from_queue
        parameters = {
            "task_id": attempt.id,
            "held_under": attempt.claim_token,
            "longest_data": longest_data(queue),
        }
        return execute(self._engine, read_data(queue.schema), parameters).fetchall()

    def _move(self) -> None:
        """Move the positions behind what was claimed: at once, but for the tasks, which begin before."""
        with self._lock:
            moves, self._moves = self._moves, []
        for position, rows, is_all in moves:
            position.claimed(rows, is_all=is_all)

    def _forget_settled(self, connection: PoolProxiedConnection | None = None) -> None:
        """Delete the notes that are no longer needed, some time: no task waits for that."""
        for schema in self._schemas():
            if done := self._claim_log.done(schema):
                forget = partial(self._forget, schema, done, connection or self._engine)
                self._tidying.call(schema, self._schemas(), forget, None)

    def _forget(self, schema: str | None, done: list[int], where: Engine | PoolProxiedConnection) -> None:
        parameters = {"by_worker": self.worker_id, "done": array_text(done)}
        execute(where, forget_settled(schema), parameters)
        self._claim_log.forgotten(schema, done)

    def _schemas(self) -> list[str | None]:
        return [schema for schema, lease in self._leases.items() if lease.is_held]

    def _rotated(self) -> list[_Source]:
        # Each queue comes first in its turn, so that none starves behind a full one.
        if len(self._sources) > 1:
            self._sources = [*self._sources[1:], self._sources[0]]
        return self._sources

    def _give_back_strays(self) -> None:
        """Give back what an earlier claim took, if it committed although its answer was lost.

        Each time until none can come late, because the server may only have been slow, and none is left.
        """
        if self._doubt_ends is None:
            return
        self._looked_at = time.monotonic()
        schemas = self._schemas()
        is_over = bool(schemas) and self._looked_at >= self._doubt_ends
        for schema in schemas:
            is_over &= self._tidying.call(schema, schemas, partial(self._give_back, schema), True)
        if is_over:
            self._doubt_ends = None

    def _give_back(self, schema: str | None) -> bool:
        """Give back what strays there are in a schema; return whether none is left."""
        held = [row[ID] for row in self._claim_log.held() if row[CLAIM].from_queue.schema == schema]
        parameters = {
            "by_worker": self.worker_id,
            "known": array_text(self._claim_log.known(schema)),
            "held": array_text(held),
        }
        ((left,),) = execute(self._engine, give_back(schema), parameters)
        execute(self._engine, forget_unknown(schema), parameters)
        return not left

    def _give_back_overdue(self) -> float | None:
        """Return when to look again, if any are in line that may become overdue."""
        since = self._executor.waiting_since
        if since is None:
            return None
        if time.monotonic() - since < GIVE_BACK_AFTER_SECONDS:
            return GIVE_BACK_AFTER_SECONDS
        for attempt in self._executor.take_back():
            self._on_ended(released(attempt))
        # The average speaks of shorter tasks than those that run now.
        self._executor.run_time = max(self._executor.run_time or 0.0, GIVE_BACK_AFTER_SECONDS)
        return None


def _describe_tidying(schema: str | None) -> str:
    return "tidying up the worker's claims" + ("" if schema is None else f" in the schema {schema!r}")


def _kind(parameters: Mapping[str, object]) -> dict[str, bool]:
    """Return which form of `claim` takes these parameters."""
    return {
        "ahead": "free" in parameters,
        "passes_over": "passed_over" in parameters,
        "overflows": "lower_than" in parameters,
    }


def workable(processors: Mapping[str, Processor]) -> dict[str, Any]:
    """Return what may be claimed for these, as `claim` takes it."""
    limits = {type_: processor.policy.limit for type_, processor in processors.items()}
    return {"of_types": list(processors), "retry_limits": encode(limits)}


def may_begin(attempt: AnyAttempt) -> bool:
    """Return whether an attempt may begin: a rescued task may have used up its attempts."""
    return not attempt.fail_count or attempt.fail_count <= attempt.policy.limit
