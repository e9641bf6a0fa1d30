"""Whatever workers do, and in whatever order: the real statements on a real database, beside a model.

Hypothesis chooses what happens next; after each step every row has to be as the model says. Nobody waits for
anything: the hours that pass are taken from every time that stands in the database.

`python -m pytest --hypothesis-profile thorough tests/test_model.py` plays thousands, each time others.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, ClassVar, Literal
from uuid import UUID

import probe
import pytest
import sqlalchemy as sa
from claims import AHEAD, asked, database_of, looked_into, surveyed
from drawn import drawn, is_thorough
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.orm import Session

from apoq import Cancel, Queue, Retry, RunningTask, Snooze, Task, Worker
from apoq.core.outcomes import Release, Settlement, WorkerDied
from apoq.core.payload import encode
from apoq.core.registry import make_processor
from apoq.core.states import CANCELLED, COMPLETED, FAILED, PENDING, RUNNING
from apoq.events import Events
from apoq.postgres.connections import execute, own_engine
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import ID, PRIORITY, PROCESS_AT, TYPE, claim
from apoq.schema.statements.heartbeat import beat, beat_and_look, forget, leave
from apoq.schema.statements.notes import forget_settled
from apoq.schema.statements.prune import prune_completed, prune_failed
from apoq.schema.statements.recover import forget_dead, forget_unknown, give_back, rescue
from apoq.schema.statements.survey import survey
from apoq.worker import claim_log
from apoq.worker.claim_log import ClaimLog
from apoq.worker.claiming.cursor import ClaimCursor
from apoq.worker.execution.attempt import Attempt as WorkerAttempt
from apoq.worker.execution.attempt import Claim, Claimed, StopSignal
from apoq.worker.execution.completion import Completion
from apoq.worker.execution.runner import AttemptResult, TaskLost, ended
from apoq.worker.execution.task_sessions import TaskSession
from apoq.worker.lease import Lease
from apoq.worker.liveness.peers import Peer
from apoq.worker.places import Places
from apoq.worker.settling import counters
from apoq.worker.settling.settler import Settler

pytestmark = pytest.mark.slow

HOUR = 3600
LEASE = 3
GRACE = 1
"""For so long a worker lives whose connection is gone."""
RETENTION = 24
"""In hours, as are all times of the model: the seconds that a history takes are nothing to them."""

QUEUES = (Queue(), Queue("other"))
PRIORITIES = (-1, 0, 5)
MOST_OPEN = 10
"""Transactions that are open at once, at most: each has a connection, and a pool has fifteen."""
LIMITS = {"a": 1, "b": 0, "c": 2}
"""The types of tasks, and how often each is retried."""

EVERYTHING = sa.text("""
    SELECT id, queue, type, priority, state, attempt, fail_count, claim_token, worker_id,
        error->>'class' AS error,
        completed_at IS NOT NULL AS is_completed, cancelled_at IS NOT NULL AS is_cancelled,
        failed_at IS NOT NULL AS has_failed, claimed_at IS NOT NULL AS was_claimed,
        rescue_count, prefetched,
        date_part('epoch', process_at) AS process_at,
        date_part('epoch', process_at - clock_timestamp()) / 3600 AS due_in
    FROM apoq_tasks
""")
BESIDE = sa.text("""
    SELECT array(SELECT task_id FROM ledger ORDER BY task_id) AS effects,
        array(SELECT id FROM apoq_workers ORDER BY id) AS workers,
        array(
            SELECT floor(date_part('epoch', clock_timestamp() - last_heartbeat_at) / 3600)
            FROM apoq_workers ORDER BY id
        ) AS unseen
