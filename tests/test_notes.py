"""What claims write down, for others to find what a dead worker held."""

from __future__ import annotations

import threading
from datetime import timedelta
from uuid import uuid4

import probe
import pytest
import sqlalchemy as sa
from claims import hold_lease, note
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, Task, Worker
from apoq.schema.statements.claim import ID
from apoq.schema.tables import ClaimRow, WorkerRow
from apoq.worker.claim_log import MIN_FORGOTTEN

SOON = 20.0
"""Seconds within which what a test waits for has long happened."""

until = patience(SOON)

HOUR = timedelta(hours=1)


def noted(engine: sa.Engine) -> list[list[int]]:
    with Session(engine) as session:
        return [
            sorted(row.task_ids) for row in session.scalars(sa.select(ClaimRow).order_by(ClaimRow.number))
        ]


def add(engine: sa.Engine, count: int = 1, **options) -> list[int]:
    with Session(engine) as session, session.begin():
        return [Queue().add(session, "t", number, **options).id for number in range(count)]


def state(engine: sa.Engine, task_id: int) -> str:
    with Session(engine) as session:
        return session.get_one(Task, task_id).state


@pytest.fixture
def held(worker):
    """Let tasks with a 0 wait, and all others return at once."""
    go = threading.Event()
    worker.use("t", lambda task: go.wait(SOON) if task.data == 0 else None)
    yield go
    go.set()


def test_a_claim_writes_down_what_it_takes_until_all_of_it_is_settled(engine, worker, held):
    first, *others = add(engine, 3)
    worker.start()

    until(lambda: state(engine, others[-1]) == "completed")
    assert noted(engine) == [[first, *others]]

    held.set()
    until(lambda: state(engine, first) == "completed")
    for _ in range(MIN_FORGOTTEN):
        (last,) = add(engine)
        until(lambda last=last: state(engine, last) == "completed")
    assert len(noted(engine)) <= MIN_FORGOTTEN
    assert [first, *others] not in noted(engine)
    assert noted(engine)[-1] == [last]


def test_a_worker_that_stops_leaves_none(engine, worker, held):
    held.set()
    add(engine, 100)
    worker.start()
    until(lambda: noted(engine))

    worker.stop()

    assert noted(engine) == []


def test_a_worker_that_works_a_single_task_leaves_none(engine, worker, held):
    held.set()
    add(engine)

    worker.work()

    assert noted(engine) == []


def test_what_it_could_not_write_is_found_by_the_next(engine, make_worker):
    """A worker that stops leaves a note of what still runs, as far as the database knows."""
    (task_id,) = add(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            """
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN RAISE 'no'; END $$;
            CREATE TRIGGER refuse BEFORE UPDATE ON apoq_tasks FOR EACH ROW
            WHEN (OLD.state = 'running' AND NEW.state = 'completed') EXECUTE FUNCTION refuse();
            """
        )
    worker = make_worker(lease=timedelta(seconds=1))
    worker.use("t", lambda task: None)
    worker.start()
    until(lambda: not probe.claim_log(worker).held() and noted(engine))
    worker.stop()
    assert (state(engine, task_id), noted(engine)) == ("running", [[task_id]])

    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER refuse ON apoq_tasks; DROP FUNCTION refuse")
    another = make_worker(lease=timedelta(seconds=1))
    another.use("t", lambda task: None, retry_delay=lambda fail_count: 0)
    another.start()
    until(lambda: state(engine, task_id) == "completed")
    another.stop()
    assert noted(engine) == []


def test_what_somebody_is_changing_is_given_back_once_it_is_free(engine, worker):
    """A claim's answer was lost, and one of its tasks is being cancelled, in a transaction that goes on."""
    worker.use("t", lambda task: None)
    first, second = add(engine, 2)
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "UPDATE apoq_tasks SET state = 'running', attempt = 1, claim_token = 1, worker_id = :its"
            ),
            {"its": probe.worker_id(worker)},
        )
        note(connection)
    probe.doubt(worker)
    hold_lease(worker)
    with Session(engine) as session:
        Queue().cancel(session, first)
        assert [row[ID] for row in probe.claim(worker, 2, 2)] == [second]
        assert [first, second] in noted(engine)

    assert [row[ID] for row in probe.claim(worker, 2, 2)] == [first]
    assert noted(engine) == [[second], [first]]
    assert not probe.is_in_doubt(worker)
    probe.own_engine(worker).dispose()


