"""One queue or schema that fails doesn't hold up the others."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from functools import partial
from uuid import uuid4

import probe
import pytest
import sqlalchemy as sa
from psycopg import OperationalError
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, Task, Worker, prepare
from apoq.errors import SchemaMismatch
from apoq.worker.circuit_breaker import CircuitBreaker
from apoq.worker.failures import Outage

SOON = 20.0

until = patience(SOON)


@pytest.fixture
def breaker() -> CircuitBreaker[str]:
    return CircuitBreaker("the work for {}".format, Outage())


def fail() -> str:
    raise LookupError("no such thing")


class TestTheBreaker:
    def test_the_result_is_passed_on(self, breaker):
        assert breaker.call("a", "ab", lambda: "result", "otherwise") == "result"

    def test_a_key_that_fails_is_left_out_for_a_while_and_logged_once(self, breaker, caplog):
        calls = []

        assert breaker.call("a", "ab", fail, "otherwise") == "otherwise"
        assert breaker.call("a", "ab", lambda: calls.append(1) or "result", "otherwise") == "otherwise"

        assert calls == []
        assert breaker.is_failing("a")
        assert not breaker.is_failing("b")
        assert caplog.messages == [
            "the work for a failed, and is tried again until it succeeds: no such thing"
        ]

    def test_it_is_tried_again(self, breaker, caplog):
        breaker.call("a", "ab", fail, "otherwise")

        until(lambda: breaker.call("a", "ab", lambda: "result", "otherwise") == "result")

        assert not breaker.is_failing("a")
        assert "the work for a works again" in caplog.text

    def test_if_all_fail_the_caller_is_told(self, breaker):
        breaker.call("a", "ab", fail, "otherwise")

        with pytest.raises(LookupError):
            breaker.call("b", "ab", fail, "otherwise")

    def test_a_single_key_is_never_left_out(self, breaker):
        for _ in range(2):
            with pytest.raises(LookupError):
                breaker.call("a", "a", fail, "otherwise")

    def test_if_the_database_is_away_it_is_for_all(self, breaker):
        def away() -> str:
            raise OperationalError("no route")

        with pytest.raises(OperationalError):
            breaker.call("a", "ab", away, "otherwise")
        assert not breaker.is_failing("a")


class TestASchemaThatIsGone:
    """A tenant's, which was dropped beside a worker that works it and others."""

    @pytest.fixture
    def queues(self, engine) -> list[Queue]:
        for schema in ("here", "gone"):
            prepare(engine, schema=schema)
        return [Queue(), Queue(schema="here"), Queue(schema="gone")]

    @pytest.fixture
    def worker(self, make_worker, queues) -> Worker:
        worker = make_worker(*queues)
        worker.use("t", lambda task: None)
        worker.start()
        until(worker.is_healthy)
        return worker

    def add(self, engine: sa.Engine, *queues: Queue) -> None:
        with Session(engine) as session, session.begin():
            for queue in queues:
                queue.add(session, "t")

    def ended(self, engine: sa.Engine, queue: Queue) -> int:
        with Session(engine) as session:
            task = queue.task_class
            return session.scalar(sa.select(sa.func.count()).where(task.state == "completed"))

    def drop(self, engine: sa.Engine) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP SCHEMA gone CASCADE")

    def test_stops_neither_the_others_nor_their_leases(self, engine, queues, worker, caplog):
        default, here, _ = queues
        self.drop(engine)
        lease = probe.lease(worker, "gone")
        until(lambda: not lease.is_held)  # it has been gone for longer than the grace

        waits = []
        for number in range(20):
            began = time.monotonic()
            self.add(engine, default, here)
            until(lambda number=number: self.ended(engine, default) == self.ended(engine, here) == number + 1)
            waits.append(time.monotonic() - began)

        assert sorted(waits)[10] < 0.5
        assert worker.is_healthy()
        failed = [message for message in caplog.messages if "failed" in message]
        assert all("'gone'" in message for message in failed)
        by_part = Counter(message.split(" failed")[0] for message in failed)
        assert max(by_part.values()) == 1  # each part of the worker says it once

    def test_holds_up_no_settlement_of_the_others(self, engine, queues, make_worker, caplog):
        """What has ended there can't be written: that is known after one try, and not after one for each."""
        default, _, gone = queues
        worker = make_worker(*queues, concurrency=40)
        go_on, began = threading.Event(), threading.Semaphore(0)

        def wait(task) -> None:
            began.release()
            go_on.wait(SOON)

        worker.use("t", wait)
        self.add(engine, *[gone] * 30, *[default] * 10)
        worker.start()
        for _ in range(40):
            assert began.acquire(timeout=SOON)
        self.drop(engine)

        go_on.set()

        until(lambda: self.ended(engine, default) == 10)
        until(lambda: any("settling tasks in the schema 'gone' failed" in each for each in caplog.messages))
        assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []

    def test_is_worked_again_when_it_is_there_again(self, engine, queues, worker):
        *_, gone = queues
        self.drop(engine)
        until(lambda: not probe.lease(worker, "gone").is_held)

        prepare(engine, schema="gone")
        self.add(engine, gone)

        until(lambda: self.ended(engine, gone) == 1)

    def test_is_done_without_at_the_start(self, engine, queues, make_worker, caplog):
        default, *_ = queues
        self.drop(engine)
        worker = make_worker(*queues)
        worker.use("t", lambda task: None)

        with caplog.at_level(logging.ERROR, "apoq"):
            worker.start()

        self.add(engine, default)
        until(lambda: self.ended(engine, default) == 1)
        assert "`apoq migrate --schema gone`" in caplog.text
        assert "this worker leaves out the queues in that schema" in caplog.text

    def test_if_none_is_there_a_worker_does_not_start(self, engine, make_worker):
        with pytest.raises(SchemaMismatch):
            make_worker(Queue(schema="nowhere"), Queue(schema="neither")).start()


