"""Tasks that wait for other tasks: what callers can add, and what becomes of it."""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import timedelta

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Fail, InvalidTask, Limit, Queue, RunningTask, Task, Worker, prepare
from apoq.core.dependencies import MAX_PARENTS
from apoq.testing import assert_enqueued, drain
from apoq.testing.clock import travel

until = patience(20)

BLOCKERS = sa.text("""
    SELECT id, coalesce(blockers, 0) AS blockers, (
        SELECT count(*) FROM apoq_links WHERE child_id = id AND NOT is_counted
    ) AS open FROM apoq_tasks
""")
LOCKED = sa.text(
    "SELECT EXISTS (SELECT FROM pg_stat_activity "
    "WHERE datname = current_database() AND wait_event_type = 'Lock')"
)
SERIALIZABLE = ("REPEATABLE READ", "SERIALIZABLE")


def is_waiting_for_a_lock(engine: sa.Engine) -> bool:
    with engine.connect() as connection:
        return connection.scalar(LOCKED)


def states(session: Session, *tasks: Task) -> list[str]:
    ids = [task.id for task in tasks]
    found = dict(session.execute(sa.select(Task.id, Task.state).where(Task.id.in_(ids))).all())
    return [found[id_] for id_ in ids]


def check_blockers(session: Session) -> None:
    """Check what must hold at any time: `blockers` is the number of edges that aren't counted."""
    rows = session.execute(BLOCKERS).all()
    assert [row.id for row in rows if row.blockers != row.open] == []


@pytest.fixture
def ran() -> list[int]:
    return []


@pytest.fixture
def crew(shared_engine, queue, ran) -> Worker:
    """A worker, not started, whose tasks note their numbers."""
    made = Worker(shared_engine, queue)
    set_up(made, ran)
    return made


def set_up(worker: Worker, ran: list[int]) -> None:
    def run(task: RunningTask) -> None:
        ran.append(task.data["n"])

    def fail(task: RunningTask) -> None:
        run(task)
        raise Fail

    def write(task: RunningTask) -> None:
        task.session.execute(sa.text("SELECT 1"))
        run(task)

    for name, processor in (("t", run), ("fail", fail), ("write", write)):
        worker.use(name, processor)


def run_failing_graph(engine: sa.Engine, worker: Worker, queue: Queue) -> list[int]:
    """Run a task that fails, with one that is held by it, and two below, of which the last waits for both."""
    set_up(worker, [])
    with Session(engine) as session, session.begin():
        bad = queue.add(session, "fail", {"n": 1})
        held = queue.add(session, "t", {"n": 2}, after=[bad], on_parent_failure="hold")
        left = queue.add(session, "t", {"n": 3}, after=[held])
        right = queue.add(session, "t", {"n": 4}, after=[held, left])
        ids = [task.id for task in (bad, held, left, right)]
    while worker.work():
        pass
    return ids


# Waiting and running.


def test_a_task_waits_until_all_of_its_parents_have_completed(session, queue, crew, ran):
    first, second = queue.add(session, "t", {"n": 1}), queue.add(session, "write", {"n": 2})
    child = queue.add(session, "t", {"n": 3}, after=[second, first.id])
    assert (child.state, child.waiting_for, child.blockers) == ("waiting", "parents", 2)
    assert child.waiting_since == child.created_at

    drain(session, crew)

    assert ran == [1, 2, 3]
    assert states(session, first, second, child) == ["completed"] * 3
    check_blockers(session)


def test_a_task_runs_after_parents_that_were_added_before_or_have_completed(engine, make_worker, ran):
    queue = Queue()
    worker = make_worker(queue)
    set_up(worker, ran)
    with Session(engine, expire_on_commit=False) as session:
        done, later = queue.add(session, "t", {"n": 1}), queue.add(session, "t", {"n": 2}, delay=1)
        session.commit()
        worker.start()
        until(lambda: states(session, done) == ["completed"])
        queue.add(session, "t", {"n": 3}, after=[done])
        queue.add(session, "t", {"n": 4}, after=[done, later])
        queue.add(session, "t", {"n": 5}, after=[later, done], delay=1.3)
        session.commit()

    until(lambda: len(ran) == 5, 5)

    assert (ran.index(2) < ran.index(4), ran[-1]) == (True, 5)