def look_in_vain(worker: Worker) -> None:
    probe.doubt(worker, 60)
    looked_at = probe.looked_for_strays_at(worker)
    probe.look_for_tasks(worker)
    until(lambda: probe.looked_for_strays_at(worker) > looked_at)


def commit_late(engine: sa.Engine, worker: Worker) -> int:
    with engine.begin() as connection:
        # Not by `add`, which would notification.
        task_id = connection.scalar(
            sa.insert(Task)
            .values(
                type="t",
                state="running",
                attempt=1,
                claim_token=1,
                worker_id=probe.worker_id(worker),
            )
            .returning(Task.id)
        )
        note(connection)
    return task_id


class TestAClaimThatCommitsLate:
    """Its worker has gone on without it, has looked for what it took, and found nothing yet."""

    def test_is_given_back_while_there_is_nothing_else_to_do(self, engine, make_worker):
        worker = make_worker(poll_interval=HOUR)
        ran = threading.Event()
        worker.use("t", lambda task: ran.set())
        worker.start()
        until(lambda: probe.rests_until(worker))
        look_in_vain(worker)

        commit_late(engine, worker)

        assert ran.wait(SOON)

    def test_is_given_back_while_no_slot_is_free(self, engine, make_worker):
        worker = make_worker(concurrency=1, poll_interval=HOUR)
        began, go = threading.Event(), threading.Event()
        worker.use("t", lambda task: (began.set(), go.wait(SOON)))
        worker.start()
        add(engine)
        assert began.wait(SOON)
        look_in_vain(worker)

        task_id = commit_late(engine, worker)

        until(lambda: state(engine, task_id) == "pending")
        go.set()
        until(lambda: state(engine, task_id) == "completed")


def test_those_of_the_dead_go_with_what_they_held(engine, make_worker):
    """Those that name nothing any more, and those of which the last task is taken back."""
    gone, running = uuid4(), uuid4()
    (task_id,) = add(engine)
    with engine.begin() as connection:
        connection.execute(sa.update(Task).values(state="running", worker_id=running))
        note(connection)
        connection.execute(sa.insert(ClaimRow).values(worker_id=gone, number=1, task_ids=[task_id, 99]))

    worker = make_worker(lease=timedelta(seconds=1))
    worker.start()

    until(lambda: noted(engine) == [])
    assert state(engine, task_id) == "pending"


def test_the_row_of_a_dead_worker_stays_while_a_task_of_its_is_locked(engine, make_worker):
    dead = uuid4()
    (task_id,) = add(engine)
    with Session(engine) as session, session.begin():
        long_ago = sa.text("now() - interval '1 day'")
        row = {"host": "h", "pid": 1, "version": "0", "queues": [], "concurrency": 1}
        row |= {"last_heartbeat_at": long_ago, "expires_at": long_ago, "grace": timedelta()}
        session.execute(sa.insert(WorkerRow).values(id=dead, **row))
        session.execute(sa.update(Task).values(state="running", worker_id=dead))
        note(session.connection())

    with engine.connect() as holding:
        holding.execute(sa.select(Task.id).with_for_update())
        worker = make_worker(lease=timedelta(seconds=1))
        probe.heartbeat(worker).forget()
        worker.start()
        until(worker.is_healthy)
        probe.heartbeat(worker).forget()
        with Session(engine) as session:
            assert session.get(WorkerRow, dead)
        assert noted(engine) == [[task_id]]

    until(lambda: state(engine, task_id) == "pending")
    until(lambda: noted(engine) == [])
    probe.heartbeat(worker).forget()
    with Session(engine) as session:
        assert session.get(WorkerRow, dead) is None
