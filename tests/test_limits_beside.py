"""Tasks that need places, beside plain ones, other schemas, and a worker that stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import probe
import pytest
import sqlalchemy as sa
from claims import hold_lease
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Limit, Queue, Task, Worker, prepare
from apoq.core.places import KEY, Share
from apoq.core.states import COMPLETED, PENDING, RUNNING, WAITING
from apoq.events import TaskClaimed
from apoq.schema.statements.places import LOCKS, lock_shares

until = patience(20)

SERIAL = Limit(1, key=True)


@pytest.fixture
def add(engine, queue) -> Callable[..., None]:
    def add(type: str, key: str | None = None, count: int = 1) -> None:
        with Session(engine) as session, session.begin():
            queue.add_many(session, type, [{}] * count, key=None if key is None else lambda _: key)

    return add


def states(engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(Task.state).order_by(Task.id)))


def test_work_claims_one_task_even_if_a_keyed_and_a_plain_one_are_due(engine, worker, add):
    ran = []
    for type_, limit in (("plain", None), ("keyed", SERIAL)):
        worker.use(type_, lambda task: ran.append(task.type), limit=limit, retry_limit=0)
    add("plain")
    add("keyed", "k")

    worker.work()

    assert len(ran) == 1
    assert RUNNING not in states(engine)
    worker.work()
    assert states(engine) == [COMPLETED, COMPLETED]


def test_a_claim_blocks_the_tasks_of_a_full_key_while_another_worker_hands_over_its_place(
    engine, worker, add
):
    worker.use("t", print, limit=SERIAL)
    hold_lease(worker)
    probe.declare_limits(worker)
    add("t", "full", count=2)
    probe.claim_placed(worker, 10)
    add("t", "full")
    add("t", "free")

    with engine.begin() as other:
        other.execute(lock_shares(), {"numbers": list(range(LOCKS))})
        probe.claim_placed(worker, 10)

    probe.dispose(worker)

    assert states(engine) == [RUNNING, WAITING, WAITING, PENDING]


@contextmanager
def gives_away(engine: sa.Engine, task_id: int) -> Iterator[None]:
    """Give the first place of a task's key to it in a transaction that ends when another one waits for it."""
    with engine.begin() as other:
        other.execute(sa.update(Task).where(Task.id == task_id).values(state=RUNNING, slot=0))
        yield
        until(lambda: is_waiting(engine))


def is_waiting(engine: sa.Engine) -> bool:
    waits = sa.text(
        "SELECT EXISTS (SELECT FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock')"
    )
    with engine.connect() as connection:
        return connection.scalar(waits)


def test_a_claim_is_repeated_if_another_transaction_gives_away_the_same_place(engine, worker, add):
    """It has not taken the lock of the key, because it uses another name of the schema."""
    worker.use("t", print, limit=SERIAL)
    hold_lease(worker)
    probe.declare_limits(worker)
    add("t", "k", count=2)
    add("t", "other")

    claiming = threading.Thread(target=probe.claim_placed, args=(worker, 10))
    with gives_away(engine, first_id(engine)):
        claiming.start()
    claiming.join()
    probe.dispose(worker)

    assert states(engine) == [RUNNING, WAITING, RUNNING]
    assert probe.runtime(worker).places.conflicts == 1


def test_a_place_is_handed_over_later_if_another_transaction_gives_it_away(engine, worker, add):
    worker.use("t", print, limit=SERIAL)
    hold_lease(worker)
    probe.declare_limits(worker)
    add("t", "k", count=2)
    probe.claim_placed(worker, 10)
    with engine.begin() as connection:
        connection.execute(sa.update(Task).where(Task.state == RUNNING).values(state=COMPLETED))
    add("t", "k")

    handing = threading.Thread(target=probe.hand_over, args=(worker, {Share(KEY, "k"): 1}, 1))
    with gives_away(engine, first_id(engine) + 2):
        handing.start()
    handing.join()
    probe.dispose(worker)

    assert states(engine) == [COMPLETED, WAITING, RUNNING]
    assert probe.runtime(worker).places.conflicts == 1


def first_id(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.min(Task.id)))


def test_work_lets_no_kind_wait_for_ever(worker, add):
    ran = []
    for type_, limit in (("plain", None), ("keyed", SERIAL)):
        worker.use(type_, lambda task: ran.append(task.type), limit=limit)
    add("plain", count=10)
    add("keyed", "k", count=10)

    for _ in range(6):
        worker.work()

    assert set(ran) == {"plain", "keyed"}