def test_work_without_starting_knows_edges(engine, worker, queue, ran):
    set_up(worker, ran)
    with Session(engine, expire_on_commit=False) as session:
        old = queue.add(session, "t", {"n": 1})
        session.commit()
        queue.add(session, "t", {"n": 3}, after=[queue.add(session, "t", {"n": 2}, after=[old])])
        session.commit()

    while worker.work():
        pass

    assert ran == [1, 2, 3]


def test_a_waiting_task_keeps_its_own_time(session, queue, crew, ran):
    parent = queue.add(session, "t", {"n": 1})
    queue.add(session, "t", {"n": 2}, after=[parent], delay=3_600)

    drain(session, crew)
    assert ran == [1]
    with travel(session, timedelta(hours=2)):
        drain(session, crew)

    assert ran == [1, 2]


def test_a_task_is_due_when_it_is_unblocked(engine, worker, queue, ran):
    """So that it isn't behind the place from which workers claim."""
    set_up(worker, ran)
    with Session(engine, expire_on_commit=False) as session:
        parent = queue.add(session, "t", {"n": 1})
        child = queue.add(session, "t", {"n": 2}, after=[parent])
        session.commit()
        time.sleep(0.05)
        worker.work()

        session.refresh(child)

    assert child.process_at > child.created_at + timedelta(seconds=0.05)
    assert (child.state, child.waiting_since, child.waiting_for, child.blockers) == ("pending", None, None, 0)


def test_add_many_waits_too(session, queue, crew, ran):
    parents = [queue.add(session, "t", {"n": n}) for n in range(3)]

    assert queue.add_many(session, "t", [{"n": n} for n in range(10, 14)], after=parents) == 4
    check_blockers(session)
    drain(session, crew)

    assert (ran[:3], sorted(ran[3:])) == ([0, 1, 2], [10, 11, 12, 13])


def test_typed_tasks_wait(session, queue):
    ran = []

    @queue.task
    def step(n: int) -> None:
        ran.append(n)

    first = step.add(session, 1)
    later = step.using(after=iter([first]), on_parent_failure="run")
    later.add(session, 2)
    later.add_many(session, [step.call(3), step.call(4)])

    assert [task.state for task in (assert_enqueued(session, step, n=n) for n in (2, 3, 4))] == [
        "waiting"
    ] * 3
    drain(session, queue)
    assert ran == [1, 2, 3, 4]


def test_tasks_are_added_with_psycopg(engine, worker, ran):
    queue = Queue()
    set_up(worker, ran)
    dsn = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn) as connection:
        first = queue.add(connection, "t", {"n": 1})
        queue.add(connection, "t", {"n": 2}, after=[first])

    while worker.work():
        pass

    assert ran == [1, 2]


def test_tasks_are_added_in_a_schema(engine, make_worker, ran):
    prepare(engine, schema="own")
    queue = Queue(schema="own")
    worker = make_worker(queue)
    set_up(worker, ran)
    with Session(engine) as session, session.begin():
        first = queue.add(session, "t", {"n": 1})
        queue.add(session, "t", {"n": 2}, after=[first])
        with queue.group(session) as group:
            group.add("t", {"n": 3}, after=[first])
            group.then("t", {"n": 4})

    while worker.work():
        pass

    assert sorted(ran) == [1, 2, 3, 4]
    assert ran.index(1) < min(ran.index(2), ran.index(3))
    assert ran.index(3) < ran.index(4)


@pytest.mark.parametrize("keep_completed", [0, None])
def test_a_unique_task_waits_once(engine, make_worker, queue, ran, keep_completed):
    worker = make_worker(queue, keep_completed=keep_completed)
    set_up(worker, ran)
    with Session(engine) as session, session.begin():
        first = queue.add(session, "t", {"n": 1})
        unique = {"after": [first], "unique_key": "k"}
        assert queue.add(session, "t", {"n": 2}, **unique).is_new
        assert not queue.add(session, "t", {"n": 3}, **unique).is_new

    while worker.work():
        pass

    assert ran == [1, 2]
    with Session(engine) as session:
        rows = session.scalar(sa.text("SELECT count(*) FROM apoq_links"))
        assert rows == (0 if keep_completed == 0 else 1)


# Parents that don't complete.


