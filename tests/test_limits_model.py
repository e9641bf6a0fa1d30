"""Tasks with limits in whatever order things happen to them: the worker's own claims and hand-overs."""

from __future__ import annotations

from functools import partial

import probe
import pytest
import sqlalchemy as sa
from claims import hold_lease
from drawn import drawn
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.orm import Session

from apoq import Limit, Queue, Task, Worker
from apoq.core.places import KEY, POOL, Share
from apoq.core.states import CANCELLED, COMPLETED, FAILED, FINAL, PENDING, RUNNING, WAITING

pytestmark = pytest.mark.slow

QUEUE = Queue()
KEYS = ("a", "b")
OUTCOMES = (COMPLETED, FAILED, CANCELLED, PENDING)
HELD = sa.text("SELECT count(*) FROM apoq_tasks WHERE held_key = :key")
RUNNING_OF_A = sa.text("SELECT count(*) FROM apoq_tasks WHERE state = 'running' AND key = 'a'")
"""All of them have places, because their key had a limit from the start."""


class Limited(RuleBasedStateMachine):
    """Two workers, whose threads don't run: each step is one of their transactions, or a caller's."""

    def __init__(self, engine: sa.Engine, workers: list[Worker]) -> None:
        super().__init__()
        self.engine = engine
        self.workers = workers
        self.at_most = {"a": 2, "b": 1}
        """The limits in force of the keys, whatever their type; "b" has that of its type."""
        with engine.begin() as connection:
            connection.execute(sa.text("TRUNCATE apoq_tasks, apoq_claims, apoq_limits"))
        for worker in workers:
            hold_lease(worker)
            probe.declare_limits(worker)
        with Session(engine) as session, session.begin():
            QUEUE.limit(session, 2, key="a")

    def scalars(self, statement: sa.Select) -> list:
        with self.engine.connect() as connection:
            return list(connection.scalars(statement))

    def running(self) -> list[int]:
        return self.scalars(sa.select(Task.id).where(Task.state == RUNNING).order_by(Task.id))

    @rule(key=st.sampled_from([*KEYS, None]), type=st.sampled_from("tu"), priority=st.integers(0, 1))
    def add(self, key: str | None = "a", type: str = "t", priority: int = 0) -> None:
        with Session(self.engine) as session, session.begin():
            QUEUE.add(session, type, key=key, priority=priority)

    @rule(worker=st.integers(0, 1), limit=st.integers(1, 4))
    def claim(self, worker: int, limit: int) -> None:
        before = set(self.running())
        probe.claim_placed(self.workers[worker], limit)
        self.check_begun(before)

    @precondition(lambda self: self.running())
    @rule(
        data=st.data(),
        outcome=st.sampled_from(OUTCOMES),
        worker=st.integers(0, 1),
        room=st.integers(0, 2),
        hands_over=st.booleans(),
    )
    def end(self, data: st.DataObject, outcome: str, worker: int, room: int, hands_over: bool) -> None:
        """End an attempt, however; and hand over its places, unless the worker dies at that moment."""
        id_ = data.draw(st.sampled_from(self.running()))
        with Session(self.engine) as session, session.begin():
            task = session.get_one(Task, id_)
            shares = [
                Share(kind, name)
                for kind, name in ((KEY, task.held_key), (POOL, task.held_pool_key))
                if name is not None
            ]
            task.state = outcome
        if hands_over:
            self.hand_over(worker, shares, room)

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(self.running()))
        with self.engine.begin() as connection:
            connection.execute(sa.delete(Task).where(Task.id == id_))

    @rule(at_most=st.sampled_from([0, 1, 2, 3]), key=st.sampled_from(KEYS))
    def change(self, at_most: int, key: str) -> None:
        with Session(self.engine) as session, session.begin():
            QUEUE.limit(session, at_most, key=key)
        self.at_most[key] = at_most

    @rule(worker=st.integers(0, 1), room=st.integers(0, 2))
    def sweep(self, worker: int, room: int) -> None:
        waiting = sa.select(Task.waiting_for, sa.func.coalesce(Task.pool_key, Task.key)).where(
            Task.state == WAITING
        )
        with self.engine.connect() as connection:
            shares = {Share(*row) for row in connection.execute(waiting)}
        self.hand_over(worker, shares, room)

    def hand_over(self, worker: int, shares, room: int) -> None:
        before = set(self.running())
        probe.hand_over(self.workers[worker], dict.fromkeys(shares, 2), room)
        self.check_begun(before)

    def check_begun(self, before: set[int]) -> None:
        """No task has begun while as many of its key ran as may."""
        begun = set(self.running()) - before
        if not begun:
            return
        with self.engine.connect() as connection:
            keys = set(connection.scalars(sa.select(Task.held_key).where(Task.id.in_(begun))))
            for key in keys - {None}:
                assert connection.scalar(HELD, {"key": key}) <= self.at_most[key]
            if begun.intersection(connection.scalars(sa.select(Task.id).where(Task.key == "a"))):
                assert connection.scalar(RUNNING_OF_A) <= self.at_most["a"]

    @invariant()
    def each_place_is_held_once(self) -> None:
        held = sa.select(Task.held_key, Task.slot).where(Task.held_key.is_not(None))
        pools = sa.select(Task.pool_slot).where(Task.held_pool_key == "u")
        with self.engine.connect() as connection:
            places = connection.execute(held).all()
            in_pool = list(connection.scalars(pools))
        assert len(set(places)) == len(places)
        assert len(set(in_pool)) == len(in_pool) <= 2

    def teardown(self) -> None:
        """Let everything end: nothing is left waiting."""
        for key in KEYS:
            if self.at_most[key] == 0:
                self.change(1, key)
        left = sa.select(sa.func.count()).where(Task.state.not_in(FINAL))
        for _ in range(200):
            self.sweep(0, 2)
            self.claim(1, 4)
            with self.engine.begin() as connection:
                connection.execute(sa.update(Task).where(Task.state == RUNNING).values(state=COMPLETED))
            if self.scalars(left) == [0]:
                break
        assert self.scalars(left) == [0]


def test_whatever_happens_no_more_tasks_run_than_may_and_none_waits_for_ever(engine, make_worker):
    workers = [make_worker(QUEUE, concurrency=4) for _ in range(2)]
    for worker in workers:
        worker.use("t", print, limit=Limit(1, key=True))
        worker.use("u", print, limit=Limit(2))
    try:
        run_state_machine_as_test(
            partial(Limited, engine, workers),
            settings=drawn(30, stateful_step_count=30, phases=[Phase.generate]),
        )
    finally:
        for worker in workers:
            probe.dispose(worker)
