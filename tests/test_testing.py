"""apoq.testing: what has been added in a transaction that is rolled back, and running it there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from apoq import (
    AsyncRunningTask,
    Cancel,
    InvalidArguments,
    InvalidData,
    InvalidProcessor,
    InvalidTask,
    Queue,
    Retry,
    SchemaMismatch,
    SessionMisused,
    Snooze,
    Task,
    UnsupportedDatabase,
    UnsupportedSession,
    Worker,
    prepare,
)
from apoq.testing import assert_enqueued, drain, enqueued, freeze, rolled_back, travel

HOUR = timedelta(hours=1)
LEDGER = sa.table("ledger", sa.column("task_id"))


@pytest.fixture
def worker(shared_engine) -> Worker:
    return Worker(shared_engine)


@pytest.fixture(params=["engine", "connection"])
def session(request, shared_engine) -> Iterator[Session]:
    """A session that is rolled back: on an engine, or on a connection, where it may commit."""
    if request.param == "engine":
        with Session(shared_engine) as session:
            yield session
            session.rollback()
        return
    with shared_engine.connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        transaction.rollback()


def ledger(session) -> list[int]:
    return list(session.execute(sa.select(LEDGER.c.task_id)).scalars())


def note(task) -> None:
    task.session.execute(sa.insert(LEDGER).values(task_id=task.id))


# What has been added.


def test_what_was_added_is_found_by_its_type_and_data(session, queue):
    task = queue.add(session, "greet", {"user_id": 7, "locale": "en"})
    queue.add(session, "greet", {"user_id": 8})

    assert enqueued(session, "greet", user_id=7) == [task]


def test_it_is_found_by_the_arguments_of_add(session, queue):
    task = queue.add(session, "greet", {"color": "💖"})

    assert enqueued(session, "greet", {"color": "💖"}) == [task]


def test_without_a_type_it_is_all_that_is_pending(session, queue):
    added = [queue.add(session, "greet"), queue.add(session, "leave")]

    assert enqueued(session) == added


def test_data_that_is_no_object_is_compared_as_a_whole(session, queue):
    queue.add(session, "sum", [1, 2])

    assert enqueued(session, "sum", [1, 2])
    assert not enqueued(session, "sum", [1])
    assert not enqueued(session, "sum", key=1)


def test_what_json_made_of_a_value_is_found_by_the_value(session, queue):
    queue.add(session, "at", {"when": "2026-01-01T09:00:00Z", "pair": [1, 2]})

    assert enqueued(session, "at", when=datetime(2026, 1, 1, 9, tzinfo=UTC), pair=(1, 2))


def test_a_key_that_the_data_does_not_have_is_not_none(session, queue):
    queue.add(session, "greet", {})

    assert not enqueued(session, "greet", locale=None)


def test_other_queues_are_left_out_where_one_is_named(session, queue):
    queue.add(session, "greet")
    task = Queue("emails").add(session, "greet")

    assert enqueued(session, "greet", queue="emails") == [task]
    assert enqueued(session, "greet", queue=Queue("emails")) == [task]
    assert len(enqueued(session, "greet")) == 2


def test_a_mapped_task_counts_before_it_is_flushed(session):
    task = Task(type="greet", data={"user_id": 7})
    session.add(task)

    assert enqueued(session, "greet", user_id=7) == [task]


def test_what_was_rolled_back_is_not_enqueued(session, queue):
    with session.begin_nested() as savepoint:
        queue.add(session, "greet")
        savepoint.rollback()

    assert not enqueued(session, "greet")


def test_where_none_is_found_the_text_says_what_there_is(session, queue):
    queue.add(session, "greet", {"user_id": 8})

    assert repr(enqueued(session, "greet", user_id=7)) == '[] (there is: greet {"user_id": 8})'


def test_the_assertion_answers_the_one_task(session, queue):
    task = queue.add(session, "greet", {"user_id": 7})

    assert assert_enqueued(session, "greet", user_id=7) is task


def test_the_assertion_says_what_there_is_instead(session, queue, worker):
    worker.use("audit", lambda task: None)
    queue.add(session, "audit")
    drain(session, worker)
    queue.add(session, "greet", {"user_id": 8})
    Queue("emails").add(session, "greet", {"user_id": 7})

    with pytest.raises(AssertionError) as raised:
        assert_enqueued(session, "greet", queue="default", user_id=7)

    assert str(raised.value).splitlines() == [
        "no 'greet' with user_id=7 is pending. The tasks in this transaction:",
        "  audit {} (completed)",
        '  greet {"user_id": 8}',
        "  greet {\"user_id\": 7} in the queue 'emails'",
    ]


def test_the_assertion_refuses_two(session, queue):
    queue.add_many(session, "greet", [{"user_id": 7}, {"user_id": 7}])

    with pytest.raises(AssertionError, match="expected one pending task, found 2"):
        assert_enqueued(session, "greet", user_id=7)


# Running it.


def test_what_is_due_runs_and_is_answered(session, queue, worker):
    seen = []
    worker.use("greet", lambda task: seen.append(task.data))
    task = queue.add(session, "greet", {"user_id": 7})

    ran = drain(session, worker)

    assert ran == [task]
    assert (task.state, seen) == ("completed", [{"user_id": 7}])


def test_nothing_is_committed(session, queue, worker, shared_engine):
    worker.use("greet", note)
    queue.add(session, "greet")
    drain(session, worker)

    with Session(shared_engine) as other:
        assert not enqueued(other)
        assert not ledger(other)
        assert not other.scalars(sa.select(Task)).all()


def test_tasks_run_in_the_order_in_which_they_are_claimed(session, queue, worker):
    seen = []
    worker.use("greet", lambda task: seen.append(task.data))
    now = datetime.now(UTC)
    queue.add(session, "greet", "second", process_at=now - HOUR)
    queue.add(session, "greet", "third")
    queue.add(session, "greet", "first", priority=1)

    drain(session, worker)

    assert seen == ["first", "second", "third"]


def test_what_processors_write_is_seen_by_the_session(session, queue, worker):
    worker.use("greet", note)
    task = queue.add(session, "greet")

    drain(session, worker)

    assert ledger(session) == [task.id]


def test_what_the_session_holds_is_written_before(session, queue, worker):
    seen = []
    worker.use("greet", lambda task: seen.append(task.session.get(Task, noted.id).data))
    noted = queue.add(session, "leave", delay=HOUR)
    queue.add(session, "greet")
    noted.data = {"changed": True}

    drain(session, worker)

    assert seen == [{"changed": True}]


def test_an_error_is_raised_and_says_of_which_task(session, queue, worker):
    def fail(task):
        raise OSError("no mail server")

    worker.use("greet", fail)
    queue.add(session, "greet", {"user_id": 7})

    with pytest.raises(OSError, match="no mail server") as raised:
        drain(session, worker)

    (note,) = raised.value.__notes__
    assert "greet" in note
    assert "{'user_id': 7}" in note


def test_an_attempt_that_raised_is_written_all_the_same(session, queue, worker):
    def fail(task):
        note(task)
        raise OSError("no mail server")

    worker.use("greet", fail)
    task = queue.add(session, "greet")

    with pytest.raises(OSError):
        drain(session, worker)

    assert (task.state, task.fail_count, task.error["message"]) == ("pending", 1, "no mail server")
    assert not ledger(session)


def test_errors_may_be_recorded_instead(session, queue, worker):
    def fail(task):
        raise OSError

    worker.use("greet", fail, retry_limit=0)
    worker.use("leave", note)
    queue.add(session, "greet")
    queue.add(session, "leave")

    ran = drain(session, worker, errors="record")

    assert [task.state for task in ran] == ["failed", "completed"]


def test_a_retry_runs_when_it_is_due(session, queue, worker):
    def fail_once(task):
        if task.attempt == 1:
            raise OSError

    worker.use("greet", fail_once, retry_delay=lambda fail_count: 60)
    task = queue.add(session, "greet")

    drain(session, worker, errors="record")
    assert task.state == "pending"
    with travel(session, timedelta(seconds=61)):
        drain(session, worker)

    assert (task.state, task.attempt, task.fail_count) == ("completed", 2, 1)


def test_the_retry_limit_holds(session, queue, worker):
    worker.use("greet", lambda task: 1 / 0, retry_limit=2, retry_delay=lambda fail_count: 0)
    queue.add(session, "greet")

    (task,) = drain(session, worker, errors="record")

    assert (task.state, task.attempt, task.fail_count) == ("failed", 3, 3)


def test_outcomes_are_no_errors(session, queue, worker):
    outcomes = {"retry": Retry(delay=60), "cancel": Cancel("no"), "snooze": Snooze(60)}

    def choose(task):
        raise outcomes[task.type]

    for type_ in outcomes:
        worker.use(type_, choose)
        queue.add(session, type_)

    ran = drain(session, worker)

    assert [(task.type, task.state, task.attempt) for task in ran] == [
        ("retry", "pending", 1),
        ("cancel", "cancelled", 1),
        ("snooze", "pending", 0),
    ]


def test_a_retry_without_an_attempt_left_is_an_error(session, queue, worker):
    def again(task):
        raise Retry("the queue is full")

    worker.use("greet", again, retry_limit=0)
    queue.add(session, "greet")

    with pytest.raises(Retry, match="the queue is full"):
        drain(session, worker)


def test_a_failed_statement_does_not_end_the_test_s_transaction(session, queue, worker):
    def fail(task):
        task.session.execute(sa.text("SELECT 1 / 0"))

    worker.use("greet", fail)
    worker.use("leave", note)
    task = queue.add(session, "greet")
    leave = queue.add(session, "leave")

    drain(session, worker, errors="record")

    assert (task.state, task.error["class"]) == ("pending", "DataError")
    assert ledger(session) == [leave.id]


def test_a_session_of_the_processor_s_own_on_the_connection_is_undone_unless_it_commits(
    session, queue, worker
):
    def write(task):
        own = Session(session.connection())
        own.execute(sa.insert(LEDGER).values(task_id=1))
        own.commit()
        own.execute(sa.insert(LEDGER).values(task_id=2))
        raise OSError

    worker.use("greet", write)
    queue.add(session, "greet")

    drain(session, worker, errors="record")

    assert ledger(session) == [1]


def test_a_statement_that_failed_in_nobody_s_savepoint_is_undone(session, queue, worker):
    worker.use("greet", lambda task: session.connection().execute(sa.text("SELECT 1 / 0")))
    task = queue.add(session, "greet")

    drain(session, worker, errors="record")

    assert task.state == "pending"


def test_a_processor_that_commits_the_test_s_session_goes_on(shared_engine, queue, worker):
    def commit(task):
        session.execute(sa.insert(LEDGER).values(task_id=task.id))
        session.commit()

    worker.use("greet", commit)
    with shared_engine.connect() as connection, connection.begin() as transaction:
        session = Session(connection, join_transaction_mode="create_savepoint")
        for _ in range(2):
            queue.add(session, "greet")

        ran = drain(session, worker)

        assert [task.state for task in ran] == ["completed"] * 2
        assert len(ledger(session)) == 2
        session.close()
        transaction.rollback()


def test_a_processor_can_not_commit_its_session(session, queue, worker):
    worker.use("greet", lambda task: task.session.commit())
    queue.add(session, "greet")

    with pytest.raises(SessionMisused):
        drain(session, worker)


def test_what_processors_add_runs_too(session, queue, worker):
    worker.use("first", lambda task: queue.add(task.session, "second"))
    worker.use("second", note)
    queue.add(session, "first")

    ran = drain(session, worker)

    assert [(task.type, task.state) for task in ran] == [("first", "completed"), ("second", "completed")]


def test_a_task_that_adds_itself_comes_to_the_limit(session, queue, worker):
    worker.use("again", lambda task: queue.add(task.session, "again"))
    queue.add(session, "again")

    with pytest.raises(
        RuntimeError, match=r"after 20 attempts, but tasks are still due in Queue\('default'\)"
    ):
        drain(session, worker, limit=20)


def test_what_has_come_to_the_limit_and_is_done_is_no_error(session, queue, worker):
    worker.use("greet", note)
    queue.add_many(session, "greet", [{}, {}])

    assert len(drain(session, worker, limit=2)) == 2


def test_processors_are_called_in_their_context(session, queue, shared_engine):
    order = []

    @contextmanager
    def middleware(task):
        order.append("in")
        yield
        order.append("out")

    worker = Worker(shared_engine, middleware=middleware)
    worker.use("greet", lambda task: order.append(task.type))
    queue.add(session, "greet")

    drain(session, worker)

    assert order == ["in", "greet", "out"]


def test_a_coroutine_runs_on_a_session_that_is_not_asyncio_s(session, queue, worker):
    async def greet(task):
        await asyncio.sleep(0)
        await task.session.execute(sa.insert(LEDGER).values(task_id=task.id))
        await queue.add(task.session, "leave", {"from": task.id})

    worker.use("greet", greet)
    worker.use("leave", note)
    task = queue.add(session, "greet")

    ran = drain(session, worker)

    assert [ran.state for ran in ran] == ["completed", "completed"]
    assert ledger(session) == [task.id, ran[1].id]


def test_an_attempt_that_takes_too_long_has_failed(session, queue, worker):
    def slow(task):
        while not task.should_stop:
            pass

    async def slow_coroutine(task):
        await asyncio.Event().wait()

    worker.use("slow", slow, timeout=0.01)
    worker.use("slow coroutine", slow_coroutine, timeout=0.01)
    tasks = [queue.add(session, "slow"), queue.add(session, "slow coroutine")]

    drain(session, worker, errors="record")

    assert [task.error["class"] for task in tasks] == ["TimeoutError"] * 2


def test_a_task_that_is_not_kept_is_gone(session, queue, shared_engine):
    worker = Worker(shared_engine, keep_completed=timedelta())
    worker.use("greet", note)
    task_id = queue.add(session, "greet").id

    (ran,) = drain(session, worker)

    assert (ran.id, ran.state) == (task_id, "completed")
    assert not session.scalars(sa.select(Task.id)).all()


def test_several_queues_are_drained(session, shared_engine):
    emails, reports = Queue("emails"), Queue("reports")
    worker = Worker(shared_engine, emails, reports)
    worker.use("greet", note)
    emails.add(session, "greet")
    reports.add(session, "greet")
    Queue("other").add(session, "greet")

    ran = drain(session, worker)

    assert [task.queue for task in ran] == ["emails", "reports"]


def test_a_scoped_session_is_the_session_in_it(shared_engine, queue, worker):
    session = scoped_session(sessionmaker(shared_engine))
    worker.use("greet", note)
    queue.add(session, "greet")

    ran = drain(session, worker)

    assert [task in session for task in ran] == [True]
    session.remove()


def test_a_connection_is_drained(shared_engine, queue, worker):
    worker.use("greet", note)
    with shared_engine.connect() as connection:
        task = queue.add(connection, "greet")

        assert [task.id for task in enqueued(connection, "greet")] == [task.id]
        ran = drain(connection, worker)

        assert [(task.id, task.state) for task in ran] == [(task.id, "completed")]
        connection.rollback()


def test_a_cancelled_task_does_not_run(session, queue, worker):
    worker.use("greet", note)
    task = queue.add(session, "greet")
    queue.cancel(session, task)

    assert drain(session, worker) == []
    assert task.state == "cancelled"


def test_a_task_that_is_cancelled_while_it_runs_stays_cancelled(session, queue, worker):
    worker.use("greet", lambda task: queue.cancel(session, task.id))
    queue.add(session, "greet")

    (task,) = drain(session, worker)

    assert task.state == "cancelled"


def test_a_failed_task_that_is_to_be_retried_runs_anew(session, queue, worker):
    at = datetime(2026, 1, 1, 9, tzinfo=UTC)
    errors = [OSError("away")]

    def greet(task):
        for error in errors:
            raise error

    worker.use("greet", greet, retry_limit=0)
    with freeze(session, at):
        queue.add(session, "greet")
        (task,) = drain(session, worker, errors="record")
        errors.clear()
        queue.retry(session, task)
        drain(session, worker)

    assert (task.state, task.completed_at) == ("completed", at)


def test_keyboard_interrupts_and_pytest_s_own_are_raised_whatever_was_asked_for(session, queue, worker):
    worker.use("skip", lambda task: pytest.skip("not here"))
    queue.add(session, "skip")

    with pytest.raises(pytest.skip.Exception):
        drain(session, worker, errors="record")


# The clock.


def test_a_delayed_task_is_not_due(session, queue, worker):
    worker.use("greet", note)
    queue.add(session, "greet", delay=HOUR)

    assert drain(session, worker) == []


def test_it_is_due_when_its_time_has_come(session, queue, worker):
    worker.use("greet", note)
    queue.add(session, "greet", delay=HOUR)

    with travel(session, HOUR - timedelta(minutes=1)):
        assert drain(session, worker) == []
    with travel(session, HOUR):
        assert len(drain(session, worker)) == 1


def test_what_is_added_follows_a_frozen_clock(session, queue):
    at = datetime(2026, 1, 1, 9, tzinfo=UTC)

    with freeze(session, at):
        now = queue.add(session, "greet")
        later = queue.add(session, "greet", delay=HOUR)
        mapped = Task(type="greet")
        session.add(mapped)
        session.flush()

    assert (now.created_at, now.process_at) == (at, at)
    assert (later.created_at, later.process_at) == (at, at + HOUR)
    assert (mapped.created_at, mapped.process_at) == (at, at)


def test_many_that_are_added_follow_it_too(session, queue):
    at = datetime(2026, 1, 1, 9, tzinfo=UTC)

    with freeze(session, at):
        queue.add_many(session, "greet", [{}] * 1_500, delay=HOUR)

    times = sa.select(Task.created_at, Task.process_at).distinct()
    assert session.execute(times).all() == [(at, at + HOUR)]


def test_what_becomes_of_a_task_follows_it(session, queue, worker):
    at = datetime(2026, 1, 1, 9, tzinfo=UTC)
    worker.use("greet", note)
    worker.use("fail", lambda task: 1 / 0, retry_delay=lambda fail_count: 60)

    with freeze(session, at):
        queue.add(session, "greet")
        queue.add(session, "fail")
        greet, fail = drain(session, worker, errors="record")

    assert greet.completed_at == at
    assert (fail.failed_at, fail.process_at) == (at, at + timedelta(minutes=1))


def test_a_frozen_clock_can_be_put_forward(session, queue, worker):
    at = datetime(2026, 1, 1, 9, tzinfo=UTC)
    worker.use("greet", note)

    with freeze(session, at):
        queue.add(session, "greet", delay=HOUR)
        assert drain(session, worker) == []
        with travel(session, HOUR):
            (task,) = drain(session, worker)

    assert task.completed_at == at + HOUR


def test_journeys_add_up(session, queue, worker):
    worker.use("greet", note)
    queue.add(session, "greet", delay=2 * HOUR)

    with travel(session, HOUR), travel(session, HOUR):
        assert len(drain(session, worker)) == 1


def test_afterwards_the_clock_is_the_database_s(session, queue):
    with freeze(session, datetime(2026, 1, 1, 9, tzinfo=UTC)):
        pass
    task = queue.add(session, "greet")

    assert task.created_at == session.scalar(sa.select(sa.func.now()))


def test_the_clock_is_the_connection_s_whichever_session_is_on_it(session, queue):
    at = datetime(2026, 1, 1, 9, tzinfo=UTC)

    with freeze(session, at), Session(session.connection()) as other:
        assert queue.add(other, "greet").created_at == at


def test_other_sessions_have_their_own_clock(session, queue, shared_engine):
    at = datetime(2026, 1, 1, 9, tzinfo=UTC)

    with freeze(session, at), Session(shared_engine) as other:
        assert queue.add(other, "greet").created_at != at


def test_statements_about_other_tables_read_the_database_s_clock(session):
    with freeze(session, datetime(2026, 1, 1, 9, tzinfo=UTC)):
        assert session.scalar(sa.text("SELECT now()")).date() != datetime(2026, 1, 1, tzinfo=UTC).date()


def test_a_sequence_can_be_executed(session):
    with travel(session, timedelta(days=2)):
        assert session.scalar(sa.Sequence("apoq_tasks_id_seq")) > 0


def test_it_stays_frozen_when_the_session_begins_anew(session, queue):
    at = datetime(2026, 1, 1, 9, tzinfo=UTC)

    with freeze(session, at):
        session.rollback()
        assert queue.add(session, "greet").created_at == at


# Misuse.


def test_a_drain_without_processors_says_what_to_give(session):
    with pytest.raises(TypeError, match=r"drain\(session, worker\)"):
        drain(session)


def test_a_drain_of_something_else_says_what_it_takes(session):
    with pytest.raises(TypeError, match="must be given workers or queues after the session, got 'default'"):
        drain(session, "default")


def test_errors_are_raised_or_recorded(session, worker):
    with pytest.raises(ValueError, match='"raise" or "record", got \'ignore\''):
        drain(session, worker, errors="ignore")


def test_an_engine_is_no_session(shared_engine, worker):
    for call in (lambda: drain(shared_engine, worker), lambda: enqueued(shared_engine)):
        with pytest.raises(UnsupportedSession, match=r"the session or the connection of your test.*Engine"):
            call()


def test_a_connection_of_psycopg_s_is_told_from_sqlalchemy_s(shared_engine, worker):
    connection = shared_engine.raw_connection()

    with pytest.raises(UnsupportedSession, match=r"got psycopg\.Connection"):
        drain(connection.driver_connection, worker)

    connection.close()


def test_only_an_engine_can_be_rolled_back(session):
    with pytest.raises(TypeError, match="an Engine or an AsyncEngine, got Session"):
        rolled_back(session)


def test_a_session_that_is_rolled_back_may_commit_and_roll_back(shared_engine, queue):
    with rolled_back(shared_engine) as session:
        kept = queue.add(session, "kept")
        session.commit()
        queue.add(session, "undone")
        session.rollback()
        assert enqueued(session) == [kept]

    with Session(shared_engine) as other:
        assert not enqueued(other)


def test_a_type_without_a_processor_is_named(session, queue, worker):
    worker.use("greet", note)
    greet = queue.add(session, "greet")
    queue.add(session, "gret")

    with pytest.raises(InvalidProcessor, match=r"have none: gret. There are processors for: greet"):
        drain(session, worker)

    assert greet.state == "completed"


def test_such_a_type_is_left_where_errors_are_recorded(session, queue, worker):
    task = queue.add(session, "gret")

    assert drain(session, worker, errors="record") == []
    assert task.state == "pending"


def test_a_database_without_the_tables_says_what_to_do(empty_url, worker):
    engine = sa.create_engine(empty_url, poolclass=NullPool)
    worker.use("greet", note)

    with Session(engine) as session, pytest.raises(SchemaMismatch, match="prepare"):
        drain(session, worker)
    with Session(engine) as session, pytest.raises(SchemaMismatch, match="prepare"):
        enqueued(session)


def test_a_session_that_can_not_roll_back_is_refused(shared_engine, worker):
    engine = shared_engine.execution_options(isolation_level="AUTOCOMMIT")

    with Session(engine) as session, pytest.raises(UnsupportedSession, match="AUTOCOMMIT"):
        drain(session, worker)


def test_another_database_is_refused(worker):
    with Session(sa.create_engine("sqlite://")) as session, pytest.raises(UnsupportedDatabase):
        drain(session, worker)


def test_a_time_without_a_zone_is_refused(session):
    with pytest.raises(TypeError, match="a datetime with a time zone"):
        freeze(session, datetime(2026, 1, 1))  # noqa: DTZ001


def test_a_journey_is_a_timedelta(session):
    with pytest.raises(TypeError, match="needs a timedelta"):
        travel(session, 3600)


def test_a_coroutine_that_would_block_the_running_loop_is_refused(session, queue, worker):
    async def greet(task):
        pass

    worker.use("greet", greet)
    queue.add(session, "greet")

    async def test():
        drain(session, worker)

    with pytest.raises(RuntimeError, match=r"asyncio.to_thread\(drain"):
        asyncio.run(test())


def test_keywords_need_data_that_has_keys(session):
    with pytest.raises(TypeError, match="data must be a dict if there are keywords"):
        enqueued(session, "sum", [1], key=1)


def test_something_else_than_a_task_is_refused(session):
    with pytest.raises(TypeError, match=r"@queue.task"):
        enqueued(session, note)


# Typed tasks.


@pytest.fixture
def typed():
    queue = Queue("typed")

    @queue.task(type="greet", retry_limit=1)
    def greet(user_id: int, at: datetime | None = None) -> None:
        seen.append((user_id, at))

    @queue.task(type="note")
    async def note(task: AsyncRunningTask, text: str) -> None:
        await task.session.execute(sa.insert(LEDGER).values(task_id=task.id))

    seen: list[object] = []
    return SimpleNamespace(queue=queue, greet=greet, note=note, seen=seen)


def test_a_typed_task_is_found_by_its_arguments(session, typed):
    at = datetime(2026, 1, 1, 9, tzinfo=UTC)
    task = typed.greet.add(session, 7, at=at)

    assert enqueued(session, typed.greet, at=at) == [task]
    assert assert_enqueued(session, typed.greet, user_id=7) is task
    assert not enqueued(session, typed.greet, user_id=8)


def test_it_is_looked_for_in_its_own_queue(session, typed):
    Queue().add(session, "greet", {"user_id": 7})

    assert not enqueued(session, typed.greet)
    assert enqueued(session, typed.greet, queue="default")


def test_an_argument_that_it_does_not_have_is_refused(session, typed):
    with pytest.raises(InvalidTask, match=r"'usr_id'.*its parameters are"):
        enqueued(session, typed.greet, usr_id=7)


def test_an_argument_of_another_type_is_refused(session, typed):
    with pytest.raises(InvalidData, match="user_id"):
        enqueued(session, typed.greet, user_id="7")


def test_a_queue_s_typed_tasks_run_without_a_worker(session, typed):
    typed.greet.add(session, user_id=7)
    note = typed.note.add(session, text="hello")

    ran = drain(session, typed.queue)

    assert [task.state for task in ran] == ["completed"] * 2
    assert typed.seen == [(7, None)]
    assert ledger(session) == [note.id]


def test_a_worker_of_the_queue_runs_them_too(session, typed, shared_engine):
    worker = Worker(shared_engine, typed.queue)
    worker.use("plain", note)
    typed.greet.add(session, user_id=7)
    typed.queue.add(session, "plain")

    assert [task.type for task in drain(session, worker)] == ["greet", "plain"]


def test_data_that_does_not_fit_is_raised(session, typed):
    typed.queue.add(session, "greet", {"user": 7})

    with pytest.raises(InvalidArguments, match="no parameter for the argument 'user'"):
        drain(session, typed.queue)


def test_a_queue_without_typed_tasks_is_refused(session, queue):
    with pytest.raises(InvalidProcessor, match="must have typed tasks"):
        drain(session, queue)


# Schemas.


def test_a_queue_in_a_schema_of_its_own(engine):
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA jobs")
    prepare(engine, schema="jobs")
    queue = Queue(schema="jobs")
    worker = Worker(engine, queue)
    worker.use("greet", lambda task: None)
    at = datetime(2026, 1, 1, 9, tzinfo=UTC)

    with Session(engine) as session, freeze(session, at):
        queue.add(session, "greet", {"user_id": 7}, delay=HOUR)
        assert_enqueued(session, "greet", queue=queue, user_id=7)
        with travel(session, HOUR):
            (task,) = drain(session, worker)
        assert (task.state, task.completed_at) == ("completed", at + HOUR)
        assert task in session
        session.rollback()
