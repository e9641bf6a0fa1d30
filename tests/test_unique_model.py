"""Whatever happens to tasks with unique keys, and in whatever order: the real statements beside a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import count
from uuid import uuid4

import pytest
import sqlalchemy as sa
from claims import asked
from drawn import drawn
from hypothesis import Phase
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

from apoq import DuplicateTask, Queue, Task
from apoq.core.states import CANCELLED, COMPLETED, FAILED, FINAL, PENDING, RUNNING
from apoq.postgres.connections import execute, own_engine
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.claim import CLAIM_TOKEN, ID, claim
from apoq.schema.statements.recover import forget_dead, forget_unknown, give_back, rescue
from apoq.schema.statements.settle import complete, remove
from apoq.worker.settling.result_writer import write_settlements
from apoq.worker.unique_keys import lacking, pending_without_key, take_free_keys

pytestmark = pytest.mark.slow

QUEUE = Queue()
TASKS = sa.text("SELECT id, state, unique_key, held_unique_key, data FROM apoq_tasks ORDER BY id")
MOST_OPEN = 5


@dataclass
class Known:
    """A task, as it ought to stand in the database."""

    id: int
    key: str | None
    is_until_end: bool
    data: int
    state: str = PENDING
    is_held: bool = True
    token: int = 0

    def end(self, state: str) -> None:
        self.state, self.is_held = state, False


@dataclass
class Open:
    """A caller who was given a task that had the key, and hasn't committed."""

    session: Session
    task: Known
    token: int