def test_a_failure_cancels_or_frees_or_holds(session, queue, crew, ran):
    bad = queue.add(session, "fail", {"n": 1})
    cancelled = queue.add(session, "t", {"n": 2}, after=[bad])
    below = queue.add(session, "t", {"n": 3}, after=[cancelled])
    freed = queue.add(session, "t", {"n": 4}, after=[bad], on_parent_failure="run")
    freed_below = queue.add(session, "t", {"n": 5}, after=[cancelled], on_parent_failure="run")
    held = queue.add(session, "t", {"n": 6}, after=[bad], on_parent_failure="hold")

    drain(session, crew, errors="record")

    assert ran == [1, 4, 5]
    assert states(session, cancelled, below, held) == ["cancelled", "cancelled", "waiting"]
    assert states(session, freed, freed_below) == ["completed"] * 2
    session.refresh(cancelled)
    assert cancelled.error["class"] == "ParentFailed"
    assert cancelled.error["message"] == f"parent {bad.id} (fail) failed"
    check_blockers(session)


def test_cancelling_a_task_cancels_those_that_wait_for_it(session, queue, crew, ran):
    first = queue.add(session, "t", {"n": 1})
    second = queue.add(session, "t", {"n": 2}, after=[first])
    third = queue.add(session, "t", {"n": 3}, after=[second])
    freed = queue.add(session, "t", {"n": 4}, after=[third, first], on_parent_failure="run")

    assert queue.cancel(session, first)

    assert states(session, first, second, third, freed) == ["cancelled"] * 3 + ["waiting"]
    drain(session, crew)
    assert ran == [4]


def test_retrying_a_parent_heals_the_graph(session, queue, crew, ran):
    bad = queue.add(session, "fail", {"n": 1})
    child = queue.add(session, "t", {"n": 2}, after=[bad])
    below = queue.add(session, "t", {"n": 3}, after=[child, bad])
    by_hand = queue.add(session, "t", {"n": 4}, after=[bad], on_parent_failure="hold")
    queue.cancel(session, by_hand)
    held = queue.add(session, "t", {"n": 5}, after=[bad], on_parent_failure="hold")
    drain(session, crew, errors="record")
    session.execute(sa.update(Task).where(Task.id == bad.id).values(type="t"))

    assert queue.retry(session, bad, with_cancelled=True)
    assert states(session, child, below, by_hand, held) == ["waiting", "waiting", "cancelled", "waiting"]
    drain(session, crew)

    assert (ran[:2], ran[-1], sorted(ran)) == ([1, 1], 3, [1, 1, 2, 3, 5])
    check_blockers(session)


def test_a_child_waits_again_when_all_of_its_parents_that_had_failed_are_retried(session, queue, crew, ran):
    first, second = (queue.add(session, "fail", {"n": n}) for n in (1, 2))
    child = queue.add(session, "t", {"n": 3}, after=[first, second])
    below = queue.add(session, "t", {"n": 4}, after=[child, first])
    drain(session, crew, errors="record")
    session.execute(sa.update(Task).where(Task.type == "fail").values(type="t"))

    queue.retry(session, first, with_cancelled=True)
    drain(session, crew)
    assert states(session, child, below) == ["cancelled", "cancelled"]
    queue.retry(session, second, with_cancelled=True)
    drain(session, crew)

    assert ran == [1, 2, 1, 2, 3, 4]
    check_blockers(session)


def test_a_child_waits_again_when_two_sessions_retry_its_parents_at_once(engine, queue, crew):
    with Session(engine, expire_on_commit=False) as session, session.begin():
        first, second = (queue.add(session, "t") for _ in range(2))
        child = queue.add(session, "t", after=[first, second])
        queue.cancel(session, first)
        queue.cancel(session, second)

    other = Session(engine)
    retrying = threading.Thread(target=queue.retry, args=(other, second), kwargs={"with_cancelled": True})
    with Session(engine) as session, session.begin():
        assert queue.retry(session, first, with_cancelled=True)
        retrying.start()
        until(lambda: is_waiting_for_a_lock(engine))
    retrying.join()
    with other:
        other.commit()

    with Session(engine) as session:
        assert states(session, child) == ["waiting"]


@pytest.mark.as_owner("only an operator may retry tasks with unique keys")
def test_a_child_that_waits_again_has_its_unique_key(session, queue, crew):
    bad = queue.add(session, "fail", {"n": 1})
    child, taken = (
        queue.add(session, "t", {"n": 2}, after=[bad], unique_key=key) for key in ("free", "taken")
    )
    drain(session, crew, errors="record")
    other = queue.add(session, "t", {"n": 3}, unique_key="taken")

    queue.retry(session, bad, with_cancelled=True)

    assert states(session, child, taken, other) == ["waiting", "cancelled", "pending"]
    assert not queue.add(session, "t", {"n": 4}, unique_key="free").is_new


