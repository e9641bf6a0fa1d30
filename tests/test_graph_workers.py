"""Workers that unblock tasks: crashes, locks, isolation levels, and rows that others delete."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import probe
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from test_graphs import check_blockers, set_up, states
from waiting import patience

from apoq import Queue, RunningTask, Task, Worker
from apoq.worker.maintenance.links_sweep import LinksSweep

until = patience(20)


@pytest.fixture
def ran() -> list[int]:
    return []


def ended(engine: sa.Engine, state: str = "completed") -> int:
    with Session(engine) as session:
        return session.scalar(sa.select(sa.func.count()).where(Task.state == state))


def run_all(worker: Worker) -> None:
    while worker.work():
        pass


# Locks of callers.


@pytest.mark.parametrize(("count", "seconds"), [(40, 1), pytest.param(350, 8, marks=pytest.mark.slow)])
def test_a_caller_who_holds_a_child_delays_that_child_only(engine, make_worker, ran, count, seconds):
    """While the caller holds the row for so many seconds, it adds so many plain tasks, evenly spread."""
    queue = Queue()
    worker = make_worker(queue, poll_interval=0.2)
    set_up(worker, ran)
    completed: dict[int, float] = {}
    worker.events.on("task.completed", lambda task: completed.setdefault(task.id, time.monotonic()))
    with Session(engine, expire_on_commit=False) as session, session.begin():
        parent = queue.add(session, "t", {"n": 1}, delay=0.5)
        held = queue.add(session, "t", {"n": 2}, after=[parent])
        queue.add(session, "t", {"n": 3}, after=[parent])
        other = queue.add(session, "t", {"n": 4}, delay=0.5)
        queue.add(session, "t", {"n": 5}, after=[other])
    added: dict[int, float] = {}
    with engine.connect() as caller:
        caller.execute(sa.select(Task.id).where(Task.id == held.id).with_for_update())
        held_since = time.monotonic()
        worker.start()
        until(lambda: {1, 3, 4, 5} <= {*ran}, 10)
        first = time.monotonic()
        for number in range(count):
            with Session(engine, expire_on_commit=False) as session, session.begin():
                plain = queue.add(session, "t", {"n": 100})
            added[plain.id] = time.monotonic()
            time.sleep(max(0, first + number * seconds / count - time.monotonic()))
        until(lambda: added.keys() <= completed.keys())
        until(lambda: time.monotonic() > held_since + seconds, seconds + 1)
        assert 2 not in ran
        caller.rollback()
    after = until(lambda: 2 in ran, 5)

    delays = sorted(completed[id_] - at for id_, at in added.items())
    figures = f"median {1000 * delays[count // 2]:.1f} ms, longest {1000 * delays[-1]:.1f} ms"
    print(f"{count} plain tasks: {figures}; the child {1000 * after:.0f} ms after its release")
    assert delays[-1] < 1.0
    assert worker.is_healthy()


def test_a_caller_adds_a_task_after_a_locked_one_without_waiting(engine, make_worker, ran):
    queue = Queue()
    worker = make_worker(queue, poll_interval=0.2)
    set_up(worker, ran)
    with Session(engine, expire_on_commit=False) as session, session.begin():
        parent = queue.add(session, "t", {"n": 1}, delay=0.5)
    worker.start()
    with engine.connect() as original:  # such as a worker of the Node.js original, while it runs the task
        original.execute(sa.select(Task.id).where(Task.id == parent.id).with_for_update())
        began = time.monotonic()
        with Session(engine) as session, session.begin():
            queue.add(session, "t", {"n": 2}, after=[parent])
        assert time.monotonic() - began < 1
        original.execute(
            sa.update(Task).where(Task.id == parent.id).values(state="completed", completed_at=sa.func.now())
        )
        original.commit()

    until(lambda: ran == [2], 10)


# Isolation levels.


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_group_of_tasks_with_sessions_uses_no_attempt_up(engine, level):
    queue = Queue()
    twin = sa.create_engine(engine.url, isolation_level=level, pool_size=8)
    ran = []

    @queue.task
    def member(task: RunningTask) -> None:
        task.session.execute(sa.text("INSERT INTO members VALUES (:id)"), {"id": task.id})

    @queue.task
    def finish() -> None:
        ran.append("finish")

    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE members (id bigint)")
    with Session(engine) as session, session.begin(), queue.group(session) as group:
        group.add_many([member.call()] * 200)
        group.then(finish.call())
    worker = Worker(twin, queue, concurrency=6)
    worker.start()
    try:
        until(lambda: ran == ["finish"], 60)
        until(lambda: ended(engine) == 201)
    finally:
        worker.stop()
        twin.dispose()

    with Session(engine) as session:
        attempts = session.execute(sa.select(Task.attempt, Task.fail_count).distinct()).all()
        assert attempts == [(1, 0)]
        assert session.scalar(sa.text("SELECT count(DISTINCT id) FROM members")) == 200
        check_blockers(session)


# A member that has timed out, and goes on.


class Holding:
    """Adds a task to its group, and holds its transaction open until it may end."""

    def __init__(self) -> None:
        self.has_added, self.may_end = threading.Event(), threading.Event()

    def __call__(self, task: RunningTask) -> None:
        task.group.add("note")
        task.session.flush()
        self.has_added.set()
        self.may_end.wait(30)


def test_a_member_that_exceeds_its_timeout_and_has_added_to_its_group_holds_up_no_other_graph(engine, queue):
    hold, ran = Holding(), []
    worker = Worker(engine, queue, concurrency=4)
    worker.use("hold", hold, timeout=0.5, retry_limit=0)
    worker.use("note", lambda task: ran.append(task.data))
    with Session(engine) as session, session.begin(), queue.group(session) as group:
        group.add("hold")
        group.then("note", "last step")
    worker.start()
    try:
        assert hold.has_added.wait(10)
        until(lambda: has_failed(engine), 10)
        with Session(engine) as session, session.begin():
            first = queue.add(session, "note", "first")
            queue.add(session, "note", "second", after=[first])

        until(lambda: ran == ["first", "second"], 8)
    finally:
        hold.may_end.set()
        worker.stop()


def test_a_running_member_that_has_added_to_its_group_is_cancelled_without_waiting_for_it(engine, queue):
    hold, ran = Holding(), []
    worker = Worker(engine, queue, concurrency=2)
    worker.use("hold", hold)
    worker.use("note", lambda task: ran.append(task.data))
    with Session(engine, expire_on_commit=False) as session, session.begin(), queue.group(session) as group:
        member = group.add("hold")
        group.then("note", "last step")
    worker.start()
    try:
        assert hold.has_added.wait(10)
        with Session(engine) as session, session.begin():
            session.execute(sa.text("SET LOCAL statement_timeout = '5s'"))
            assert queue.cancel(session, member)
        hold.may_end.set()

        def is_applied() -> bool:
            """Sweep as another worker does; until the transaction has ended, the edge is locked."""
            probe.sweep_links(Worker(engine, queue))
            return ended(engine, "cancelled") == 2

        until(is_applied)
        assert ran == []
    finally:
        hold.may_end.set()
        worker.stop()


def has_failed(engine: sa.Engine) -> bool:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.exists().where(Task.state == "failed")))


# What a crash leaves behind.


def leave_uncounted(engine: sa.Engine, *parents: Task) -> None:
    """Complete tasks as a worker that dies between its commit and the next statement."""
    with engine.begin() as connection:
        ids = [task.id for task in parents]
        connection.execute(
            sa.update(Task).where(Task.id.in_(ids)).values(state="completed", completed_at=sa.func.now())
        )
        connection.execute(
            sa.text("UPDATE apoq_links SET is_done = true WHERE parent_id = ANY(:ids)"), {"ids": ids}
        )


def test_a_crash_before_the_count_delays_a_child_until_the_sweep(engine, make_worker, ran):
    queue = Queue()
    worker = make_worker(queue)
    set_up(worker, ran)
    with Session(engine, expire_on_commit=False) as session, session.begin():
        parents = [queue.add(session, "t", {"n": n}) for n in range(3)]
        queue.add(session, "t", {"n": 9}, after=parents)
    leave_uncounted(engine, *parents)

    probe.sweep_links(worker)
    run_all(worker)

    assert ran == [9]
    with Session(engine) as session:
        check_blockers(session)


def test_a_crash_before_the_cascade_delays_the_children_until_the_sweep(engine, make_worker, ran):
    queue = Queue()
    worker = make_worker(queue)
    set_up(worker, ran)
    with Session(engine, expire_on_commit=False) as session, session.begin():
        parent = queue.add(session, "t", {"n": 1})
        child = queue.add(session, "t", {"n": 2}, after=[parent])
        below = queue.add(session, "t", {"n": 3}, after=[child])
        freed = queue.add(session, "t", {"n": 4}, after=[child], on_parent_failure="run")
        session.execute(
            sa.update(Task).where(Task.id == parent.id).values(state="failed", failed_at=sa.func.now())
        )

    probe.sweep_links(worker)
    run_all(worker)

    assert ran == [4]
    with Session(engine) as session:
        assert states(session, child, below, freed) == ["cancelled", "cancelled", "completed"]


def test_the_children_of_a_task_that_was_deleted_by_hand_are_cancelled(engine, make_worker, ran):
    queue = Queue()
    worker = make_worker(queue)
    set_up(worker, ran)
    with Session(engine, expire_on_commit=False) as session, session.begin():
        parent = queue.add(session, "t", {"n": 1})
        child = queue.add(session, "t", {"n": 2}, after=[parent])
    with engine.begin() as connection:
        connection.execute(sa.delete(Task).where(Task.id == parent.id))

    probe.sweep_links(worker)

    with Session(engine) as session:
        assert session.get(Task, child.id).error["message"] == f"parent {parent.id} (?) was deleted"
        assert states(session, child) == ["cancelled"]


def test_the_sweep_walks_through_more_edges_than_it_reads_at_once(engine, make_worker, ran, monkeypatch):
    monkeypatch.setattr("apoq.worker.maintenance.links_sweep.STEP_SIZE", 4)
    queue = Queue()
    worker = make_worker(queue)
    set_up(worker, ran)
    with Session(engine, expire_on_commit=False) as session, session.begin():
        first = queue.add(session, "t", {"n": 0}, delay=1_000)
        parents = [queue.add(session, "t", {"n": 1}) for _ in range(10)]
        for n in range(10):
            queue.add(session, "t", {"n": n + 10}, after=parents + ([first] if n < 5 else []))
    leave_uncounted(engine, *parents)

    probe.sweep_links(worker)
    run_all(worker)

    assert sorted(ran) == [15, 16, 17, 18, 19]


# Rows that are deleted.


def test_completed_tasks_that_are_not_kept_unblock_too(engine, make_worker, ran):
    queue = Queue()
    worker = make_worker(queue, keep_completed=0)
    set_up(worker, ran)
    with Session(engine) as session, session.begin():
        first = queue.add(session, "t", {"n": 1})
        second = queue.add(session, "write", {"n": 2}, after=[first])
        queue.add(session, "t", {"n": 3}, after=[first, second])

    run_all(worker)

    assert ran == [1, 2, 3]
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM apoq_tasks")) == 0
        assert connection.scalar(sa.text("SELECT count(*) FROM apoq_links")) == 0


def test_a_task_that_a_waiting_task_waits_for_is_not_pruned(engine, make_worker, ran):
    queue = Queue()
    worker = make_worker(queue, keep_failed=timedelta(seconds=1), keep_completed=timedelta(seconds=1))
    set_up(worker, ran)
    with Session(engine, expire_on_commit=False) as session, session.begin():
        bad = queue.add(session, "fail", {"n": 1})
        held = queue.add(session, "t", {"n": 2}, after=[bad], on_parent_failure="hold")
        gone = queue.add(session, "fail", {"n": 3})
        queue.add(session, "t", {"n": 4}, after=[gone])
    run_all(worker)
    with engine.begin() as connection:
        past = sa.func.now() - timedelta(hours=1)
        connection.execute(sa.update(Task).where(Task.failed_at.is_not(None)).values(failed_at=past))
        connection.execute(sa.update(Task).where(Task.cancelled_at.is_not(None)).values(cancelled_at=past))

    probe.prune(worker)
    probe.own_engine(worker).dispose()

    with Session(engine) as session:
        assert session.scalars(sa.select(Task.id).order_by(Task.id)).all() == [bad.id, held.id]
        edges = session.execute(sa.text("SELECT parent_id, child_id FROM apoq_links")).all()
        assert edges == [(bad.id, held.id)]


# Races.


def test_a_child_that_is_added_while_its_parent_completes_runs_once(engine, make_worker, ran):
    """A child after an older task, in every order of their commits, many times."""
    queue = Queue()
    worker = make_worker(queue, concurrency=4, poll_interval=0.2)
    set_up(worker, ran)
    worker.start()
    children = 60
    for n in range(children):
        with Session(engine, expire_on_commit=False) as session:
            parent = queue.add(session, "write" if n % 2 else "t", {"n": -1})
            session.commit()
            time.sleep(0.0005 * (n % 7))
            queue.add(session, "t", {"n": n}, after=[parent])
            session.commit()

    until(lambda: sum(n >= 0 for n in ran) == children, 20)

    assert sorted(n for n in ran if n >= 0) == list(range(children))


def test_two_workers_count_each_edge_once(engine, make_worker):
    queue = Queue()
    ran: list[int] = []
    workers = [make_worker(queue, concurrency=4) for _ in range(2)]
    for worker in workers:
        set_up(worker, ran)
    with Session(engine) as session, session.begin():
        parents = [queue.add(session, "t", {"n": -1}) for _ in range(60)]
        for n in range(20):
            queue.add(session, "t", {"n": n}, after=parents[n : n + 40])
    for worker in workers:
        worker.start()

    until(lambda: ended(engine) == 80)

    assert sorted(n for n in ran if n >= 0) == list(range(20))
    with Session(engine) as session:
        check_blockers(session)


def test_edges_whose_tasks_were_truncated_are_looked_at_once(engine, queue):
    with Session(engine) as session, session.begin():
        parent = queue.add(session, "t")
        session.flush()
    with Session(engine) as session, session.begin():
        queue.add_many(session, "t", [{}] * 1_000, after=[parent])
    with engine.begin() as connection:
        connection.execute(sa.text("TRUNCATE apoq_tasks"))

    with engine.begin() as connection:
        sweep = LinksSweep(None, lambda *statement: connection.execute(*statement).mappings(), 1_000.0)
        sweep.check()
        sweep.check()

    assert sweep.looks_at > time.monotonic() + 1


def test_edges_of_a_last_step_that_is_locked_are_not_looked_at_without_a_pause(engine, queue):
    with Session(engine, expire_on_commit=False) as session, session.begin():
        parents = [queue.add(session, "t") for _ in range(1_000)]
        queue.add(session, "t", after=parents)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE apoq_links SET needs_check = true, is_done = true"))
        connection.execute(sa.update(Task).where(Task.state == "pending").values(state="completed"))
        sweep = LinksSweep(None, lambda *statement: connection.execute(*statement).mappings(), 1_000.0)
        sweep.check()

        sweep.check()  # the child is locked, so nothing was counted meanwhile

    assert sweep.looks_at > time.monotonic()


def test_a_look_at_edges_that_failed_is_repeated_at_the_next_turn():
    def refuse(_statement, _parameters):
        raise RuntimeError

    sweep = LinksSweep(None, refuse, 2.0)

    with pytest.raises(RuntimeError):
        sweep.look()

    assert sweep.looks_at <= time.monotonic()
