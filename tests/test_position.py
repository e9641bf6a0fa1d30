"""Claims start behind what was taken, and nothing that stands there is forgotten."""

from __future__ import annotations

import math
import threading
import time
from datetime import UTC, datetime, timedelta

import probe
import pytest
import sqlalchemy as sa
from claims import AHEAD, asked, database_of, looked_into, surveyed
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, Task
from apoq.core.registry import Registry, make_processor
from apoq.postgres.connections import execute, own_engine
from apoq.schema.statements.claim import CLAIM, ID, PRIORITY, PROCESS_AT, claim
from apoq.schema.statements.survey import First, survey
from apoq.worker.claiming.cursor import COMMIT_SLACK_SECONDS, MAX_LEVELS, START, ClaimCursor
from apoq.worker.claiming.scanner import REST_FACTOR, QueueScanner

SOON = 10.0

until = patience(SOON)
NOW = 1_800_000_000.25


def row(id_: int, priority: int, process_at: float) -> tuple[object, ...]:
    known = {ID: id_, PRIORITY: priority, PROCESS_AT: process_at}
    return tuple(known.get(at) for at in range(CLAIM))


class TestPosition:
    def test_it_begins_at_the_start_of_the_default_priority(self):
        assert ClaimCursor().text(is_keyed=False) == '"levels":[0],"behind_times":["-inf"],"behind_ids":[0]'

    def test_after_a_full_claim_it_is_behind_the_last_row_of_each_priority(self):
        position = ClaimCursor()
        position.claimed([row(7, 5, NOW), row(3, 0, NOW), row(4, 0, NOW + 1)], is_all=False)

        assert probe.levels(position) == {5: (NOW, 7), 0: (NOW + 1, 4)}
        assert position.text(is_keyed=False).startswith('"levels":[10,0],')

    def test_after_a_claim_that_came_short_it_leaves_room_for_late_commits(self):
        position = ClaimCursor()
        position.claimed([row(3, 0, NOW)], is_all=True)

        assert probe.levels(position) == {0: (NOW - COMMIT_SLACK_SECONDS, 0)}

    def test_no_claim_puts_it_back(self):
        position = ClaimCursor()
        position.claimed([row(9, 0, NOW)], is_all=False)
        position.claimed([row(10, 0, NOW)], is_all=True)

        assert probe.levels(position) == {0: (NOW, 9)}

    def test_a_survey_puts_it_back_before_the_first_due_task(self):
        position = ClaimCursor()
        position.claimed([row(9, 0, NOW)], is_all=False)

        assert position.surveyed([First(0, NOW - 60, 5, False)], NOW) == -60
        assert probe.levels(position) == {0: (NOW - 60, 4)}

    def test_a_survey_that_finds_nothing_due_moves_it_past_what_is_of_other_types(self):
        position = ClaimCursor()

        assert position.surveyed([First(10, NOW + 60, 8, True)], NOW) == 60
        behind = NOW - COMMIT_SLACK_SECONDS, 0
        assert probe.levels(position) == {0: behind, 5: behind}

    def test_a_survey_of_an_empty_queue_moves_it_past_what_was_taken(self):
        position = ClaimCursor()
        position.claimed([row(9, 0, NOW)], is_all=False)

        assert position.surveyed([], NOW + 5) == math.inf
        assert probe.levels(position) == {0: (NOW + 5 - COMMIT_SLACK_SECONDS, 0)}

    def test_a_survey_moves_it_on_where_it_names_other_priorities_only(self):
        position = ClaimCursor()
        position.claimed([row(9, 0, NOW)], is_all=False)

        position.surveyed([First(14, NOW, 3, False)], NOW + 5)

        assert probe.levels(position) == {7: (NOW, 2), 0: (NOW + 5 - COMMIT_SLACK_SECONDS, 0)}

    def test_it_is_careful_while_what_was_rescued_is_due(self):
        position = ClaimCursor()
        position.surveyed([First(0, NOW - 1, 3, True)], NOW)
        assert position.is_careful

        position.surveyed([First(0, NOW + 1, 3, True)], NOW)
        assert not position.is_careful

    def test_priorities_that_were_used_up_are_forgotten_in_the_end(self):
        position = ClaimCursor()
        for priority in range(3 * MAX_LEVELS):
            position.surveyed([First(2 * priority, NOW, 1, False)], NOW)

        assert len(probe.levels(position)) <= MAX_LEVELS + 1