def test_without_with_cancelled_only_the_parent_is_retried(session, queue, crew, ran):
    bad = queue.add(session, "fail", {"n": 1})
    child = queue.add(session, "t", {"n": 2}, after=[bad])
    drain(session, crew, errors="record")

    assert queue.retry(session, bad)
    drain(session, crew, errors="record")

    assert ran == [1, 1]
    assert states(session, child) == ["cancelled"]


def test_a_child_whose_parents_have_not_completed_is_retried_into_waiting(session, queue, crew, ran):
    bad = queue.add(session, "fail", {"n": 1})
    child = queue.add(session, "t", {"n": 2}, after=[bad])
    drain(session, crew, errors="record")

    assert queue.retry(session, child)
    assert states(session, child) == ["waiting"]
    drain(session, crew)
    assert states(session, child) == ["waiting"]  # and the same failure doesn't cancel it again
    session.execute(sa.update(Task).where(Task.id == bad.id).values(type="t"))
    queue.retry(session, bad)
    drain(session, crew)

    assert ran == [1, 1, 2]


def test_a_second_failure_is_applied_again(session, queue, crew):
    bad = queue.add(session, "fail", {"n": 1})
    child = queue.add(session, "t", {"n": 2}, after=[bad])
    drain(session, crew, errors="record")
    queue.retry(session, bad, with_cancelled=True)

    drain(session, crew, errors="record")

    assert states(session, bad, child) == ["failed", "cancelled"]


def test_a_parent_that_has_completed_and_is_retried_unblocks_nothing_twice(session, queue, crew, ran):
    parent = queue.add(session, "t", {"n": 1})
    child = queue.add(session, "t", {"n": 2}, after=[parent])
    drain(session, crew)

    queue.retry(session, parent)
    drain(session, crew)

    assert ran == [1, 2, 1]
    session.refresh(child)
    assert (child.attempt, child.blockers) == (1, 0)


def test_a_wide_and_deep_graph_is_cancelled_completely(session, queue):
    root = queue.add(session, "t")
    queue.add_many(session, "t", [{}] * 1_500, after=[root])
    middle = queue.add(session, "t", after=[root])
    queue.add_many(session, "t", [{}] * 1_200, after=[middle])

    queue.cancel(session, root)

    assert session.scalars(sa.select(Task.state).distinct()).all() == ["cancelled"]
    assert queue.retry(session, root, with_cancelled=True)
    found = dict(session.execute(sa.select(Task.state, sa.func.count()).group_by(Task.state)).all())
    assert found == {"pending": 1, "waiting": 2_701}


# Chains and groups.


def test_a_chain_runs_one_after_the_other(session, queue):
    ran = []

    @queue.task
    def step(n: int) -> None:
        ran.append(n)

    tasks = queue.chain(session, *(step.call(n) for n in range(5)), priority=3)

    assert [task.state for task in tasks] == ["pending"] + ["waiting"] * 4
    assert [(task.data, task.priority) for task in tasks] == [({"n": n}, 3) for n in range(5)]
    drain(session, queue)
    assert ran == [0, 1, 2, 3, 4]
    check_blockers(session)


def test_the_tasks_of_chains_and_groups_have_their_concurrency_keys(session, queue):
    @queue.task(limit=Limit(1, key=lambda customer: customer))
    def bill(customer: str) -> None: ...

    tasks = queue.chain(session, bill.call("a"), bill.call("b"))
    with queue.group(session) as group:
        tasks.append(group.add(bill.call("c")))
        group.add_many([bill.call("d")])
        group.add_many("t", [{"n": 1}], key="e")
        group.then("t", key="f")

    assert [task.key for task in tasks] == ["a", "b", "c"]
    stored = session.scalars(sa.select(Task.key).order_by(Task.key)).all()
    assert stored == ["a", "b", "c", "d", "e", "f"]


def test_a_chain_waits_for_its_parents_and_its_time(session, queue, crew, ran):
    @queue.task
    def step(n: int) -> None:
        ran.append(n)

    parent = queue.add(session, "t", {"n": 1})
    first, second = queue.chain(session, step.call(2), step.call(3), after=[parent], delay=60)

    assert (first.state, first.process_at > second.process_at) == ("waiting", True)
    drain(session, crew)
    assert ran == [1]
    with travel(session, timedelta(minutes=2)):
        drain(session, queue)
    assert ran == [1, 2, 3]


