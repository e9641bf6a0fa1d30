"""Whatever happens to the tasks of a graph, in any order, with crashes between any two statements."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from drawn import drawn
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.orm import Session

from apoq import Queue, Task
from apoq.core.states import FINAL, PENDING, WAITING
from apoq.events import Events
from apoq.postgres.connections import execute, own_engine
from apoq.schema.statements.arrays import array_text
from apoq.worker.execution.completion import Completion
from apoq.worker.maintenance.links_sweep import LinksSweep
from apoq.worker.settling.unblocking import Ends, no_ends, unblock

pytestmark = pytest.mark.slow

QUEUE = Queue()
WRONG_BLOCKERS = sa.text("""
    SELECT id FROM apoq_tasks WHERE coalesce(blockers, 0) <> (
        SELECT count(*) FROM apoq_links WHERE child_id = id AND NOT is_counted
    )
""")
TOO_EARLY = sa.text("""
    SELECT id FROM apoq_tasks WHERE state IN ('pending', 'running', 'completed') AND blockers > 0
""")
WITHOUT_REASON = sa.text("""
    SELECT id FROM apoq_tasks t WHERE state = 'waiting' AND NOT EXISTS (
        SELECT FROM apoq_links l LEFT JOIN apoq_tasks p ON p.id = l.parent_id
        WHERE l.child_id = t.id AND NOT l.is_counted AND NOT l.is_done AND (
            p.state IN ('pending', 'waiting', 'running') OR l.error IS NOT NULL
        )
    )
""")
LEFT = sa.text("""
    SELECT parent_id, child_id FROM apoq_links l JOIN apoq_tasks c ON c.id = l.child_id
    WHERE c.state = 'waiting' AND NOT is_counted AND (is_done OR needs_check)
""")

NUMBER = st.integers(0, 11)


class Graphs(RuleBasedStateMachine):
    def __init__(self, engine: sa.Engine, own: sa.Engine) -> None:
        super().__init__()
        self.engine = engine
        self.own = own
        self.ends = no_ends()
        self.locked: Session | None = None
        self.released: list[int] = []

    @initialize()
    def begin(self) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM apoq_links; DELETE FROM apoq_tasks")

    def teardown(self) -> None:
        self.let_go()
        for _ in range(4):  # each pass may end tasks on which others depend
            self.sweep()
        with self.engine.connect() as connection:
            assert connection.scalars(WITHOUT_REASON).all() == []
            assert connection.execute(LEFT).all() == []

    # Callers.

    @rule(parents=st.lists(NUMBER, max_size=3), policy=st.sampled_from(["cancel", "run", "hold"]))
    def add(self, parents: list[int], policy: Any) -> None:
        ids = self._ids()
        after = [ids[number % len(ids)] for number in parents] if ids else []
        with Session(self.engine) as session, session.begin():
            QUEUE.add(session, "t", after=after, on_parent_failure=policy)

    @rule(policies=st.lists(st.sampled_from(["cancel", "run", "hold"]), min_size=2, max_size=4))
    def add_together(self, policies: list[Any]) -> None:
        with Session(self.engine) as session, session.begin():
            before: list[Task] = []
            for policy in policies:
                before.append(QUEUE.add(session, "t", after=before[-2:], on_parent_failure=policy))

    @rule(number=NUMBER)
    def cancel(self, number: int) -> None:
        self._call(number, QUEUE.cancel)

    @rule(number=NUMBER, with_cancelled=st.booleans())
    def retry(self, number: int, with_cancelled: bool) -> None:
        self._call(number, partial(QUEUE.retry, with_cancelled=with_cancelled))

    @rule(number=NUMBER)
    def delete(self, number: int) -> None:
        if self.locked is None and (id_ := self._one(number)):
            with self.engine.begin() as connection:
                connection.execute(sa.delete(Task).where(Task.id == id_))

    @rule(number=NUMBER)
    def lock(self, number: int) -> None:
        if self.locked is None and (id_ := self._one(number, WAITING)):
            self.locked = Session(self.engine)
            self.locked.execute(sa.select(Task.id).where(Task.id == id_).with_for_update())

    @rule()
    def let_go(self) -> None:
        if self.locked is not None:
            self.locked.close()
            self.locked = None

    # Workers.

    @rule(number=NUMBER, keep=st.booleans())
    def complete(self, number: int, keep: bool) -> None:
        if id_ := self._claimed(number):
            statement = Completion(Events(), keep=keep).statement(None, full=False, alike=True, linked=True)
            [row] = self._run(statement, {"ids": array_text([id_]), "held_under": 1})
            if row["is_followed"]:
                self.ends.completed.add(id_)

    @rule(number=NUMBER)
    def fail(self, number: int) -> None:
        if id_ := self._claimed(number):
            with self.engine.begin() as connection:
                failed = sa.update(Task).where(Task.id == id_).values(state="failed", failed_at=sa.func.now())
                if connection.scalar(failed.returning(Task.is_followed)):
                    self.ends.failed.add(id_)

    @rule()
    def unblock(self) -> None:
        _, self.ends = unblock(self._run, None, self.ends)

    @rule()
    def crash(self) -> None:
        self.ends = no_ends()

    @rule()
    def sweep(self) -> None:
        sweep = LinksSweep(None, self._run, 0.0)
        self.ends.update(Ends(*sweep.check()))
        found: tuple[set[int], set[int], set[int]] = (set(), set(), set())
        while not sweep._walk(found):
            pass
        self.ends.update(Ends(*found))
        self.unblock()

    # What must be true.

    @invariant()
    def blockers_are_the_open_edges(self) -> None:
        with self.engine.connect() as connection:
            assert connection.scalars(WRONG_BLOCKERS).all() == []
            assert connection.scalars(TOO_EARLY).all() == []

    def _call(self, number: int, method: Any) -> None:
        if self.locked is None and (id_ := self._one(number)):
            with Session(self.engine) as session, session.begin():
                method(session, id_)

    def _claimed(self, number: int) -> int | None:
        id_ = self._one(number, PENDING)
        if id_:
            with self.engine.begin() as connection:
                running = {"state": "running", "claim_token": 1}
                connection.execute(sa.update(Task).where(Task.id == id_).values(running))
        return id_

    def _ids(self, *states: str) -> list[int]:
        with Session(self.engine) as session:
            found = sa.select(Task.id).where(Task.state.in_(states or (PENDING, WAITING, *FINAL)))
            return list(session.scalars(found.order_by(Task.id)))

    def _one(self, number: int, *states: str) -> int | None:
        ids = self._ids(*states)
        return ids[number % len(ids)] if ids else None

    def _run(self, statement: sa.Executable, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        return execute(self.own, statement, parameters).mappings()


@pytest.fixture
def own(engine):
    own = own_engine(engine, lock_timeout="5s")
    yield own
    own.dispose()


def test_whatever_happens_no_task_runs_early_and_none_waits_without_a_reason(engine, own):
    run_state_machine_as_test(
        partial(Graphs, engine, own),
        settings=drawn(40, stateful_step_count=30, phases=[Phase.explicit, Phase.generate]),
    )