def test_a_survey_that_had_to_wait_for_the_server_once_does_not_silence_the_scout(own, engine):
    registry = Registry()
    registry.use("t", make_processor("t", print))
    scanner = QueueScanner(
        database_of(own),
        {Queue(): ClaimCursor()},
        registry,
        poll_interval=0.1,
        on_due=lambda queues: None,
    )
    scanner.survey()
    with engine.begin() as connection:
        connection.execute(sa.text("LOCK apoq_tasks"))
        surveying = threading.Thread(target=scanner.survey)
        surveying.start()
        time.sleep(0.5)
    surveying.join(SOON)

    assert probe.scanner_rests_until(scanner) - time.monotonic() < REST_FACTOR * 0.5


@pytest.mark.parametrize(("after", "calls"), [("nothing", 1), ("a retry", 2), ("a claim", 2)], ids=str)
def test_a_survey_reports_a_due_task_again_if_it_was_claimed_or_retried_meanwhile(own, engine, after, calls):
    """Not if the last claim has left it, for example because another session has locked it."""
    reported = []
    registry = Registry()
    registry.use("t", make_processor("t", print))
    scanner = QueueScanner(
        database_of(own),
        {Queue(): ClaimCursor()},
        registry,
        poll_interval=60.0,
        on_due=reported.append,
    )

    def look() -> None:
        before = probe.scanner_rests_until(scanner, known=True)
        scanner.look_into(Queue())
        until(lambda: scanner.turn() and probe.scanner_rests_until(scanner, known=True) != before)

    with Session(engine) as session, session.begin():
        Queue().add(session, "t")
    look()
    if after == "a retry":
        with engine.begin() as connection:
            connection.execute(sa.update(Task).values(process_at=Task.process_at - timedelta(seconds=1)))
    elif after == "a claim":
        scanner.claimed(Queue(), 1, has_more=True)
    look()

    assert len(reported) == calls


@pytest.fixture
def own(engine):
    own = own_engine(engine)
    yield own
    own.dispose()


@pytest.mark.parametrize(
    "process_at",
    [
        "-infinity",
        "0001-01-01 00:00:00.000001Z",
        "1969-12-31 23:59:59.999999Z",
        "2026-11-23 12:00:00.123457Z",
    ],
)
def test_behind_a_survey_a_claim_finds_the_task_whenever_it_was_due(engine, own, process_at):
    with engine.begin() as connection:
        connection.execute(
            sa.text("INSERT INTO apoq_tasks (type, process_at) VALUES ('t', CAST(:at AS timestamptz))"),
            {"at": process_at},
        )
    position = ClaimCursor()
    position.claimed([row(10**9, 0, NOW * 2)], is_all=False)

    assert surveyed(position, execute(own, survey(None), looked_into())) < 0
    claimed = execute(
        own,
        claim(None, ahead=True),
        asked(position, 5) | AHEAD,
    )
    assert len(claimed.fetchall()) == 1


def pages(connection, parameters) -> int:
    statement = claim(None, ahead=True).compile(dialect=connection.dialect)
    explained = connection.exec_driver_sql(
        f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", statement.construct_params(parameters)
    )
    plan = explained.scalar()[0]["Plan"]
    return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


def test_beside_a_held_snapshot_a_claim_walks_through_nothing_that_was_taken(engine, queue, make_worker):
    done = threading.Semaphore(0)
    worker = make_worker()
    worker.use("t", lambda task: done.release())
    with engine.connect() as holder:
        holder.execution_options(isolation_level="REPEATABLE READ")
        holder.execute(sa.text("SELECT count(*) FROM apoq_tasks"))
        with Session(engine) as session, session.begin():
            queue.add_many(session, "t", list(range(5_000)))
        worker.start()
        assert all(done.acquire(timeout=SOON) for _ in range(5_000))

        with engine.connect() as connection:
            from_the_start = pages(connection, asked(at_most=10) | AHEAD)
            # A survey that finds none moves back to the newest tasks, until no older one can be committed.
            until(lambda: 3 * pages(connection, asked(probe.cursors(worker)[0], 10) | AHEAD) < from_the_start)