""")
NOTED = sa.text("SELECT worker_id, unnest(task_ids) AS id FROM apoq_claims")
WRITE = sa.text("INSERT INTO ledger VALUES (:id)")

TIMES = {
    "apoq_tasks": ["created_at", "process_at", "claimed_at", "completed_at", "failed_at", "cancelled_at"],
    "apoq_workers": ["started_at", "last_heartbeat_at", "expires_at"],
}

CUT = sa.text("UPDATE apoq_workers SET backend_pid = 0, backend_start = 'epoch' WHERE id = :id")
"""As if the connection of its heartbeat, which the worker has noted there, were gone."""

# A transaction that waits here waits for Hypothesis, and not for a worker that is frozen.
PATIENCE = sa.text("SET LOCAL idle_in_transaction_session_timeout = 0")


def delay_after(fail_count: int) -> int:
    return HOUR * (fail_count - 1)


PROCESSORS = {
    type_: make_processor(type_, print, retry_limit=limit, retry_delay=delay_after)
    for type_, limit in LIMITS.items()
}


@dataclass
class Known:
    """A task, as it ought to stand in the database."""

    id: int
    queue: str
    type: str
    priority: int
    limit: int
    due: int
    state: str = PENDING
    attempt: int = 0
    fail_count: int = 0
    rescue_count: int = 0
    prefetched: bool = False
    claim_token: int = 0
    worker_id: UUID | None = None
    error: str | None = None
    has_failed: bool = False
    ended: int | None = None
    waited: bool = False
    """Whether it was cancelled before it was claimed, and so its last attempt was never begun."""
    begun: int = 0
    """How often a processor was called for it, or may have been, but for what used up no attempt."""
    may_begin_once_more: bool = False
    """Whether one of these was taken back, for nobody knew whether it had begun."""

    @property
    def is_spent(self) -> bool:
        """Whether it has no attempt left: then it is claimed to be ended, and doesn't begin."""
        return self.fail_count > self.limit

    def is_held_under(self, claim_token: int) -> bool:
        return self.state == RUNNING and self.claim_token == claim_token

    def claimed(self, worker_id: UUID, *, ahead: bool = False) -> None:
        self.state = RUNNING
        self.prefetched = ahead or self.is_spent
        self.begun += not self.is_spent
        self.worker_id = worker_id
        self.attempt += 1
        self.claim_token += 1

    def given_back(self) -> None:
        self.state = PENDING
        self.attempt -= 1
        self.begun -= not self.is_spent

    def rescued(self) -> None:
        self.state = PENDING
        self.error = WorkerDied.__name__
        self.rescue_count += 1
        if self.prefetched:
            # Nobody knows whether it had begun; from now on it won't be claimed unless it can begin at once.
            self.attempt -= 1
            self.may_begin_once_more |= not self.is_spent
        else:
            self.fail_count += 1
            self.has_failed = True

    def completed(self, now: int) -> None:
        self.state, self.ended = COMPLETED, now

    def settled(self, settlement: Settlement, now: int) -> None:
        self.has_failed |= settlement.fail_count > self.fail_count
        self.begun -= settlement.state == PENDING and settlement.attempt < self.attempt
        self.state = settlement.state
        self.attempt = settlement.attempt
        self.fail_count = settlement.fail_count
        if settlement.delay is not None:
            self.due = now + round(settlement.delay / HOUR)
        if settlement.error is not None:
            self.error = settlement.error["class"]
        if settlement.state != PENDING:
            self.ended = now

    def cancelled(self, now: int) -> None:
        self.waited = self.state == PENDING
        self.state, self.error, self.ended = CANCELLED, Cancel.__name__, now

    def retried(self, due: int) -> None:
        self.state, self.due, self.ended, self.waited = PENDING, due, None, False
        self.attempt = self.fail_count = self.rescue_count = 0
        self.begun, self.may_begin_once_more = 0, False
        self.has_failed = False

    def row(self) -> dict[str, Any]:
        """Answer what is read of it, but for the times."""
        return {
            "id": self.id,
            "queue": self.queue,
            "type": self.type,
            "priority": self.priority,
            "state": self.state,
            "attempt": self.attempt,
            "fail_count": self.fail_count,
            "rescue_count": self.rescue_count,
            "prefetched": self.prefetched,
            "claim_token": self.claim_token,
            "worker_id": self.worker_id,
            "error": self.error,
            "is_completed": self.state == COMPLETED,
            "is_cancelled": self.state == CANCELLED,
            "has_failed": self.has_failed,
            "was_claimed": self.claim_token > 0,
        }


@dataclass(eq=False)
class Hand:
    """What a worker's process has in its memory, whether or not anybody still thinks that it lives."""

    id: UUID
    types: list[str]
    keeps: bool
    """Whether it marks completed tasks, or deletes them."""
    positions: dict[Queue, ClaimCursor] = field(
        default_factory=lambda: {queue: ClaimCursor() for queue in QUEUES}
    )
    held: dict[int, Attempt] = field(default_factory=dict)
    notes: ClaimLog = field(default_factory=lambda: ClaimLog(Places()))
    is_doubtful: bool = False
    beats: bool = True

    def __repr__(self) -> str:
        return f"worker {self.id.int}"


@dataclass(eq=False)
class Attempt:
    """A task that a worker has claimed, and may write to until it is taken from it; or may try to, later."""

    hand: Hand
    task: WorkerAttempt
    is_settled: bool = False

    @property
    def is_doomed(self) -> bool:
        """Whether the worker ends it instead of running it."""
        return self.task.fail_count > self.task.policy.limit

    def __repr__(self) -> str:
        return f"task {self.task.id} under token {self.task.claim_token}"


@dataclass(eq=False)
class Transaction:
    """A transaction that is still open, with the tasks that it has locked."""

    what: str
    locked: set[int]
    end: Callable[[bool], None]

    def __repr__(self) -> str:
        return self.what


