"""A worker in this process, whose connections are cut."""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta

import probe
import pytest
import sqlalchemy as sa
from claims import WAITS, hold_up, note
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, RunningTask, Task, prepare
from apoq.schema.statements.notify import CHANNEL
from apoq.worker.failures import FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, Failures, Outage, backoff
from apoq.worker.service import Service

SOON = 30.0

until = patience(SOON)

KILL = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""

KILL_THE_CLAIM = f"{KILL} AND {WAITS}"


def kill(engine: sa.Engine, statement: str = KILL) -> int:
    """End the server's sessions, all or some."""
    with engine.connect() as connection:
        return len(connection.execute(sa.text(statement)).all())


def count(engine: sa.Engine, *conditions) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(Task).where(*conditions))


def write(task: RunningTask) -> None:
    task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})


def test_nothing_is_lost_or_doubled_while_all_connections_are_killed_again_and_again(
    engine, url, queue, make_worker
):
    quiet = sa.create_engine(url, poolclass=sa.NullPool)
    worker = make_worker()
    worker.use("effect", write, retry_limit=100, retry_delay=lambda fail_count: 0)
    worker.use("noop", lambda task: None, retry_limit=100, retry_delay=lambda fail_count: 0)
    with Session(quiet) as session, session.begin():
        queue.add_many(session, "effect", range(300))
        queue.add_many(session, "noop", range(3_000))
    worker.start()

    for _ in range(15):
        kill(quiet)
        threading.Event().wait(0.1)
    until(lambda: count(quiet, Task.state == "completed") == 3_300, timeout=60)

    with quiet.connect() as connection:
        effects = connection.execute(sa.text("SELECT count(*), count(DISTINCT task_id) FROM ledger")).one()
    assert tuple(effects) == (300, 300)


@pytest.mark.parametrize("by", ["its own", "the one that listens"])
def test_what_was_claimed_while_the_connection_broke_is_given_back(engine, queue, make_worker, by):
    """The claim has committed, and its answer was lost: the row says running, and nobody runs it."""
    ran = threading.Event()
    worker = make_worker()
    worker.use("t", lambda task: ran.set())
    worker.use("other", lambda task: None)
    listens = threading.Event()
    probe.after_notification(worker, listens.set)
    worker.start()
    assert listens.wait(SOON)
    until(lambda: probe.has_looked(worker) and probe.rests_until(worker) < time.monotonic())
    until(lambda: not probe.is_claiming(worker))
    connection_that_listens = probe.listening_connection(worker)
    with engine.begin() as connection:
        connection.execute(sa.text("LOCK apoq_tasks"))
        queue.add(connection, "t")
        connection.execute(
            sa.text(
                "UPDATE apoq_tasks SET state = 'running', claim_token = 1, attempt = 1, "
                "worker_id = (SELECT id FROM apoq_workers)"
            )
        )
        note(connection)
        if by == "its own":
            probe.look_for_tasks(worker)
        else:
            with engine.begin() as other:
                other.execute(sa.func.pg_notify(CHANNEL, queue.name).select())
        until(lambda: kill(engine, KILL_THE_CLAIM))

    assert ran.wait(SOON)
    # On a busy machine, the claimer may have looked by itself, and its own connection is the one that broke.
    until(
        lambda: (
            not probe.is_connection_closed(connection_that_listens)
            or probe.listening_connection(worker) not in (None, connection_that_listens)
        )
    )
    until(lambda: count(engine, Task.type == "t", Task.state == "completed", Task.attempt == 1) == 1)


def test_what_one_queue_has_given_runs_although_the_next_ones_claim_fails(engine, queue, make_worker):
    prepare(engine, schema="other")
    other = Queue(schema="other")
    worker = make_worker(queue, other)
    worker.use("t", lambda task: None)
    worker.start()
    until(lambda: probe.rests_until(worker))
    with engine.connect() as connection:
        hold_up(connection, worker, schema="other")
        with Session(engine) as session, session.begin():
            queue.add_many(session, "t", range(3))
            other.add_many(session, "t", range(3))
        until(lambda: kill(engine, KILL_THE_CLAIM) and count(engine, Task.state != "pending"))
        connection.rollback()

    until(lambda: count(engine, Task.state == "completed", Task.attempt == 1) == 3)