class TestNothingIsForgotten:
    @pytest.fixture
    def ran(self, make_worker):
        """A worker's tasks, by their data; it looks by itself once an hour."""
        ran: dict[object, threading.Event] = {}
        worker = make_worker(poll_interval=timedelta(hours=1))
        worker.use("t", lambda task: ran.setdefault(task.data, threading.Event()).set())
        worker.start()
        return lambda data: ran.setdefault(data, threading.Event()).wait(SOON)

    def test_a_commit_that_comes_late(self, engine, queue, ran):
        """Its process_at is when its transaction began, long before what has been claimed meanwhile."""
        with engine.connect() as slow:
            queue.add(slow, "t", "late")
            time.sleep(2 * COMMIT_SLACK_SECONDS)
            for number in range(3):
                with Session(engine) as session, session.begin():
                    queue.add(session, "t", number)
                assert ran(number)
            slow.commit()

        assert ran("late")

    def test_a_process_at_in_the_past(self, engine, queue, ran):
        with Session(engine) as session, session.begin():
            queue.add(session, "t", 1)
        assert ran(1)
        with Session(engine) as session, session.begin():
            queue.add(session, "t", "past", process_at=datetime.now(UTC) - timedelta(days=1))

        assert ran("past")

    @pytest.mark.parametrize("priority", [-5, 5])
    def test_a_priority_that_nobody_has_used(self, engine, queue, ran, priority):
        with Session(engine) as session, session.begin():
            queue.add(session, "t", 1)
        assert ran(1)
        with Session(engine) as session, session.begin():
            queue.add(session, "t", "new", priority=priority)

        assert ran("new")

    def test_a_task_behind_thousands_of_other_types(self, engine, queue, ran):
        with Session(engine) as session, session.begin():
            queue.add_many(session, "other", list(range(3_000)))
            queue.add(session, "t", "behind")

        assert ran("behind")


def test_a_new_and_higher_priority_overtakes_a_backlog(engine, queue, make_worker):
    overtaken = []
    worker = make_worker(concurrency=1)
    worker.use("slow", lambda task: time.sleep(0.005) or overtaken.append(task.id))
    urgent = threading.Event()
    worker.use("urgent", lambda task: urgent.set())
    with Session(engine) as session, session.begin():
        queue.add_many(session, "slow", list(range(2_000)))
    worker.start()
    while not overtaken:
        time.sleep(0.01)
    with Session(engine) as session, session.begin():
        queue.add(session, "urgent", priority=9)

    assert urgent.wait(SOON)
    assert len(overtaken) < 1_000


def test_looking_in_vain_leaves_nothing_behind(worker):
    worker.use("t", lambda task: None)

    for _ in range(3):
        assert worker.work() is None

    assert probe.deferred(worker) == []


def test_every_queue_has_a_position_of_its_own(engine, make_worker):
    first, second = Queue("first"), Queue("second")
    ran = threading.Semaphore(0)
    worker = make_worker(first, second)
    worker.use("t", lambda task: ran.release())
    worker.start()
    for queue in (first, second, first, second):
        with Session(engine) as session, session.begin():
            queue.add(session, "t")
        assert ran.acquire(timeout=SOON)

    assert all(probe.levels(cursor)[0] > START for cursor in probe.cursors(worker))


def test_a_due_task_that_another_session_has_locked_costs_an_idle_worker_little(engine, make_worker):
    """It was looked for again and again, as often as a survey takes a twentieth of the time."""
    worker = make_worker(poll_interval=timedelta(seconds=1))
    worker.use("t", lambda task: None)
    looks = []
    survey_ = probe.scanner(worker).survey
    with Session(engine) as session, session.begin():
        Queue().add(session, "t")
        session.flush()
    probe.scanner(worker).survey = lambda **how: looks.append(time.monotonic()) or survey_(**how)
    with engine.begin() as connection:
        connection.execute(sa.text("SELECT 1 FROM apoq_tasks FOR UPDATE"))
        worker.start()
        began = time.monotonic()
        while time.monotonic() < began + 4:
            time.sleep(0.1)
        assert len([at for at in looks if at > began + 1]) <= 10

    with engine.connect() as connection:
        ended = sa.select(sa.func.count()).where(Task.state == "completed")
        while connection.rollback() or not connection.scalar(ended):
            assert time.monotonic() < began + 4 + SOON
            time.sleep(0.05)
