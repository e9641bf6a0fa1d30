"""Tasks that wait for a place begin soon after there is one, whatever else is full or changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import probe
import pytest
import sqlalchemy as sa
from claims import hold_lease
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Limit, Queue, Task
from apoq.core.places import KEY, POOL, WHOLE_QUEUE, Share
from apoq.core.states import COMPLETED, PENDING, RUNNING, WAITING
from apoq.schema.statements.places import lock_shares

until = patience(20)
soon = patience(3)
"""Less than the pause of the sweep, which would find them as well."""

SERIAL = Limit(1, key=True)


@pytest.fixture
def add(engine) -> Callable[..., None]:
    def add(queue: Queue, type: str, key: str | None = None, count: int = 1) -> None:
        with Session(engine) as session, session.begin():
            queue.add_many(session, type, [{}] * count, key=None if key is None else lambda _: key)

    return add


@pytest.fixture
def go(make_worker) -> Iterator[threading.Event]:
    """Let the tasks that wait for it end, before the workers are stopped."""
    event = threading.Event()
    yield event
    event.set()


def count(engine: sa.Engine, type: str, state: str) -> int:
    statement = sa.select(sa.func.count()).where(Task.type == type, Task.state == state)
    with engine.connect() as connection:
        return connection.scalar(statement)


def states(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(Task.state).order_by(Task.id)))


def test_tasks_of_a_key_begin_although_plain_ones_fill_the_queue(engine, make_worker, add):
    queue = Queue("api", limit=Limit(2))
    worker = make_worker(queue, concurrency=4)
    worker.use("keyed", lambda task: None, limit=SERIAL)
    worker.use("plain", lambda task: time.sleep(0.02))
    with Session(engine) as session, session.begin():
        queue.limit(session, 0, key="k")
    worker.start()
    add(queue, "keyed", "k", 10)
    until(lambda: count(engine, "keyed", WAITING) == 10)
    add(queue, "plain", count=1_000)
    until(lambda: count(engine, "plain", COMPLETED) > 10)

    with Session(engine) as session, session.begin():
        queue.limit(session, None, key="k")

    soon(lambda: count(engine, "keyed", COMPLETED) == 10)
    assert count(engine, "plain", PENDING) > 100


def test_a_place_is_looked_at_again_if_the_lock_of_the_queue_was_taken(engine, make_worker, add):
    queue = Queue("api", limit=Limit(5))
    worker = make_worker(queue)
    worker.use("t", print, limit=SERIAL)
    hold_lease(worker)
    probe.declare_limits(worker)
    add(queue, "t", "k", 2)
    probe.claim_placed(worker, 10)
    with engine.begin() as connection:
        connection.execute(sa.update(Task).where(Task.state == RUNNING).values(state=COMPLETED))
    claims, share = probe.claims_of_free_places(worker), Share(KEY, "k")
    [line] = probe.runtime(worker).hand_over._queues.values()
    locks = claims._numbers(line, [Share(POOL, WHOLE_QUEUE)])
    assert locks.values() != claims._numbers(line, [share]).values()

    with engine.begin() as other:
        other.execute(lock_shares(), {"numbers": [*locks.values()]})
        found = claims.hand_over(line, {share: 1}, 1, 1)
    again = claims.hand_over(line, found.later, 1, 1)
    probe.dispose(worker)

    assert (found.rows, found.later) == ([], {share: 1})
    assert len(again.rows) == 1


@pytest.mark.parametrize("at_most", [None, 100])
def test_a_whole_line_begins_when_the_limit_of_its_key_is_removed_or_raised(
    engine, make_worker, go, add, at_most
):
    queue = Queue()
    worker = make_worker(queue, concurrency=60)
    worker.use("t", lambda task: go.wait(30))
    with Session(engine) as session, session.begin():
        queue.limit(session, 1, key="k")
    worker.start()
    add(queue, "t", "k", 50)
    until(lambda: count(engine, "t", WAITING) == 49)

    with Session(engine) as session, session.begin():
        queue.limit(session, at_most, key="k")

    soon(lambda: count(engine, "t", RUNNING) == 50)


def test_a_whole_line_begins_when_the_limit_of_its_type_is_for_each_key_now(engine, make_worker, go, add):
    queue = Queue()
    first = make_worker(queue, concurrency=2)
    first.use("t", lambda task: go.wait(30), limit=Limit(1))
    first.start()
    for number in range(40):
        add(queue, "t", f"k{number}")
    until(lambda: count(engine, "t", WAITING) >= 30)
    second = make_worker(queue, concurrency=60)
    second.use("t", lambda task: go.wait(30), limit=SERIAL)
    second.start()

    soon(lambda: count(engine, "t", RUNNING) == 40)


def test_a_place_of_a_type_is_not_kept_by_tasks_whose_key_is_full(engine, make_worker, go, add):
    queue = Queue()
    worker = make_worker(queue, concurrency=8)
    worker.use("t", lambda task: go.wait(30), limit=Limit(2))
    with Session(engine) as session, session.begin():
        for key in ("first", "second"):
            queue.limit(session, 1, key=key)
    worker.start()
    for key in ("a", "b"):
        add(queue, "t", key)
    until(lambda: count(engine, "t", RUNNING) == 2)
    add(queue, "t", "first", 100)
    add(queue, "t", "second", 1)
    until(lambda: count(engine, "t", WAITING) == 101)

    def running() -> list[str]:
        with engine.connect() as connection:
            return sorted(connection.scalars(sa.select(Task.key).where(Task.state == RUNNING)))

    with engine.begin() as connection:
        connection.execute(sa.delete(Task).where(Task.key.in_(("a", "b"))))
    until(lambda: "first" in running())
    soon(lambda: running() == ["first", "second"])


def test_a_type_with_a_limit_of_its_own_runs_although_the_queue_is_full(engine, make_worker, go, add):
    queue = Queue("api", limit=Limit(2))
    worker = make_worker(queue, concurrency=10)
    worker.use("plain", lambda task: go.wait(30))
    worker.use("own", lambda task: None, limit=Limit(5))
    worker.start()
    add(queue, "plain", count=300)
    until(lambda: count(engine, "plain", RUNNING) == 2)

    add(queue, "own", count=20)

    soon(lambda: count(engine, "own", COMPLETED) == 20)
    assert count(engine, "plain", RUNNING) == 2
    go.set()
    with Session(engine) as session, session.begin():
        queue.cancel_many(session, type="plain", state="pending")


def test_rescued_tasks_are_claimed_while_others_are_blocked(engine, make_worker, add):
    queue = Queue()
    worker = make_worker(queue)
    worker.use("t", print, limit=SERIAL)
    hold_lease(worker)
    probe.declare_limits(worker)
    add(queue, "t", "full", 3)
    probe.claim_placed(worker, 10)
    add(queue, "t", "full", 2)
    add(queue, "t", "free")
    with engine.begin() as connection:
        connection.execute(sa.update(Task).where(Task.key == "free").values(rescue_count=1, fail_count=1))

    probe.claim_placed(worker, 10)
    probe.dispose(worker)

    assert states(engine) == [RUNNING, *[WAITING] * 4, RUNNING]


def test_a_row_that_the_server_refuses_does_not_let_a_claim_take_more_than_it_may(engine, make_worker, add):
    queue = Queue()
    worker = make_worker(queue)
    worker.use("t", print, limit=SERIAL)
    hold_lease(worker)
    probe.declare_limits(worker)
    add(queue, "t", "full", 3)
    probe.claim_placed(worker, 1)
    for number in range(20):
        add(queue, "t", f"k{number}")
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE apoq_tasks ADD CHECK (key <> 'k0' OR state <> 'running')"))

    probe.claim_placed(worker, 1)
    probe.dispose(worker)

    assert states(engine).count(RUNNING) <= 2