def test_a_call_in_a_group_keeps_its_options_unless_others_are_given(session, queue):
    @queue.task
    def step(n: int) -> None: ...

    urgent = step.using(priority=5, retry_limit=1)
    with queue.group(session) as group:
        group.add(urgent.call(1))
        group.add(urgent.call(2), priority=6)
        group.then(urgent.call(3), priority=7)
        group.always(urgent.call(4))

    rows = session.execute(sa.select(Task.data["n"].as_integer(), Task.priority, Task.retry_limit)).all()
    assert sorted(rows) == [(1, 5, 1), (2, 6, 1), (3, 7, 1), (4, 5, 1)]


def test_many_calls_must_have_no_options_of_their_own(session, queue):
    @queue.task
    def step(n: int) -> None: ...

    urgent = step.using(priority=5)
    with pytest.raises(InvalidTask, match=r"no options of their own, got priority of '.*step'"):
        queue.chain(session, step.call(1), urgent.call(2))
    with queue.group(session) as group:
        group.then("t")
        with pytest.raises(InvalidTask, match="no options of their own, got priority of"):
            group.add_many([urgent.call(1)])


def test_a_task_with_a_unique_key_can_not_be_in_a_group(session, queue):
    @queue.task(unique=True)
    def step(n: int) -> None: ...

    with queue.group(session) as group:
        group.then(step.using(unique_key=None).call(1))
        with pytest.raises(InvalidTask, match="unique_key can't be given in a chain or a group"):
            group.add(step.call(2))


def test_a_group_closes_when_all_of_it_has_completed(session, queue, crew, ran):
    with queue.group(session, name="import 7") as group:
        first = group.add("t", {"n": 1})
        group.add_many("t", [{"n": 2}, {"n": 3}])
        group.add("t", {"n": 4}, after=[first])
        group.then("t", {"n": 5}, priority=9)
        group.always("t", {"n": 6})

    drain(session, crew)

    assert (sorted(ran[:4]), ran[4:]) == ([1, 2, 3, 4], [5, 6])
    check_blockers(session)
    closing = session.get(Task, group.id)
    assert (closing.data, closing.meta, closing.group_id) == ({"n": 5}, {"apoq.group": "import 7"}, group.id)
    assert session.scalar(sa.select(sa.func.count()).where(Task.group_id == group.id)) == 6


def test_always_runs_after_a_failure_and_then_does_not(session, queue, crew, ran):
    with queue.group(session) as group:
        group.add("fail", {"n": 1})
        group.add("t", {"n": 2})
        group.then("t", {"n": 3})
        group.always("t", {"n": 4})

    drain(session, crew, errors="record")

    assert ran == [1, 2, 4]
    assert states(session, session.get(Task, group.id)) == ["cancelled"]


def test_the_last_tasks_of_an_empty_group_are_due_at_once(session, queue, crew, ran):
    with queue.group(session) as group:
        group.then("t", {"n": 1})
        group.always("t", {"n": 2})

    drain(session, crew)

    assert ran == [1, 2]


def test_a_group_whose_block_fails_is_rolled_back_with_the_transaction(engine, queue):
    with (
        pytest.raises(KeyError),
        Session(engine) as session,
        session.begin(),
        queue.group(session) as group,
    ):
        group.add("t")
        group.then("t")
        raise KeyError

    with Session(engine) as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Task)) == 0


def test_a_group_does_not_wait_for_tasks_of_a_savepoint_that_was_rolled_back(session, queue, crew, ran):
    with queue.group(session) as group:
        group.add("t", {"n": 1})
        with contextlib.suppress(KeyError), session.begin_nested():
            group.add_many("t", [{"n": 2}, {"n": 3}])
            raise KeyError
        group.then("t", {"n": 4})

    drain(session, crew)

    assert ran == [1, 4]
    check_blockers(session)


def test_a_task_adds_others_to_its_group(session, queue):
    ran = []

    @queue.task
    def split(task: RunningTask, n: int) -> None:
        ran.append(n)
        if n:
            task.group.add(split.call(n - 1))
            assert task.group.add_many([split.call(0), split.call(0)]) == 2

    @queue.task
    def finish() -> None:
        ran.append("finish")

    with queue.group(session) as group:
        group.add(split.call(2))
        group.then(finish.call())
        group.always(finish.call())

    drain(session, queue)

    assert (sorted(ran[:-2]), ran[-2:]) == ([0] * 5 + [1, 2], ["finish"] * 2)
    check_blockers(session)