End = Literal["commit", "roll back", "wait"]
"""What becomes of a transaction; while it waits, other things happen."""

ends = st.sampled_from(["commit", "commit", "roll back", "wait"])
hours = st.sampled_from([0, 1, 3])
delays = hours.map(lambda hours: HOUR * hours)
places = st.integers(0, 2)
queues = st.sampled_from([*QUEUES, QUEUES[0], QUEUES[0]])
chosen = st.one_of(
    st.none(),
    st.builds(ValueError),
    st.builds(Retry, delay=delays),
    st.builds(Snooze, delays),
    st.builds(Cancel),
)
"""What becomes of an attempt: it returns, or it raises this."""

outcomes = chosen | st.builds(Release) | st.builds(TaskLost)

options = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.sampled_from(PRIORITIES),
        "delay": hours.map(lambda hours: timedelta(hours=hours)),
        "retry_limit": st.integers(0, 2),
        "retry_delay": delays,
    },
)


class Tasks(RuleBasedStateMachine):
    """Everything that happens to tasks."""

    reached: ClassVar = Counter[str]()
    """How often what is worth reaching was reached, in all histories."""

    def __init__(self, engine: sa.Engine, own: sa.Engine) -> None:
        super().__init__()
        self.engine, self.own = engine, own
        with engine.begin() as connection:
            # A history that has failed may have left some open, for which this one would wait.
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND state LIKE 'idle in transaction%%' "
                "AND pid <> pg_backend_pid()"
            )
            connection.exec_driver_sql(
                "TRUNCATE apoq_tasks, apoq_workers, apoq_claims, ledger RESTART IDENTITY"
            )
        self.now = 0
        self.tasks: dict[int, Known] = {}
        self.effects: list[int] = []
        self.seen: dict[UUID, int] = {}
        self.cut: set[UUID] = set()
        self.process_at: dict[int, float] = {}
        self.transactions: list[Transaction] = []
        self.attempts: list[Attempt] = []
        self.handed_out: set[tuple[int, int]] = set()
        self.numbers = count(1)
        self.hands = [self._hired(place) for place in range(3)]
        self.turns = 2
        self.worker = Worker(engine, QUEUES[0], lease=timedelta(hours=LEASE))
        for type_, limit in LIMITS.items():
            self.worker.use(type_, self._process, retry_limit=limit, retry_delay=delay_after)
        # Workers mind their leases, too; but nothing may depend on it.
        self.lease = Lease(math.inf, 0)
        self.lease.renew(time.monotonic())
        self.completions = {keeps: Completion(Events(), keep=keeps) for keeps in (True, False)}
        self.settlers = {
            keeps: Settler(
                "apoq-settler",
                database_of(own, is_sharded=keeps),  # one of them skips locked tasks
                Events(),
                completion,
                counters.Counter(),
                claim_log=SimpleNamespace(settled=self._forget_attempts, given_up=lambda _: None),
                on_pending=lambda queue, delay: None,
                on_followed=lambda schema, completed, failed: None,
            )
            for keeps, completion in self.completions.items()
        }

    def teardown(self) -> None:
        for transaction in self.transactions:
            transaction.end(False)

    # What callers do.

    @initialize(options=options, is_answered=st.booleans())
    def begin(self, options: dict[str, Any], is_answered: bool) -> None:
        """Begin with what makes each of the other steps worth while."""
        for type_ in LIMITS:
            self.add(QUEUES[0], type_, options, 2, 0, "commit")
        for place in range(3):
            self.every_row_is_as_the_model_says()
            self.claim(place, QUEUES[0], 1, bool(place % 2), True, "commit", is_answered or place > 0)

    @precondition(lambda self: len(self.tasks) < 20)
    @rule(
        queue=queues,
        type_=st.sampled_from(list(LIMITS)),
        options=options,
        many=st.integers(0, 3),
        late=st.sampled_from([0, 0, 0, 2]),
        end=ends,
    )
    def add(self, queue: Queue, type_: str, options: dict[str, Any], many: int, late: int, end: End) -> None:
        if late:
            options = {**options, "process_at": datetime.now(UTC) - timedelta(hours=late)}
            options.pop("delay", None)
        session = Session(self.engine)
        if many:
            assert queue.add_many(session, type_, range(many), **options) == many
        else:
            queue.add(session, type_, **options)
        ids = set(session.scalars(sa.select(Task.id))) - self.tasks.keys()
        assert len(ids) == max(many, 1)
        due = self.now + options.get("delay", timedelta(hours=-late)) // timedelta(hours=1)
        limit = options.get("retry_limit", LIMITS[type_])
        added = {id_: Known(id_, queue.name, type_, options.get("priority", 0), limit, due) for id_ in ids}

        def finish(commit: bool) -> None:
            if commit:
                session.commit()
                self.tasks |= added
            session.close()

        self._end(Transaction("an addition", set(), finish), end)

    @precondition(lambda self: self._changeable())
    @rule(task=st.runner().flatmap(lambda self: st.sampled_from(self._changeable())), end=ends)
    def cancel(self, task: Known, end: End) -> None:
        state = task.state
        is_possible = state in {PENDING, RUNNING}
        session = Session(self.engine)
        assert Queue(task.queue).cancel(session, task.id) is is_possible

        def change() -> None:
            task.cancelled(self.now)
            self.reached[f"a task cancelled that was {state}"] += 1

        self._change(session, task, is_possible, change, end)

    @precondition(lambda self: self._changeable())
    @rule(task=st.runner().flatmap(lambda self: st.sampled_from(self._retryable())), delay=hours, end=ends)
    def retry(self, task: Known, delay: int, end: End) -> None:
        state = task.state
        is_possible = state in {COMPLETED, FAILED, CANCELLED}
        due = self.now + delay
        session = Session(self.engine)
        assert Queue(task.queue).retry(session, task.id, delay=timedelta(hours=delay)) is is_possible

        def change() -> None:
            task.retried(due)
            self.reached[f"a task retried that was {state}"] += 1

        self._change(session, task, is_possible, change, end)

    def _change(
        self, session: Session, task: Known, is_possible: bool, change: Callable[[], None], end: End
    ) -> None:
        session.execute(PATIENCE)

        def finish(commit: bool) -> None:
            (session.commit if commit else session.rollback)()
            session.close()
            if commit and is_possible:
                change()

        self._end(Transaction("a change", {task.id} if is_possible else set(), finish), end)

    def _changeable(self) -> list[Known]:
        return [task for task in self._by_id() if task.id not in self._locked()]

    def _retryable(self) -> list[Known]:
        """Answer what may be tried: the rarer its state, the more often it stands there."""
        often = {COMPLETED: 10, CANCELLED: 10, FAILED: 50}
        return [task for task in self._changeable() for _ in range(often.get(task.state, 1))]

    # What a worker does with tasks.

    @rule(
        place=places,
        queue=queues,
        at_most=st.integers(1, 4),
        ahead=st.booleans(),
        surveys=st.booleans(),
        end=ends,
        is_answered=st.sampled_from([True, True, True, False]),
    )
    def claim(
        self, place: int, queue: Queue, at_most: int, ahead: bool, surveys: bool, end: End, is_answered: bool
    ) -> None:
        hand = self.hands[place]
        if hand.is_doubtful:
            self._give_back(hand)
        if done := hand.notes.done(None):
            execute(self.own, forget_settled(None), {"by_worker": hand.id, "done": array_text(done)})
            hand.notes.forgotten(None, done)
        if surveys:
            mine = looked_into(queue.name, hand.types)
            surveyed(hand.positions[queue], execute(self.own, survey(None), mine), queue.name)
        claimable = self._claimable(hand.types, queue, hand.positions[queue])
        # Ahead of a slot, none that may kill its worker.
        front = [task for task in claimable if not (ahead and task.rescue_count)][:at_most]
        parameters = {
            **asked(
                hand.positions[queue],
                at_most,
                queue=queue.name,
                types=hand.types,
                limits={type_: LIMITS[type_] for type_ in hand.types},
            ),
            **(AHEAD if ahead else {}),
            "by_worker": hand.id,
            "number": (number := hand.notes.begin(None)),
        }
        if end == "commit":
            found: Any = execute(self.own, claim(None, ahead=ahead), parameters).fetchall()
        else:
            connection = self.own.connect()
            found = connection.execute(claim(None, ahead=ahead), parameters).all()
            connection.execute(PATIENCE)
        rows = [tuple(row) for row in found]
        rows.sort(key=lambda row: (-row[PRIORITY], row[PROCESS_AT], row[ID]))
        assert [row[ID] for row in rows] == [task.id for task in front]

        def finish(commit: bool) -> None:
            if end != "commit":
                (connection.commit if commit else connection.rollback)()
                connection.close()
            if not commit or not is_answered:
                hand.notes.failed(number)
            if commit:
                if is_answered:
                    hand.notes.claimed(number, len(rows))
                    hand.positions[queue].claimed(rows, is_all=len(rows) < at_most)
                self._claimed(hand, rows, number, ahead=ahead, is_answered=is_answered)

        self._end(Transaction("a claim", {task.id for task in front}, finish), end)

    def _give_back(self, hand: Hand) -> None:
        """Give back what an earlier claim took whose answer was lost."""
        parameters = {
            "by_worker": hand.id,
            "known": array_text(hand.notes.known(None)),
            "held": array_text(hand.held),
            "latest": hand.notes.latest,
        }
        strays = [
            task
            for task in self.tasks.values()
            if task.state == RUNNING and task.worker_id == hand.id and task.id not in hand.held
        ]
        free = [task for task in strays if task.id not in self._locked()]

        ((left, _),) = execute(self.own, give_back(None), parameters)

        assert left == len(strays) - len(free)
        hand.is_doubtful = bool(left)
        execute(self.own, forget_unknown(None), parameters)
        for task in free:
            self.reached["a stray given back"] += 1
            task.given_back()

    @precondition(lambda self: self._settleable())
    @rule(
        ends=st.runner().flatmap(
            lambda self: st.lists(
                st.tuples(st.sampled_from(self._settleable()), outcomes),
                min_size=1,
                unique_by=lambda end: end[0],
            )
        )
    )
    def settle(self, ends: list[tuple[Attempt, BaseException | None]]) -> None:
        """Settle what workers hold, or have held: for the second time, or after they have lost it."""
        for keeps, settler in self.settlers.items():
            batch = [
                ended(attempt.task, WorkerDied() if attempt.is_doomed else outcome)
                for attempt, outcome in ends
                if attempt.hand.keeps == keeps
            ]
            written = [end for end in batch if self._may_write(end)]
            for end in batch:
                settler.put(end)
            settler.turn()
            for end in written:
                if isinstance(end.outcome, TaskLost):
                    continue
                if end.settlement is not None:
                    self.tasks[end.attempt.id].settled(end.settlement, self.now)
                else:
                    self._complete(end.attempt.id, keeps)

    @precondition(lambda self: self._startable())
    @rule(attempt=st.runner().flatmap(lambda self: st.sampled_from(self._startable())), end=ends)
    def complete_in_session(self, attempt: Attempt, end: End) -> None:
        """Write an effect and the completion in one transaction."""
        session = TaskSession(self.engine)
        session.execute(WRITE, {"id": attempt.task.id})
        completion = self.completions[attempt.hand.keeps]
        is_written = completion.write(session.connection(), attempt.task, None) is not None
        assert is_written == self._may_write(ended(attempt.task, None))
        session.execute(PATIENCE)

        def finish(commit: bool) -> None:
            if commit and is_written:
                session.commit_completion()
                self._complete(attempt.task.id, attempt.hand.keeps)
                self.effects.append(attempt.task.id)
                self._forget_attempts([attempt.task.row])
                self.reached["an effect"] += 1
            session.close()

        locked = {attempt.task.id} if is_written else set[int]()
        self._end(Transaction("a completion", locked, finish), end)

    # It takes as long as ten other steps.
    @precondition(lambda self: self.turns > 0)
    @rule(outcome=chosen, writes=st.booleans())
    def work(self, outcome: BaseException | None, writes: bool) -> None:
        """Let a real worker do all of this for one task."""
        self.turns -= 1
        self.outcome, self.writes = outcome, writes
        due = self._claimable(list(LIMITS), QUEUES[0], None)

        found = self.worker.work()

        id_ = probe.worker_id(self.worker)
        while due and due[0].is_spent:
            self.reached["a task without attempts left"] += 1
            doomed = due.pop(0)
            doomed.claimed(id_)
            doomed.settled(Settlement(FAILED, doomed.attempt - 1, doomed.fail_count), self.now)
        assert (found and found.id) == (due[0].id if due else None)
        if due:
            due[0].claimed(id_)
            self.handed_out.add((due[0].id, due[0].claim_token))
            if self.ended.settlement is not None:
                due[0].settled(self.ended.settlement, self.now)
            else:
                due[0].completed(self.now)
                self.effects += [due[0].id] if writes else []
        # Its heartbeat, on a thread of its own, may also forget workers that were not seen for an hour.
        if self._read(BESIDE)[0]["workers"] != sorted(self.seen):
            self._forgotten(after=1)

    def _process(self, task: RunningTask) -> None:
        self.ended = ended(probe.attempt_of(task), self.outcome)
        if self.writes:
            task.session.execute(WRITE, {"id": task.id})
        if self.outcome is not None:
            raise self.outcome

    # What workers do beside, and what becomes of them.

    @precondition(lambda self: self.attempts and self._beating())
    @rule(
        hand=st.runner().flatmap(lambda self: st.sampled_from(self._beating())),
        at_most=st.sampled_from([1, 2, 1000]),
    )
    def sweep(self, hand: Hand, at_most: int) -> None:
        orphans = [task for task in self._by_id() if self._is_orphan(task, sweeper=hand.id)]
        reason = encode({"class": WorkerDied.__name__, "message": "", "traceback": ""})
        parameters = {
            **self._presented(hand),
            "by_worker": hand.id,
            "known": array_text(hand.notes.known(None)),
        }

        rows = execute(self.own, beat_and_look(None), parameters).fetchall()
        peers = [Peer(*row[1:]) for row in rows if row[1] is not None]
        dead = [peer.id for peer in peers if peer.left is None or peer.left <= 0]
        parameters = {"dead": dead, "at_most": at_most, "reason": reason}
        rescued = execute(self.own, rescue(None), parameters).rowcount if dead else 0

        assert {task.worker_id for task in orphans} <= set(dead)
        assert rescued == len(orphans[:at_most])
        if dead:
            execute(self.own, forget_dead(None), parameters)
        for peer in peers:
            assert self._is_alive(peer.id) is (peer.id not in dead)
            assert peer.left is None or -0.1 < peer.left / HOUR - (self._until(peer.id) - self.now) <= 0
        for task in orphans[:at_most]:
            self.reached["a rescue"] += 1
            task.rescued()
        self._seen(hand)

    @precondition(lambda self: self.attempts)
    @rule(
        queue=queues,
        states=st.sampled_from([{COMPLETED}, {FAILED, CANCELLED}]),
        at_most=st.sampled_from([1, 1000]),
    )
    def prune(self, queue: Queue, states: set[str], at_most: int) -> None:
        """Delete tasks that ended long ago."""
        statement = prune_completed if COMPLETED in states else prune_failed
        old = {
            task.id
            for task in self.tasks.values()
            if task.queue == queue.name
            and task.state in states
            and self.now - task.ended >= RETENTION
            and task.id not in self._locked()
        }

        keep = timedelta(hours=RETENTION)
        execute(self.own, statement(None), {"from_queue": queue.name, "keep": keep, "at_most": at_most})

        pruned = self.tasks.keys() - {row["id"] for row in self._read(EVERYTHING)}
        assert pruned <= old
        assert len(pruned) == min(len(old), at_most)
        # The oldest first.
        left = [self.tasks[id_].ended for id_ in old - pruned]
        assert not left or all(self.tasks[id_].ended <= min(left) for id_ in pruned)
        for id_ in pruned:
            self.reached["a task pruned"] += 1
            del self.tasks[id_]

    @precondition(lambda self: any(self.now > seen for seen in self.seen.values()))
    @rule(after=st.sampled_from([1, 3]))
    def forget(self, after: int) -> None:
        """Remove the rows of workers that died long ago."""
        execute(self.own, forget(None), {"keep": timedelta(hours=after)})
        self._forgotten(after)

    def _forgotten(self, after: int) -> None:
        noted = {row["worker_id"] for row in self._read(NOTED)}
        self.seen = {
            id_: seen for id_, seen in self.seen.items() if self.now - seen < LEASE + after or id_ in noted
        }

    @rule(hours=st.sampled_from([1, 1, 1, 3, RETENTION]), commit=st.booleans(), sweeps=st.booleans())
    def time_passes(self, hours: int, commit: bool, sweeps: bool) -> None:
        """Let hours pass, in which those beat who do."""
        # These would have been ended long before.
        while self.transactions:
            self.transactions.pop(0).end(commit)
        with self.engine.begin() as connection:
            for table, names in TIMES.items():
                older = ", ".join(f"{name} = {name} - CAST(:passed AS interval)" for name in names)
                connection.execute(sa.text(f"UPDATE {table} SET {older}"), {"passed": timedelta(hours=hours)})
        self.now += hours
        for hand in {attempt.hand for attempt in self.attempts} | set(self.hands):
            for position in hand.positions.values():
                levels = probe.levels(position).items()
                probe.move(position, {priority: (at - HOUR * hours, id_) for priority, (at, id_) in levels})
        for hand in self._beating():
            self._beat(hand)
        if sweeps and self._beating():
            self.sweep(self._beating()[0], 1000)

    @precondition(lambda self: self.attempts)
    @rule(place=places, fate=st.sampled_from(["is silent", "beats", "leaves"]))
    def meet(self, place: int, fate: str) -> None:
        """Let a worker be silent, or beat again with all that it remembers, or leave."""
        hand = self.hands[place]
        hand.beats = fate == "beats"
        if fate == "beats":
            self._beat(hand)
        if fate == "leaves":
            execute(self.own, leave(None), {"worker_id": hand.id})
            self.seen.pop(hand.id, None)
            self.hands[place] = self._hired(place)

    @precondition(lambda self: self.attempts)
    @rule(place=places, is_noticed=st.booleans(), sweeps=st.booleans())
    def die(self, place: int, is_noticed: bool, sweeps: bool) -> None:
        """Replace a worker that is not heard of again, or only late: what it has sent may yet arrive."""
        hand = self.hands[place]
        if is_noticed and hand.id in self.seen:
            with self.engine.begin() as connection:
                connection.execute(CUT, {"id": hand.id})
            self.cut.add(hand.id)
        self.hands[place] = self._hired(place)
        self.time_passes(GRACE if is_noticed else LEASE, False, sweeps)
        if sweeps:
            # What the rescue has left behind is seen best by whoever claims it next.
            self.every_row_is_as_the_model_says()
            self.claim(1, QUEUES[0], 4, False, True, "commit", True)

    @precondition(lambda self: self.transactions)
    @rule(
        transaction=st.runner().flatmap(lambda self: st.sampled_from(self.transactions)),
        commit=st.sampled_from([True, True, False]),
    )
    def end(self, transaction: Transaction, commit: bool) -> None:
        """End a transaction that was left open."""
        self.transactions.remove(transaction)
        transaction.end(commit)

    # What has to be true.

    @invariant()
    def every_row_is_as_the_model_says(self) -> None:
        rows = {row["id"]: row for row in self._read(EVERYTHING)}
        self.process_at = {id_: row.pop("process_at") for id_, row in rows.items()}
        due_in = {id_: row.pop("due_in") for id_, row in rows.items()}
        assert rows == {id_: task.row() for id_, task in self.tasks.items()}
        # Real time passes too, but never an hour's tenth.
        assert all(-0.1 < due_in[id_] - (task.due - self.now) <= 0 for id_, task in self.tasks.items())
        (beside,) = self._read(BESIDE)
        unseen = dict(zip(beside["workers"], beside["unseen"], strict=True))
        assert unseen == {id_: self.now - seen for id_, seen in self.seen.items()}
        # An effect is there once for each task that was completed with it, and for no other.
        assert beside["effects"] == sorted(self.effects)

    @invariant()
    def whatever_runs_is_noted(self) -> None:
        """Or nobody would find it if its worker died."""
        noted = {(row["worker_id"], row["id"]) for row in self._read(NOTED)}
        running = [task for task in self.tasks.values() if task.state == RUNNING]
        assert all((task.worker_id, task.id) in noted for task in running)

    @invariant()
    def attempts_add_up(self) -> None:
        for task in self.tasks.values():
            is_counted = task.state in {RUNNING, COMPLETED, CANCELLED} and not task.waited
            assert task.attempt == task.fail_count + is_counted
            assert task.claim_token >= task.attempt
            assert task.begun <= task.limit + 1 + task.may_begin_once_more
            assert task.fail_count <= task.limit + 1
            # A claim that is to end it counts as one more until it does, or for good where a caller cancels
            # it first: a row doesn't tell it from one that was claimed ahead, and may have begun.
            if task.state in {COMPLETED, FAILED}:
                assert task.attempt <= task.limit + 1

    # The rest is the model's own.

    def _read(self, statement: sa.TextClause) -> list[dict[str, Any]]:
        return execute(self.own, statement, {}).mappings()

    def _hired(self, place: int) -> Hand:
        # One that knows fewer types, and one that keeps no completed tasks.
        types = list(LIMITS)[:2] if place == 0 else list(LIMITS)
        hand = Hand(UUID(int=next(self.numbers)), types, keeps=place != 2)
        self._beat(hand)
        return hand

    def _beat(self, hand: Hand) -> None:
        execute(self.own, beat(None), self._presented(hand))
        self._seen(hand)

    def _seen(self, hand: Hand) -> None:
        self.seen[hand.id] = self.now
        self.cut.discard(hand.id)

    def _presented(self, hand: Hand) -> dict[str, Any]:
        return {
            "worker_id": hand.id,
            "worker_host": "here",
            "worker_pid": 1,
            "worker_version": "0",
            "worker_queues": [queue.name for queue in QUEUES],
            "worker_concurrency": 4,
            "is_direct": False,
            "lease": timedelta(hours=LEASE),
            "grace": timedelta(hours=GRACE),
        }

    def _is_alive(self, id_: UUID | None) -> bool:
        return id_ in self.seen and self.now < self._until(id_)

    def _until(self, id_: UUID) -> int:
        return self.seen[id_] + (GRACE if id_ in self.cut else LEASE)

    def _is_orphan(self, task: Known, sweeper: UUID | None = None) -> bool:
        return (
            task.state == RUNNING
            and task.id not in self._locked()
            and task.worker_id != sweeper
            and not self._is_alive(task.worker_id)
        )

    def _locked(self) -> set[int]:
        return {id_ for transaction in self.transactions for id_ in transaction.locked}

    def _unlocked(self, attempts: Iterable[Attempt]) -> list[Attempt]:
        # Whoever settled what another transaction is completing would wait for it.
        locked = self._locked()
        return [attempt for attempt in attempts if attempt.task.id not in locked]

    def _settleable(self) -> list[Attempt]:
        held = self._unlocked(attempt for hand in self.hands for attempt in hand.held.values())
        return held * 3 + self._unlocked(self.attempts)

    def _startable(self) -> list[Attempt]:
        return [attempt for attempt in self._settleable() if not attempt.is_doomed]

    def _beating(self) -> list[Hand]:
        return [hand for hand in self.hands if hand.beats]

    def _by_id(self) -> list[Known]:
        return [self.tasks[id_] for id_ in sorted(self.tasks)]

    def _claimable(self, types: list[str], queue: Queue, position: ClaimCursor | None) -> list[Known]:
        """Answer what a claim ought to take, in order: all that is due, or what is behind a position."""
        locked = self._locked()

        def is_ahead(task: Known) -> bool:
            if position is None:
                return True
            levels = probe.levels(position)
            return task.priority in levels and (self.process_at[task.id], task.id) > levels[task.priority]

        found = [
            task
            for task in self.tasks.values()
            if task.state == PENDING
            and task.queue == queue.name
            and task.type in types
            and task.due <= self.now
            and task.id not in locked
            and is_ahead(task)
        ]
        return sorted(found, key=lambda task: (-task.priority, self.process_at[task.id], task.id))

    def _claimed(
        self, hand: Hand, rows: list[tuple[Any, ...]], number: int, *, ahead: bool, is_answered: bool
    ) -> None:
        hand.is_doubtful |= not is_answered
        for row in rows:
            known = self.tasks[row[ID]]
            task = WorkerAttempt(
                (
                    *row,
                    Claim(
                        Queue(known.queue),
                        PROCESSORS,
                        time.monotonic(),
                        time.monotonic(),
                        self.lease,
                        StopSignal(),
                        list,
                        number,
                    ),
                ),
                PROCESSORS[row[TYPE]],
                lambda: TaskSession(self.engine),
            )
            known.claimed(hand.id, ahead=ahead)
            assert (task.number, task.fail_count, task.claim_token) == (
                known.attempt,
                known.fail_count,
                known.claim_token,
            )
            assert (task.id, task.claim_token) not in self.handed_out, "two hold it under one token"
            self.handed_out.add((task.id, task.claim_token))
            if is_answered:
                attempt = Attempt(hand, task)
                if attempt.is_doomed:
                    self.reached["a task without attempts left"] += 1
                assert attempt.is_doomed or task.number <= known.limit + 1
                hand.held[task.id] = attempt
                hand.notes.hold([task.row])
                self.attempts.append(attempt)

    def _may_write(self, end: AttemptResult) -> bool:
        known = self.tasks.get(end.attempt.id)
        is_held = known is not None and known.is_held_under(end.attempt.claim_token)
        self.reached["a write" if is_held else "a write to a lost task"] += 1
        return is_held

    def _complete(self, id_: int, keeps: bool) -> None:
        if keeps:
            self.tasks[id_].completed(self.now)
        else:
            del self.tasks[id_]

    def _forget_attempts(self, rows: Iterable[Claimed]) -> None:
        for row in rows:
            for attempt in self.attempts:
                if attempt.task.row is row and not attempt.is_settled:
                    attempt.is_settled = True
                    attempt.hand.notes.settled([row])
                    if attempt.hand.held.get(row[ID]) is attempt:
                        del attempt.hand.held[row[ID]]

    def _end(self, transaction: Transaction, end: End) -> None:
        if end == "wait" and len(self.transactions) < MOST_OPEN:
            self.reached[f"{transaction.what} left open"] += 1
            self.transactions.append(transaction)
        else:
            transaction.end(end == "commit")


WORTH_REACHING = {
    "a claim left open",
    "a completion left open",
    "a change left open",
    "a rescue",
    "a task cancelled that was pending",
    "a task cancelled that was running",
    "a task retried that was cancelled",
    "a task retried that was completed",
    "a task retried that was failed",
    "a write",
    "a write to a lost task",
    "an addition left open",
    "an effect",
}


@pytest.fixture
def own(engine):
    own = own_engine(engine)
    yield own
    own.dispose()


def test_whatever_happens_every_task_is_as_it_ought_to_be(engine, own, caplog, monkeypatch):
    caplog.set_level(logging.CRITICAL, "apoq")
    monkeypatch.setattr(claim_log, "MIN_FORGOTTEN", 2)
    Tasks.reached.clear()
    # The same each time, and then at random where that shows too little: what is drawn depends on the modules
    # that happen to be loaded.
    for is_the_same in (not is_thorough(), *[False] * 5):
        run_state_machine_as_test(
            partial(Tasks, engine, own),
            settings=drawn(25, stateful_step_count=50, derandomize=is_the_same),
        )
        if Tasks.reached.keys() >= WORTH_REACHING:
            break
    assert Tasks.reached.keys() >= WORTH_REACHING