class UniqueTasks(RuleBasedStateMachine):
    def __init__(self, engine: sa.Engine, own: sa.Engine) -> None:
        super().__init__()
        self.engine = engine
        self.own = own
        self.worker = uuid4()
        self.numbers = count(1)
        self.data = count(1)
        self.tasks: dict[int, Known] = {}
        self.open: list[Open] = []

    @initialize()
    def begin(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(sa.text("TRUNCATE apoq_tasks, apoq_claims"))

    def teardown(self) -> None:
        for caller in self.open:
            caller.session.close()

    # Callers

    @rule(
        key=st.sampled_from(["a", "b", None]),
        until=st.sampled_from(["started", "ended"]),
        on_conflict=st.sampled_from(["skip", "replace", "raise"]),
        stays_open=st.booleans(),
    )
    def add(self, key: str | None, until: str, on_conflict: str, stays_open: bool) -> None:
        data = next(self.data)
        options = {"unique_key": key, "unique_until": until, "on_conflict": on_conflict} if key else {}
        session = Session(self.engine, expire_on_commit=False)
        holder = self._holder(key)
        try:
            task = QUEUE.add(session, "t", data, **options)
        except DuplicateTask as error:
            assert (on_conflict, error.task_id) == ("raise", holder and holder.id)  # noqa: PT017
            session.rollback()
            session.close()
            return
        if holder is None:
            assert task.is_new
            self.tasks[task.id] = Known(task.id, key, until == "ended", data, is_held=key is not None)
        else:
            assert task.id == holder.id
            is_replaced = on_conflict == "replace" and holder.state == PENDING
            assert task.add_outcome == ("replaced" if is_replaced else "kept")
            if is_replaced:
                holder.data, holder.is_until_end = data, until == "ended"
            elif holder.state == PENDING and stays_open and len(self.open) < MOST_OPEN:
                self.open.append(Open(session, holder, holder.token))
                return
        session.commit()
        session.close()

    @precondition(lambda self: self.open)
    @rule()
    def commit(self) -> None:
        """The task that was kept has not been claimed meanwhile: a run begins after the commit."""
        caller = self.open.pop(0)
        caller.session.commit()
        caller.session.close()
        assert caller.task.token == caller.token
        assert caller.task.state in {PENDING, CANCELLED}

    @precondition(lambda self: self._in(PENDING, RUNNING))
    @rule(task=st.runner().flatmap(lambda self: st.sampled_from(self._in(PENDING, RUNNING))))
    def cancel(self, task: Known) -> None:
        with Session(self.engine) as session, session.begin():
            assert QUEUE.cancel(session, task.id)
        task.end(CANCELLED)

    @precondition(lambda self: self.tasks)
    @rule(key=st.sampled_from(["a", "b"]))
    def cancel_by_key(self, key: str) -> None:
        holder = self._holder(key)
        with Session(self.engine) as session, session.begin():
            assert QUEUE.cancel(session, unique_key=key) is (holder is not None)
        if holder:
            holder.end(CANCELLED)

    @precondition(lambda self: self._deletable())
    @rule(task=st.runner().flatmap(lambda self: st.sampled_from(self._deletable())))
    def delete(self, task: Known) -> None:
        with Session(self.engine) as session, session.begin():
            session.delete(session.get(Task, task.id))
        del self.tasks[task.id]

    @precondition(lambda self: self.tasks)
    @rule(task=st.runner().flatmap(lambda self: st.sampled_from(list(self.tasks.values()))))
    def retry(self, task: Known) -> None:
        is_possible = task.state in FINAL and self._holder(task.key) is None
        with Session(self.engine) as session, session.begin():
            assert QUEUE.retry(session, task.id) is is_possible
        if is_possible:
            task.state, task.is_held = PENDING, task.key is not None

    # Workers

    @rule(at_most=st.integers(1, 3))
    def claim(self, at_most: int) -> None:
        parameters = {**asked(at_most=at_most), "by_worker": self.worker, "number": next(self.numbers)}
        rows = execute(self.own, claim(None), parameters).fetchall()

        locked = {caller.task.id for caller in self.open}
        claimable = [task for task in self._in(PENDING) if task.id not in locked]
        assert len(rows) == min(at_most, len(claimable))
        for row in rows:
            task = self.tasks[row[ID]]
            assert task in claimable
            task.state, task.token = RUNNING, row[CLAIM_TOKEN]
            task.is_held &= task.is_until_end

    @precondition(lambda self: self._in(RUNNING))
    @rule(task=st.runner().flatmap(lambda self: st.sampled_from(self._in(RUNNING))), keeps=st.booleans())
    def complete(self, task: Known, keeps: bool) -> None:
        parameters = {"ids": array_text([task.id]), "held_under": task.token}
        execute(self.own, (complete if keeps else remove)(None, alike=True), parameters)
        task.end(COMPLETED)
        if not keeps:
            del self.tasks[task.id]

    @precondition(lambda self: self._in(RUNNING))
    @rule(
        task=st.runner().flatmap(lambda self: st.sampled_from(self._in(RUNNING))),
        state=st.sampled_from([FAILED, PENDING, PENDING, CANCELLED]),
    )
    def settle(self, task: Known, state: str) -> None:
        """Fail, retry or snooze, release, or cancel."""
        parameters = {
            "ids": array_text([task.id]),
            "tokens": array_text([task.token]),
            "states": [state],
            "attempts": [1],
            "fail_counts": [0],
            "delays": [-10.0],
            "errors": [None],
        }
        written = execute(self.own, write_settlements(None, full=False), parameters).mappings()
        assert len(written) == 1
        take_free_keys(partial(execute, self.own), None, pending_without_key(written))
        if state == PENDING:
            self._pending_again([task])
        else:
            task.end(state)

    @precondition(lambda self: self._in(RUNNING))
    @rule(by=st.sampled_from(["its own", "another"]))
    def recover(self, by: str) -> None:
        """Give all running tasks back, or rescue them."""
        if by == "its own":
            parameters = {"by_worker": self.worker, "known": "{}", "held": "{}", "latest": 2**62}
            ((left, ids),) = execute(self.own, give_back(None), parameters)
            assert left == 0
            execute(self.own, forget_unknown(None), parameters)
        else:
            parameters = {"dead": [self.worker], "at_most": 1_000, "reason": "{}"}
            rows = execute(self.own, rescue(None), parameters).fetchall()
            assert len(rows) == len(self._in(RUNNING))
            ids = lacking(rows)
            execute(self.own, forget_dead(None), parameters)
        take_free_keys(partial(execute, self.own), None, ids or ())
        self._pending_again(self._in(RUNNING))

    # What must be true

    @invariant()
    def every_row_is_as_the_model_says(self) -> None:
        with self.engine.connect() as connection:
            rows = [tuple(row) for row in connection.execute(TASKS)]
        assert rows == [
            (task.id, task.state, task.key, task.key if task.is_held else None, task.data)
            for task in sorted(self.tasks.values(), key=lambda task: task.id)
        ]

    @invariant()
    def no_key_is_held_twice_or_by_a_task_that_has_ended(self) -> None:
        held = [task for task in self.tasks.values() if task.is_held and task.key]
        assert len({task.key for task in held}) == len(held)
        assert not [task for task in held if task.state in FINAL]

    def _holder(self, key: str | None) -> Known | None:
        return next((task for task in self.tasks.values() if key and task.key == key and task.is_held), None)

    def _pending_again(self, tasks: list[Known]) -> None:
        for task in sorted(tasks, key=lambda task: task.id):
            task.state = PENDING
            task.is_held = task.is_held or (task.key is not None and self._holder(task.key) is None)

    def _in(self, *states: str) -> list[Known]:
        return [task for task in self.tasks.values() if task.state in states]

    def _deletable(self) -> list[Known]:
        """A DELETE would wait for the callers who were given the task."""
        locked = {caller.task.id for caller in self.open}
        return [task for task in self.tasks.values() if task.id not in locked]


@pytest.fixture
def own(engine):
    own = own_engine(engine)
    yield own
    own.dispose()


@pytest.mark.as_owner("only an operator retries tasks with unique keys")
def test_whatever_happens_a_key_is_held_by_one_task_that_has_not_ended(engine, own):
    run_state_machine_as_test(
        partial(UniqueTasks, engine, own),
        settings=drawn(40, stateful_step_count=40, phases=[Phase.explicit, Phase.generate]),
    )