@pytest.mark.parametrize("seconds", [0.06, 0.2])
def test_a_backlog_of_plain_tasks_holds_up_no_keyed_one(worker, add, seconds):
    """No slot becomes free within the time for which a place is taken ahead."""
    began = threading.Event()
    worker.use("plain", lambda task: time.sleep(seconds))
    worker.use("keyed", lambda task: began.set(), limit=SERIAL)
    add("plain", count=2_000)
    worker.start()
    until(lambda: worker.stats().completed > 8)

    add("keyed", "k")

    assert began.wait(3)


def test_a_keyed_backlog_holds_up_no_plain_task(worker, add):
    began = threading.Event()
    worker.use("plain", lambda task: began.set())
    worker.use("keyed", lambda task: time.sleep(0.1), limit=Limit(4, key=True))
    add("keyed", "k", count=500)
    worker.start()
    until(lambda: worker.stats().completed > 8)

    add("plain")

    assert began.wait(3)


def test_a_worker_whose_slots_are_busy_does_not_spin(engine, worker, add):
    """Its keyed tasks can't begin soon, so it waits until a slot is free."""
    worker.use("plain", lambda task: time.sleep(0.3))
    worker.use("keyed", lambda task: None, limit=SERIAL)
    add("plain", count=40)
    for number in range(50):
        add("keyed", f"k{number}")
    worker.start()
    until(lambda: worker.stats().completed > 4)

    turns = probe.count_turns(probe.claimer(worker))
    time.sleep(1.0)

    assert turns() < 200


def test_a_schema_that_is_gone_stops_no_limits_of_others(engine, make_worker):
    for schema in ("one", "other"):
        prepare(engine, schema=schema)
    queues = [Queue("default", schema=schema) for schema in ("one", "other")]
    worker = make_worker(*queues)
    worker.use("t", lambda task: None, limit=SERIAL)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA other CASCADE")
    with Session(engine) as session, session.begin():
        queues[0].add(session, "t", key="k")

    worker.start()

    until(lambda: worker.stats().completed == 1)


def test_after_a_stop_work_still_runs_tasks_with_keys(engine, worker, add):
    worker.use("keyed", lambda task: None, limit=SERIAL)
    worker.start()
    worker.stop()
    add("keyed", "k")

    assert worker.work() is not None


@pytest.mark.parametrize("_", range(5))
def test_a_worker_that_stops_keeps_no_place(engine, make_worker, add, _):
    """Its hand-over may be under way at that moment."""
    worker = make_worker()
    worker.use("keyed", lambda task: time.sleep(0.001), limit=SERIAL)
    for number in range(20):
        add("keyed", f"k{number}", 20)
    worker.start()
    until(lambda: worker.stats().completed > 20)

    worker.stop()

    assert RUNNING not in states(engine)


def test_a_stop_hands_over_all_places(engine, make_worker, add):
    """Also more than one transaction hands over."""
    going, go = threading.Semaphore(0), threading.Event()
    worker = make_worker(concurrency=150)

    def hold(task) -> None:
        going.release()
        go.wait()

    worker.use("keyed", hold, limit=SERIAL)
    for number in range(150):
        add("keyed", f"k{number}", 2)
    worker.start()
    for _ in range(150):
        going.acquire(timeout=10)
    until(lambda: states(engine).count("waiting") == 150)
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    until(lambda: not probe.is_taking(worker))
    go.set()
    stopping.join()

    assert states(engine).count("waiting") == 0


def test_a_listener_that_hears_of_a_claim_may_not_stop_the_worker(engine, make_worker, add):
    worker: Worker = make_worker()
    refused = []

    def stop(event: TaskClaimed) -> None:
        try:
            worker.stop()
        except RuntimeError as error:
            refused.append(error)

    worker.events.on(TaskClaimed, stop)
    worker.use("keyed", lambda task: None, limit=SERIAL)
    add("keyed", "k", 3)
    worker.start()

    until(lambda: worker.stats().completed == 3)
    assert len(refused) == 3


def test_a_raised_limit_is_found_without_a_notification_soon(engine, make_worker, add, queue):
    """Even if the worker met the first task with a key long after its last sweep."""
    worker = make_worker(poll_interval=timedelta(hours=1))
    worker.use("keyed", lambda task: None, limit=SERIAL)
    worker.start()
    until(lambda: probe.is_idle(worker))
    time.sleep(0.5)
    with Session(engine) as session, session.begin():
        queue.limit(session, 0, key="k")
    add("keyed", "k")
    until(lambda: states(engine) == ["waiting"])
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE apoq_limits SET at_most = 1 WHERE key = 'k'"))

    patience(8)(lambda: states(engine) == [COMPLETED])