class Turns(Service):
    """A service whose turns are this function."""

    def __init__(self, turn) -> None:
        super().__init__("apoq-test", Outage())
        self._function = turn

    def turn(self) -> float | None:
        return self._function()


class TestService:
    def test_it_goes_on_after_failures_and_says_so_once_each_way(self, caplog):
        turns, done = [], threading.Event()

        def turn() -> float | None:
            turns.append(None)
            if len(turns) < 4:
                raise ConnectionError("no route")
            done.set()
            return None

        service = Turns(turn)
        with caplog.at_level(logging.WARNING, "apoq"):
            service.start()
            assert done.wait(SOON)
            until(lambda: len(caplog.messages) == 2)
            service.stop()

        assert caplog.messages[0] == "the database is away; the worker tries again until it is back: no route"
        assert "the database is back, after" in caplog.messages[1]

    def test_an_outage_is_reported_once_for_all_services(self, caplog):
        outage = Outage()
        with caplog.at_level(logging.WARNING, "apoq"):
            for name in ("claimer", "settler", "claimer"):
                outage.begins(name, ConnectionError("no route"))
            for name in ("pruner", "claimer", "settler"):
                outage.ends(name)

        assert len(caplog.messages) == 2

    def test_other_failures_are_reported_by_each_service(self, caplog):
        turns, done = [], threading.Event()

        def turn() -> float | None:
            turns.append(None)
            if len(turns) < 3:
                raise LookupError("no such thing")
            done.set()
            return None

        service = Turns(turn)
        with caplog.at_level(logging.WARNING, "apoq"):
            service.start()
            assert done.wait(SOON)
            until(lambda: len(caplog.messages) == 2)
            service.stop()

        assert caplog.messages == [
            "apoq-test failed, and is tried again until it succeeds: no such thing",
            "apoq-test works again, after 2 failures",
        ]

    def test_a_wake_during_a_turn_leads_to_another(self):
        begun, may_end, turns = threading.Event(), threading.Event(), threading.Semaphore(0)

        def turn() -> float | None:
            begun.set()
            may_end.wait(SOON)
            turns.release()
            return None

        service = Turns(turn)
        service.start()
        begun.wait(SOON)
        service.wake()
        may_end.set()

        assert turns.acquire(timeout=SOON)
        assert turns.acquire(timeout=SOON)
        service.stop()

    def test_a_turn_is_taken_on_the_callers_thread_while_it_sleeps(self):
        takers: list[threading.Thread] = []

        def turn() -> float | None:
            takers.append(threading.current_thread())
            return None if len(takers) != 2 else 0.0  # the caller's first one has found something

        service = Turns(turn)
        service.start()
        until(lambda: len(takers) == 1)

        service.take_turn(turn)

        assert takers[1:] == [threading.current_thread()] * 2
        service.stop()
        service.take_turn(turn)
        assert len(takers) == 3

    def test_a_turn_is_left_to_its_own_thread_while_it_takes_one(self):
        begun, may_end, takers = threading.Event(), threading.Event(), []

        def turn() -> float | None:
            takers.append(threading.current_thread())
            begun.set()
            may_end.wait(SOON)
            return None

        service = Turns(turn)
        service.start()
        begun.wait(SOON)
        service.take_turn(turn)
        may_end.set()

        until(lambda: len(takers) == 2)
        assert threading.current_thread() not in takers
        service.stop()

    def test_a_turn_that_fails_on_the_callers_thread_is_taken_again_on_its_own(self, caplog):
        takers: list[threading.Thread] = []

        def turn() -> float | None:
            takers.append(threading.current_thread())
            if len(takers) in (2, 3):
                raise LookupError("no such thing")
            return None

        service = Turns(turn)
        service.start()
        until(lambda: len(takers) == 1)
        with caplog.at_level(logging.WARNING, "apoq"):
            service.take_turn(turn)
            until(lambda: len(takers) == 4)
            until(lambda: len(caplog.messages) == 2)
        service.stop()

        assert takers[1:].count(threading.current_thread()) == 1
        assert "is tried again" in caplog.messages[0]

    def test_stopping_waits_for_a_turn_on_the_callers_thread(self):
        begun, may_end, takers = threading.Event(), threading.Event(), []

        def turn() -> float | None:
            takers.append(threading.current_thread())
            if len(takers) == 2:
                begun.set()
                may_end.wait(SOON)
            return None

        service = Turns(turn)
        service.start()
        until(lambda: len(takers) == 1)
        caller = threading.Thread(target=service.take_turn, args=(turn,))
        caller.start()
        begun.wait(SOON)

        assert not service.stop(timeout=0.1)
        assert not service.stop(timeout=0.1)
        may_end.set()
        assert service.stop()
        caller.join()

    @pytest.mark.parametrize("started", [True, False])
    def test_stopping_twice_or_before_starting_is_harmless(self, started):
        service = Turns(lambda: None)
        if started:
            service.start()
            service.start()

        assert service.stop()
        assert service.stop()

    def test_a_service_that_fails_stops_at_once(self):
        failed = threading.Event()

        def turn() -> float | None:
            failed.set()
            raise ConnectionError

        service = Turns(turn)
        service.start()
        failed.wait(SOON)
        began = time.monotonic()
        service.stop()

        assert time.monotonic() - began < 2

    def test_it_is_failing_from_its_first_failure_until_a_turn_succeeds(self):
        may_succeed = threading.Event()

        def turn() -> float | None:
            if not may_succeed.is_set():
                raise LookupError("no such thing")
            return None

        service = Turns(turn)
        assert not service.is_failing_for(0)

        service.start()
        until(lambda: service.is_failing_for(0.3))
        assert not service.is_failing_for(SOON)

        may_succeed.set()
        until(lambda: not service.is_failing_for(0))
        service.stop()

    def test_it_backs_off_with_jitter_and_within_bounds(self):
        waits = [backoff(failures, chance) for failures in range(1, 200) for chance in (0.0, 0.5, 0.999)]

        assert min(waits) >= FIRST_BACKOFF_SECONDS / 2
        assert max(waits) <= MAX_BACKOFF_SECONDS
        assert backoff(3, 0.0) == pytest.approx(backoff(2, 0.0) * 2)


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class TestFailures:
    """A failure that lasts is logged at once, after 10 s, after a minute, and then every 5 minutes."""

    @pytest.fixture
    def clock(self, caplog) -> Clock:
        caplog.set_level(logging.WARNING, "apoq")
        return Clock()

    def logged(self, clock: Clock, caplog, failures: Failures, error: Exception) -> dict[int, str]:
        """Fail every 2 s for 1,000 s; return what was logged, by the second."""
        logged: dict[int, str] = {}
        for second in range(0, 1_000, 2):
            clock.now = float(second)
            failures.failed(error)
            if caplog.messages:
                [logged[second]] = caplog.messages
            caplog.clear()
        return logged

    def test_an_ordinary_failure_is_logged_again_at_growing_intervals(self, clock, caplog):
        failures = Failures("the claim", Outage(clock), clock)

        logged = self.logged(clock, caplog, failures, LookupError("no such thing"))

        assert [*logged] == [0, 10, 60, 300, 600, 900]
        assert logged[0] == "the claim failed, and is tried again until it succeeds: no such thing"
        assert logged[60] == "the claim has failed for 60 s, 31 times, and is tried again: no such thing"

        failures.recovered()
        failures.recovered()
        assert caplog.messages == ["the claim works again, after 500 failures"]

    def test_an_outage_is_logged_again_at_growing_intervals_and_once_for_all_that_fails(self, clock, caplog):
        outage = Outage(clock)
        failures, other = Failures("the claim", outage, clock), Failures("the other", outage, clock)
        other.failed(ConnectionError("no route"))
        caplog.clear()

        logged = self.logged(clock, caplog, failures, ConnectionError("no route"))

        assert [*logged] == [10, 60, 300, 600, 900]
        assert logged[60] == "the database has been away for 60 s, and the claim tries again: no route"

        failures.recovered()
        assert caplog.messages == []
        other.recovered()
        assert caplog.messages == ["the database is back, after 998.0 s"]

    def test_what_fails_otherwise_after_an_outage_has_reached_the_database(self, clock, caplog):
        failures = Failures("the claim", Outage(clock), clock)
        failures.failed(ConnectionError("no route"))
        caplog.clear()

        failures.failed(LookupError("no such thing"))

        assert caplog.messages == [
            "the database is back, after 0.0 s",
            "the claim failed, and is tried again until it succeeds: no such thing",
        ]

    def test_a_failure_is_counted_from_the_first_until_a_success(self, clock):
        failures = Failures("the claim", Outage(clock), clock)
        assert not failures.is_failing_for(0)

        for clock.now in (1.0, 3.0):
            assert failures.failed(LookupError()) > 0
        clock.now = 4.0

        assert failures.count == 2
        assert failures.is_failing_for(2.9)
        assert not failures.is_failing_for(3.0)

        failures.recovered()
        assert failures.count == 0
        assert not failures.is_failing_for(0)