def test_chains_and_groups_are_added_through_asyncio(engine, worker, ran):
    import asyncio

    queue = Queue()
    set_up(worker, ran)

    async def add() -> None:
        twin = create_async_engine(engine.url)
        async with AsyncSession(twin) as session, session.begin():
            first = await queue.add(session, "t", {"n": 1})
            await queue.add(session, "t", {"n": 2}, after=[first])
            async with queue.group(session) as group:
                assert (await group.add("t", {"n": 3}, after=[first])).id
                assert await group.add_many("t", [{"n": 4}]) == 1
                group.then("t", {"n": 5})
            with pytest.raises(InvalidTask, match="async with"), queue.group(session):
                pass
        await twin.dispose()

    asyncio.run(add())
    while worker.work():
        pass

    assert (sorted(ran), ran[-1]) == ([1, 2, 3, 4, 5], 5)


def test_the_results_of_the_parents_come_in_the_order_of_after(session, queue):
    found = []

    @queue.task
    def parent(n: int) -> None:
        """Do nothing."""

    @queue.task
    def child(task: RunningTask) -> None:
        found.append((list(task.parent_results), task.count_parents()))

    tasks = [parent.add(session, n) for n in range(150)]
    child.using(after=tasks[::-1]).add(session)
    for task in tasks:
        session.execute(sa.update(Task).where(Task.id == task.id).values(result={"n": task.data["n"]}))
    drain(session, queue)

    assert found == [([{"n": n} for n in range(149, -1, -1)], (150, 0))]


# Bad input.


def test_what_a_task_can_not_wait_for_is_refused(session, queue, shared_engine):
    elsewhere = Queue(schema="elsewhere").task_class(id=1, type="t")
    gone = queue.add(session, "t")
    session.execute(sa.delete(Task).where(Task.id == gone.id))
    bad = [
        ([elsewhere], "must be in the schema"),
        ([Task(type="t")], "must have an id.*flush"),
        ([gone], "must have tasks that exist"),
        ([2**62], "must have tasks that exist"),
        (range(1, MAX_PARENTS + 2), "at most 1,000 tasks, got 1,001"),
        ("12", "must be a list of tasks or ids"),
        (12, "must be a list of tasks or ids"),
        ([None], "a task's id must be a whole number"),
    ]
    for after, message in bad:
        with pytest.raises(InvalidTask, match=message):
            queue.add(session, "t", after=after)
        with pytest.raises(InvalidTask, match=message):
            queue.add_many(session, "t", [{}], after=after)

    with pytest.raises(InvalidTask, match="'cancel', 'run' or 'hold'"):
        queue.add(session, "t", after=[1], on_parent_failure="stop")
    with pytest.raises(InvalidTask, match="debounce or throttle"):
        queue.add(session, "t", after=[1], unique_key="k", on_conflict="replace")
    with pytest.raises(InvalidTask, match="add each task by `add`"):
        queue.add_many(session, "t", [{}], after=[1], unique_key=str)
    assert session.scalar(sa.select(sa.func.count()).select_from(Task)) == 0


def test_a_group_refuses_what_it_can_not_have(session, queue, crew):
    with (
        pytest.raises(InvalidTask, match="must have a task that runs after it"),
        queue.group(session) as group,
    ):
        group.add("t")
    with pytest.raises(InvalidTask, match="within its `with` block"):
        group.add("t")
    with pytest.raises(InvalidTask, match="within its `with` block"):
        queue.group(session).then("t")
    with queue.group(session) as group:
        group.then("t")
        for options in ({"unique_key": "k"}, {"debounce": 3}):
            with pytest.raises(InvalidTask, match="can't be given in a chain or a group"):
                group.add("t", **options)
        with pytest.raises(InvalidTask, match="after must not be given"):
            group.add_many("t", [{}], after=[1])
        with pytest.raises(InvalidTask, match="items must be"):
            group.add_many("t")
        with pytest.raises(TypeError, match="no option 'colour'"):
            group.add("t", colour="red")
    for calls in ((), ("t",)):
        with pytest.raises(InvalidTask, match="must be given"):
            queue.chain(session, *calls)
    with pytest.raises(InvalidTask, match="keys that begin with apoq"):
        queue.add(session, "t", meta={"apoq.group": "mine"})


def test_a_task_that_is_in_no_group_can_not_add_to_it(session, queue):
    @queue.task
    def alone(task: RunningTask) -> None:
        task.group.add("t")

    alone.add(session)

    with pytest.raises(InvalidTask, match="must be used in a task of a group"):
        drain(session, queue)
