"""One worker of many queues: they share statements, and don't hold up each other."""

from __future__ import annotations

import threading
import time
from collections import Counter
from datetime import timedelta

import probe
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, Task, Worker, prepare
from apoq.worker.claiming.claim_statement import ClaimStatement

SOON = 10.0
until = patience(SOON)


def add(engine, queue: Queue, count: int = 1) -> None:
    with Session(engine) as session, session.begin():
        queue.add_many(session, "t", [{}] * count)


def states(engine, schema: str | None = None) -> Counter[tuple[str, str]]:
    table = "apoq_tasks" if schema is None else f"{schema}.apoq_tasks"
    with engine.connect() as connection:
        return Counter(map(tuple, connection.execute(sa.text(f"SELECT queue, state FROM {table}"))))


@pytest.fixture
def claims(monkeypatch) -> list[list[str]]:
    """The queues into which each claim has looked."""
    seen: list[list[str]] = []
    execute = ClaimStatement.execute

    def note_and_execute(self, portions, *arguments, **options):
        seen.append([queue.queue.name for queue in portions])
        return execute(self, portions, *arguments, **options)

    monkeypatch.setattr(ClaimStatement, "execute", note_and_execute)
    return seen


def wait_until_idle(worker: Worker, claims: list[list[str]]) -> None:
    """Wait until a worker listens and has sent no claim for a while."""
    changed_at, seen = time.monotonic(), 0

    def listens() -> bool:
        return len(probe.awaited(worker) or ()) == len(worker.queues)

    def is_idle() -> bool:
        nonlocal changed_at, seen
        if len(claims) != seen or not listens() or not probe.is_idle(worker):
            changed_at, seen = time.monotonic(), len(claims)
        return time.monotonic() - changed_at > 0.3

    until(is_idle)


def test_one_statement_claims_from_all_queues_with_tasks(engine, make_worker, claims):
    queues = [Queue(f"queue{n}") for n in range(20)]
    ran = Counter()
    worker = make_worker(*queues, concurrency=100)
    worker.use("t", lambda task: ran.update([task.from_queue.name]))
    for queue in queues:
        add(engine, queue)

    worker.start()
    until(lambda: len(ran) == 20)

    assert sorted(claims[0]) == sorted(queue.name for queue in queues)


def test_a_notification_lets_the_worker_look_into_its_queue_only(engine, make_worker, claims):
    queues = [Queue(f"queue{n}") for n in range(20)]
    worker = make_worker(*queues, poll_interval=timedelta(hours=1))
    worker.use("t", lambda task: None)
    worker.start()
    wait_until_idle(worker, claims)
    del claims[:]

    add(engine, queues[7])
    until(lambda: states(engine) == {("queue7", "completed"): 1})
    wait_until_idle(worker, claims)

    assert {queue for claim in claims for queue in claim} == {"queue7"}


def test_a_full_queue_does_not_delay_the_first_task_of_another(engine, make_worker, claims):
    """By more than one claim."""
    full, other = Queue("full"), Queue("other")
    began = threading.Event()
    worker = make_worker(full, other, concurrency=2)
    worker.use("t", lambda task: began.set() if task.from_queue == other else time.sleep(0.001))
    add(engine, full, 2_000)
    worker.start()
    until(lambda: claims and states(engine)["full", "completed"] > 10)

    add(engine, other)
    at_commit = len(claims)
    assert began.wait(SOON)

    looked = next(number for number, queues in enumerate(claims[at_commit:]) if "other" in queues)
    assert looked <= 1


def test_a_queue_whose_claims_fail_does_not_hold_up_the_others(engine, make_worker, caplog):
    """Although one statement claims from all."""
    good, bad = Queue("good"), Queue("bad")
    with engine.begin() as connection:
        connection.exec_driver_sql("""
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN RAISE insufficient_privilege; END $$
        """)
        connection.exec_driver_sql("""
            CREATE TRIGGER refuse BEFORE UPDATE ON apoq_tasks FOR EACH ROW
            WHEN (NEW.queue = 'bad' AND NEW.state = 'running') EXECUTE FUNCTION refuse()
        """)
    worker = make_worker(good, bad)
    worker.use("t", lambda task: None)
    for queue in (good, bad):
        add(engine, queue, 3)

    worker.start()
    until(lambda: states(engine)["good", "completed"] == 3)
    assert states(engine)["bad", "pending"] == 3
    until(lambda: "the claim from Queue('bad') failed" in caplog.text)

    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER refuse ON apoq_tasks")
    until(lambda: states(engine)["bad", "completed"] == 3)


def test_a_row_that_the_server_refuses_stops_only_itself(engine, make_worker, caplog):
    good, bad = Queue("good"), Queue("bad")
    worker = make_worker(good, bad)
    worker.use("t", lambda task: None)
    for queue in (good, bad):
        add(engine, queue, 3)
    with engine.begin() as connection:
        first = connection.scalar(sa.select(sa.func.min(Task.id)).where(Task.queue == "bad"))
        connection.execute(
            sa.text(f"""
            ALTER TABLE apoq_tasks ADD CHECK (id != {first} OR state != 'running') NOT VALID
        """)
        )

    worker.start()

    until(lambda: states(engine)["good", "completed"] == 3 and states(engine)["bad", "completed"] == 2)
    assert f"task {first}" in caplog.text


class TestManySchemas:
    @pytest.fixture
    def queues(self, engine) -> list[Queue]:
        for n in range(4):
            prepare(engine, schema=f"tenant{n}")
        return [Queue(schema=f"tenant{n}") for n in range(4)]

    def test_a_notification_wakes_the_right_schema(self, engine, make_worker, queues, claims, monkeypatch):
        worker = make_worker(*queues, poll_interval=timedelta(hours=1))
        worker.use("t", lambda task: None)
        worker.start()
        wait_until_idle(worker, claims)
        del claims[:]

        add(engine, queues[2])
        until(lambda: states(engine, "tenant2") == {("default", "completed"): 1})
        wait_until_idle(worker, claims)

        assert len(claims) <= 2  # one for the notification, one for the survey that may follow it
