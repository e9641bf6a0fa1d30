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
from apoq.worker.claiming.look_times import POLLS_PER_SECOND, LookTimes

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
        schemas = {queue.schema for queue in worker.queues}
        return len(probe.awaited(worker) or ()) == 3 * len(worker.queues) + len(schemas)

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

    def test_where_no_worker_holds_tasks_leases_are_longer_until_one_does(self, engine, make_worker, queues):
        """With a lease of a second and four schemas, heartbeats to all would be more than ten per second."""
        may_end = threading.Event()
        worker = make_worker(*queues, lease=1.0)
        worker.use("t", lambda task: may_end.wait(SOON))
        worker.start()
        until(lambda: [lease(engine, queue) for queue in queues] == [2.0] * 4)

        add(engine, queues[2])
        until(lambda: [lease(engine, queue) for queue in queues] == [2.0, 2.0, 1.0, 2.0])
        assert all(its.is_held for its in probe.leases(worker).values())

        may_end.set()
        until(lambda: lease(engine, queues[2]) == 2.0)

    def test_tasks_of_a_worker_that_dies_in_a_quiet_schema_are_rescued(self, engine, make_worker, queues):
        first, second = (make_worker(*queues, lease=1.0) for _ in range(2))
        ran = []
        for worker in (first, second):
            worker.use("t", lambda task: ran.append(task.attempt) or time.sleep(0.1))
        second.start()
        until(lambda: [lease(engine, queue) for queue in queues] == [2.0] * 4)
        with engine.begin() as connection:  # as if it had been claimed by a worker that died just after
            connection.exec_driver_sql("""
                WITH task AS (
                    INSERT INTO tenant1.apoq_tasks (type, state, attempt, claim_token, worker_id, claimed_at)
                    VALUES ('t', 'running', 1, 1, gen_random_uuid(), now()) RETURNING id, worker_id
                )
                INSERT INTO tenant1.apoq_claims (worker_id, number, task_ids)
                SELECT worker_id, 1, ARRAY[id] FROM task
            """)

        until(lambda: states(engine, "tenant1") == {("default", "completed"): 1})
        assert ran == [2]


def lease(engine, queue: Queue) -> float | None:
    """Return the seconds between the last heartbeat in a queue's schema and the end of the lease."""
    with engine.connect() as connection:
        return connection.scalar(
            sa.text(f"""
                SELECT round(extract(epoch FROM expires_at - last_heartbeat_at), 1)::float
                FROM {queue.schema}.apoq_workers
            """)
        )


class TestWhenToLook:
    POLL = 1.0

    def test_the_queues_of_a_schema_are_looked_into_together(self):
        queues = [Queue(f"queue{n}") for n in range(5)]
        times = LookTimes(queues, self.POLL)
        times.take(now := time.monotonic())
        times.move_up(queues[0], -1.0)
        assert times.take(now) == [queues[0]]

        assert set(times.take(now + self.POLL)) == set(queues)

    def test_few_quiet_schemas_are_polled_every_poll_interval(self):
        assert self.polls([Queue(schema=f"s{n}") for n in range(10)], seconds=60) >= 10 * 60

    def test_many_quiet_schemas_are_polled_less_and_less_often(self):
        queues = [Queue(schema=f"s{n}") for n in range(200)]

        assert self.polls(queues, seconds=60) < 60 * POLLS_PER_SECOND * 1.5 + 200 * 4
        assert self.polls(queues, seconds=60, after=60) < 60 * POLLS_PER_SECOND * 1.2

    def test_a_queue_that_is_looked_into_earlier_is_polled_as_often_as_usual_again(self):
        queues = [Queue(schema=f"s{n}") for n in range(200)]
        times = LookTimes(queues, self.POLL)
        now = time.monotonic()
        for _ in range(100):
            times.take(now := now + 10.0)

        times.move_up(queues[3], now - time.monotonic())
        now += 0.01
        assert queues[3] in times.take(now)

        assert queues[3] in times.take(now + self.POLL)

    def polls(self, queues: list[Queue], *, seconds: float, after: float = 0.0) -> int:
        """Return how many queues are looked into in so many seconds, if nothing happens."""
        times = LookTimes(queues, self.POLL)
        began = now = time.monotonic()
        count = 0
        while now < began + after + seconds:
            taken = times.take(now)
            count += len(taken) if now >= began + after else 0
            now = max(times.next_look, now + 0.001)
        return count


def test_a_worker_of_many_queues_names_only_some(make_worker):
    """It is in the first line of the log."""
    worker = make_worker(*(Queue(f"q{n}") for n in range(200)))

    assert "Queue('q4') and 195 more" in repr(worker)