def test_a_heartbeat_goes_on_while_a_migration_locks_the_tasks(engine, queue, make_worker, caplog):
    caplog.set_level(logging.INFO, "apoq")
    with engine.begin() as connection:
        queue.add(connection, "t")
        connection.exec_driver_sql("UPDATE apoq_tasks SET state = 'running', worker_id = gen_random_uuid()")
        note(connection)
    worker = make_worker(lease=timedelta(seconds=2))

    with engine.begin() as connection:
        connection.execute(sa.text("LOCK TABLE apoq_tasks IN ACCESS EXCLUSIVE MODE"))
        worker.start()
        locked = "tasks of dead workers are rescued when it is free"
        until(lambda: sum(locked in message for message in caplog.messages) > 1)
        assert probe.lease(worker).is_held

    until(lambda: count(engine, Task.state == "pending") == 1)
    assert not [message for message in caplog.messages if "can't be made pending" in message]


class TestARescueThatIsRefused:
    """By a trigger of somebody's."""

    REFUSE = """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF current_query() LIKE '%%orphans%%' THEN RAISE 'not now'; END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON apoq_tasks FOR EACH {} EXECUTE FUNCTION refuse()
    """

    @pytest.fixture
    def refusals(self, make_worker, caplog):
        """Start a worker, and return what the log says of refusals until a few heartbeats after the first."""
        worker = make_worker(lease=timedelta(seconds=2))
        worker.use("t", lambda task: None)

        def said() -> list[str]:
            return [message for message in caplog.messages if "not now" in message]

        def refusals() -> list[str]:
            worker.start()
            until(said)
            for _ in range(3):
                before = worker.last_heartbeat_at
                until(lambda before=before: worker.last_heartbeat_at != before)
            return said()

        return refusals

    def test_a_statement_that_fails_as_such_is_one_line_and_blames_no_task(self, engine, refusals, caplog):
        with engine.begin() as connection:
            connection.exec_driver_sql(self.REFUSE.format("STATEMENT"))
            connection.exec_driver_sql("INSERT INTO apoq_claims VALUES (gen_random_uuid(), 0, '{}')")

        [said] = refusals()

        assert said.startswith("the rescue of tasks of dead workers failed, and is tried again")

        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER refuse ON apoq_tasks")
        until(
            lambda: any("the rescue of tasks of dead workers works again" in each for each in caplog.messages)
        )

    def test_a_task_that_cant_be_written_is_one_line_and_the_others_are_rescued(
        self, engine, queue, refusals
    ):
        with engine.begin() as connection:
            first, *_ = [queue.add(connection, "t").id for _ in range(3)]
            connection.exec_driver_sql(
                "UPDATE apoq_tasks SET state = 'running', worker_id = '00000000-0000-0000-0000-000000000001'"
            )
            note(connection)
            connection.exec_driver_sql(
                f"{self.REFUSE.format('ROW WHEN')} ".replace(
                    "WHEN EXECUTE", f"WHEN (OLD.id = {first}) EXECUTE"
                )
            )

        [said] = refusals()

        assert said.startswith("a task of a dead worker can't be made pending again: ")
        until(lambda: count(engine, Task.state == "completed") == 2)
        assert count(engine, Task.state == "running", Task.id == first) == 1