def test_a_queue_whose_claim_the_server_refuses_delays_no_other(engine, make_worker):
    """Row-level security, a trigger or a lost right may concern one queue alone."""
    bad, good = Queue("bad"), Queue("good")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            """
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN RAISE insufficient_privilege; END $$;
            CREATE TRIGGER refuse BEFORE UPDATE ON apoq_tasks FOR EACH ROW
            WHEN (NEW.queue = 'bad' AND NEW.state = 'running') EXECUTE FUNCTION refuse()
            """
        )
    worker = make_worker(bad, good)
    worker.use("t", lambda task: None)
    worker.start()
    with Session(engine) as session, session.begin():
        bad.add(session, "t")

    for _ in range(10):
        began = time.monotonic()
        with Session(engine) as session, session.begin():
            task_id = good.add(session, "t").id
        until(partial(is_completed, engine, task_id))
        assert time.monotonic() - began < 2

    assert worker.is_healthy()


def is_completed(engine: sa.Engine, task_id: int) -> bool:
    with Session(engine) as session:
        return session.get_one(Task, task_id).state == "completed"


class TestARightThatIsGone:
    def test_what_has_ended_is_settled_when_it_is_back(self, engine, make_worker, url, caplog):
        """A password or a right that was changed by mistake costs no task."""
        role = f"worker_{uuid4().hex[:8]}"
        with engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN")
            connection.exec_driver_sql(f"GRANT USAGE ON SCHEMA public TO {role}")
            connection.exec_driver_sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
            connection.exec_driver_sql(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}")
        its_engine = sa.create_engine(url.set(username=role))
        worker = Worker(its_engine, Queue(), concurrency=2)
        go_on, began = threading.Event(), threading.Semaphore(0)

        def wait(task) -> None:
            began.release()
            go_on.wait(SOON)

        worker.use("t", wait)
        with Session(engine) as session, session.begin():
            Queue().add_many(session, "t", [{}] * 2)
        worker.start()
        try:
            for _ in range(2):
                assert began.acquire(timeout=SOON)
            with engine.begin() as connection:
                connection.exec_driver_sql(f"REVOKE UPDATE ON apoq_tasks FROM {role}")
            go_on.set()
            until(lambda: "apoq-settler failed" in caplog.text)
            with engine.begin() as connection:
                connection.exec_driver_sql(f"GRANT UPDATE ON apoq_tasks TO {role}")

            until(lambda: worker.stats().completed == 2)
        finally:
            worker.stop()
            its_engine.dispose()
            with engine.begin() as connection:
                connection.exec_driver_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")
        with Session(engine) as session:
            assert {task.attempt for task in session.scalars(sa.select(Task))} == {1}
