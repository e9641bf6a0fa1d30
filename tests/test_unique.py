"""Tasks with unique keys: of those that hold the same key, a queue has one."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta

import probe
import psycopg
import pytest
import sqlalchemy as sa
from claims import note
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from waiting import patience

from apoq import DuplicateTask, InvalidProcessor, InvalidTask, Queue, Retry, Snooze, Task, prepare
from apoq.testing import assert_enqueued, drain, enqueued, freeze, travel

until = patience(10)

HELD = sa.text("SELECT id FROM apoq_tasks WHERE held_unique_key = :key ORDER BY id")
SERIALIZATION_FAILURE = "40001"


def dsn(engine: sa.Engine) -> str:
    return engine.url.set(drivername="postgresql").render_as_string(hide_password=False)


def add(engine: sa.Engine, queue: Queue, *args, **options) -> Task:
    with Session(engine, expire_on_commit=False) as session, session.begin():
        return queue.add(session, "t", *args, **{"unique_key": "k", **options})


def stored(engine: sa.Engine, **columns) -> list[Task]:
    with Session(engine, expire_on_commit=False) as session:
        return list(session.scalars(sa.select(Task).filter_by(**columns).order_by(Task.id)))


def holding(engine: sa.Engine, key: str = "k") -> list[int]:
    with engine.connect() as connection:
        return list(connection.execute(HELD, {"key": key}).scalars())


# What a second call does


def test_the_second_task_with_a_key_is_not_added(session, queue):
    first = queue.add(session, "t", {"n": 1}, unique_key="k")
    assert (first.is_new, first.add_outcome, first.unique_key) == (True, "added", "k")

    session.expunge_all()
    second = queue.add(session, "t", {"n": 2}, unique_key="k")

    assert (second.id, second.data) == (first.id, {"n": 1})
    assert (second.is_new, second.add_outcome) == (False, "kept")
    assert session.scalar(sa.select(sa.func.count()).select_from(Task)) == 1


def test_tasks_without_a_key_are_new(session, queue):
    task = queue.add(session, "t")

    assert (task.is_new, task.add_outcome, task.unique_key) == (True, "added", None)
    session.expunge_all()
    assert session.get(Task, task.id).add_outcome is None


def test_other_keys_and_other_queues_are_independent(session, queue):
    tasks = [
        queue.add(session, "t", unique_key="k"),
        queue.add(session, "t", unique_key="l"),
        Queue("other").add(session, "t", unique_key="k"),
    ]

    assert all(task.is_new for task in tasks)


def test_a_key_is_shared_by_types(session, queue):
    first = queue.add(session, "u", unique_key="k")

    assert queue.add(session, "v", unique_key="k").id == first.id


def test_the_sessions_object_is_returned_and_keeps_its_changes(session, queue):
    first = queue.add(session, "t", unique_key="k")
    first.priority = 5

    second = queue.add(session, "t", unique_key="k", priority=7)

    assert second is first
    assert second.priority == 5
    assert not second.is_new


def test_a_kept_task_is_in_the_session(session, queue):
    queue.add(session, "t", unique_key="k")
    session.expunge_all()

    kept = queue.add(session, "t", unique_key="k")

    assert kept in session
    assert not session.dirty
    assert not session.new
    assert session.get(Task, kept.id) is kept


def test_replace_gives_the_task_what_the_new_one_would_have(session, queue):
    first = queue.add(session, "t", {"n": 1}, unique_key="k", delay=60, priority=1, retry_limit=3)
    created_at = first.created_at

    second = queue.add(
        session,
        "u",
        {"n": 2},
        unique_key="k",
        on_conflict="replace",
        unique_until="ended",
        timeout=5,
        meta={"a": 1},
    )

    assert second is first
    assert second.add_outcome == "replaced"
    for _ in range(2):
        assert (second.type, second.data, second.priority, second.retry_limit) == ("u", {"n": 2}, 0, None)
        assert (second.timeout, second.meta, second.unique_until_end) == (
            timedelta(seconds=5),
            {"a": 1},
            True,
        )
        assert second.created_at == created_at
        assert second.process_at < created_at + timedelta(seconds=50)
        session.expire(second)


def test_a_replacement_is_undone_by_a_rollback(session, queue):
    task = queue.add(session, "t", {"n": 1}, unique_key="k")
    with session.begin_nested() as savepoint:
        queue.add(session, "t", {"n": 2}, unique_key="k", on_conflict="replace")
        assert task.data == {"n": 2}
        savepoint.rollback()

    assert task.data == {"n": 1}


def test_raise_leaves_the_transaction_usable(session, queue):
    first = queue.add(session, "t", unique_key="k", on_conflict="raise")
    with pytest.raises(DuplicateTask, match=f"'k' must be free, and the task {first.id} has it") as caught:
        queue.add(session, "t", unique_key="k", on_conflict="raise")

    assert (caught.value.unique_key, caught.value.task_id) == ("k", first.id)
    assert queue.add(session, "t", unique_key="l").is_new


def listened_to(engine: sa.Engine) -> Session:
    session = Session(engine)
    sa.event.listen(session, "do_orm_execute", lambda _state: None)
    return session


KINDS = ["session", "session that is listened to", "scoped session", "connection", "psycopg"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_session_can_add_unique_tasks(engine, queue, kind):
    given = {
        "session": lambda: Session(engine),
        "session that is listened to": lambda: listened_to(engine),
        "scoped session": scoped_session(sessionmaker(engine)),
        "connection": engine.connect,
        "psycopg": lambda: psycopg.connect(dsn(engine)),
    }[kind]()
    first = queue.add(given, "t", {"n": 1}, unique_key="k", timeout=3)
    kept = queue.add(given, "t", {"n": 2}, unique_key="k")
    data = kept.data
    replaced = queue.add(given, "t", {"n": 3}, unique_key="k", on_conflict="replace", delay=60)
    with pytest.raises(DuplicateTask):
        queue.add(given, "t", unique_key="k", on_conflict="raise")
    count = queue.add_many(given, "t", [1, 2, 2], unique_key=str)
    given.commit()

    assert [first.id, first.id] == [kept.id, replaced.id]
    assert data == {"n": 1}
    assert (replaced.data, replaced.timeout, count) == ({"n": 3}, None, 2)
    assert replaced.process_at > datetime.now(UTC) + timedelta(seconds=50)
    assert [task.data for task in stored(engine)] == [{"n": 3}, 1, 2]
    given.close()


@pytest.mark.parametrize("kind", ["session", "connection", "psycopg"])
def test_every_kind_of_asyncio_session_can_add_unique_tasks(engine, queue, kind):
    async def main() -> None:
        async_engine = create_async_engine(engine.url)
        opened = {
            "session": lambda: AsyncSession(async_engine),
            "connection": async_engine.connect,
            "psycopg": lambda: psycopg.AsyncConnection.connect(dsn(engine)),
        }[kind]()
        given = await opened if kind == "psycopg" else opened
        async with given:
            first = await queue.add(given, "t", {"n": 1}, unique_key="k")
            kept = await queue.add(given, "t", {"n": 2}, unique_key="k")
            assert (kept.id, kept.data, kept.is_new) == (first.id, {"n": 1}, False)
            replaced = await queue.add(given, "t", {"n": 3}, unique_key="k", on_conflict="replace")
            assert (replaced.id, replaced.data) == (first.id, {"n": 3})
            with pytest.raises(DuplicateTask):
                await queue.add(given, "t", unique_key="k", on_conflict="raise")
            assert await queue.add_many(given, "t", [1, 2, 2], unique_key=str) == 2
            await given.commit()
        await async_engine.dispose()

    asyncio.run(main())
    assert [task.data for task in stored(engine)] == [{"n": 3}, 1, 2]


@pytest.mark.parametrize("style", ["German, DMY", "ISO, MDY"])
def test_a_kept_task_is_read_in_any_date_style(engine, queue, style):
    add(engine, queue, delay=60, timeout=90)
    with psycopg.connect(dsn(engine)) as connection:
        connection.execute(f"SET DateStyle = {style}; SET IntervalStyle = sql_standard")
        kept = queue.add(connection, "t", unique_key="k")

    assert kept.process_at > datetime.now(UTC) + timedelta(seconds=30)
    assert kept.timeout == timedelta(seconds=90)


def test_a_queue_in_a_schema_has_keys_of_its_own(engine):
    prepare(engine, schema="jobs")
    queue = Queue(schema="jobs")
    first = add(engine, queue)

    assert add(engine, Queue()).is_new
    assert add(engine, queue).id == first.id
    assert type(add(engine, queue, on_conflict="replace")) is queue.task_class


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unique_key": ""}, "a unique key must not be empty"),
        ({"unique_key": 7}, "a unique key must be a string, got 7"),
        ({"unique_key": "k" * 256}, "a unique key must have at most 255 characters, got 256"),
        ({"unique_key": "a\0b"}, "a unique key can't hold U\\+0000"),
        ({"unique_key": lambda data: 7}, "a unique key must be a string, got 7"),
        ({"unique_until": "ended"}, "unique_until must be given with a unique_key, got unique_until='ended'"),
        ({"on_conflict": "skip"}, "on_conflict must be given with a unique_key"),
        ({"debounce": 5}, "debounce must be given with a unique_key"),
        ({"max_wait": 5}, "max_wait must be given with a unique_key"),
        (
            {"unique_key": "k", "unique_until": "begun"},
            "unique_until must be 'started' or 'ended', got 'begun'",
        ),
        (
            {"unique_key": "k", "on_conflict": "keep"},
            "on_conflict must be 'skip', 'replace' or 'raise', got 'keep'",
        ),
        ({"unique_key": "k", "on_conflict": []}, "on_conflict must be .* got \\[\\]"),
        (
            {"unique_key": "k", "debounce": 5, "on_conflict": "skip"},
            "on_conflict must not be given with debounce, which implies it, got 'skip'",
        ),
        ({"unique_key": "k", "debounce": 5, "delay": 1}, "debounce and delay can't both be given"),
        (
            {"unique_key": "k", "debounce": 5, "process_at": datetime.now(UTC)},
            "debounce and process_at can't both be given",
        ),
        ({"unique_key": "k", "debounce": -1}, "debounce must be"),
        ({"unique_key": "k", "debounce": "soon"}, "debounce must be"),
        ({"unique_key": "k", "debounce": 5, "max_wait": "soon"}, "max_wait must be"),
        ({"unique_key": "k", "max_wait": 5}, "max_wait must be given with debounce, got max_wait=5"),
        ({"unique_key": "k", "debounce": 5, "max_wait": 4}, "max_wait must not be less than debounce"),
    ],
)
def test_bad_options_are_refused_before_anything_is_sent(session, queue, options, message):
    with pytest.raises(InvalidTask, match=message):
        queue.add(session, "t", {}, **options)
    with pytest.raises(InvalidTask, match=message.replace("a unique key", "(a|the) unique key.*")):
        queue.add_many(session, "t", [{}], **options)

    assert not session.in_transaction()


# How long a key is held


def test_a_key_is_free_when_a_worker_has_started_the_task(engine, queue, worker):
    seen = []
    worker.use("t", lambda task: seen.append(add(engine, queue).is_new))
    first = add(engine, queue)
    worker.work()

    assert seen == [True]
    [done, waiting] = stored(engine)
    assert (done.id, done.state, done.unique_key, done.held_unique_key) == (first.id, "completed", "k", None)
    assert (waiting.state, waiting.held_unique_key) == ("pending", "k")


def fail(task) -> None:
    raise ValueError


def snooze(task) -> None:
    raise Snooze(timedelta(hours=1))


def retry(task) -> None:
    raise Retry(timedelta(hours=1))


@pytest.mark.parametrize(
    ("processor", "state", "is_held"),
    [
        (lambda task: None, "completed", False),
        (fail, "failed", False),
        (snooze, "pending", True),
        (retry, "pending", True),
    ],
)
def test_a_key_until_the_end_is_held_by_a_running_task_and_until_it_has_ended(
    engine, queue, worker, processor, state, is_held
):
    seen = []

    def process(task) -> None:
        seen.extend(
            add(engine, queue, unique_until="ended", on_conflict=what).add_outcome
            for what in ("skip", "replace")
        )
        processor(task)

    worker.use("t", process, retry_limit=0 if state == "failed" else 5)
    first = add(engine, queue, unique_until="ended")
    worker.work()

    assert seen == ["kept", "kept"]
    assert [task.state for task in stored(engine)] == [state]
    assert holding(engine) == ([first.id] if is_held else [])
    assert add(engine, queue).is_new is not is_held


def test_a_task_that_is_cancelled_or_deleted_gives_its_key_up(engine, queue):
    first = add(engine, queue)
    with Session(engine) as session, session.begin():
        assert queue.cancel(session, first.id)
    second = add(engine, queue)
    assert second.is_new
    with Session(engine) as session, session.begin():
        session.delete(session.get(Task, second.id))

    assert add(engine, queue).is_new


def test_tasks_that_are_deleted_on_completion_give_their_keys_up(engine, queue, make_worker):
    worker = make_worker(keep_completed=0)
    worker.use("t", lambda task: None)
    add(engine, queue, unique_until="ended")
    worker.work()

    assert stored(engine) == []
    assert add(engine, queue).is_new


def test_a_key_of_a_task_that_another_program_has_ended_is_free(engine, queue):
    """The Node.js original knows nothing of keys."""
    first = add(engine, queue)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE apoq_tasks SET state = 'completed', completed_at = now()"))

    second = add(engine, queue, on_conflict="raise")
    assert second.id != first.id
    assert holding(engine) == [second.id]


def test_a_task_can_be_cancelled_by_the_key_that_it_holds(engine, queue, worker):
    worker.use("t", lambda task: None)
    with Session(engine) as session, session.begin():
        done = queue.add(session, "t", unique_key="k")
    worker.work()
    with Session(engine) as session, session.begin():
        assert not queue.cancel(session, unique_key="k")
        waiting = queue.add(session, "t", unique_key="k")
        assert not Queue("other").cancel(session, unique_key="k")
        assert queue.cancel(session, unique_key="k", reason="why")
        assert (waiting.state, waiting.held_unique_key, waiting.error["message"]) == (
            "cancelled",
            None,
            "why",
        )
        assert not queue.cancel(session, unique_key="k")

    assert [task.state for task in stored(engine)] == ["completed", "cancelled"]
    assert done.id != waiting.id


def test_cancel_takes_a_task_or_a_key(session, queue):
    with pytest.raises(InvalidTask, match="task and unique_key can't both be given"):
        queue.cancel(session, 7, unique_key="k")
    with pytest.raises(InvalidTask, match="a unique key must not be empty"):
        queue.cancel(session, unique_key="")


# A task that is pending again


@pytest.mark.parametrize("processor", [fail, snooze, retry])
def test_a_task_that_is_pending_again_takes_its_key_if_it_is_free(engine, queue, worker, processor):
    worker.use("t", processor, retry_limit=5, retry_delay=3600)
    first = add(engine, queue)
    worker.work()

    assert holding(engine) == [first.id]
    assert add(engine, queue).id == first.id


def test_a_task_that_is_pending_again_leaves_its_key_to_another_task(engine, queue, worker):
    def process(task) -> None:
        if len(stored(engine)) == 1:
            add(engine, queue, delay=3600)
            raise Snooze(timedelta())

    worker.use("t", process)
    first = add(engine, queue)
    worker.work()
    [_, second] = stored(engine)

    assert holding(engine) == [second.id]
    worker.work()
    assert [task.state for task in stored(engine)] == ["completed", "pending"]
    assert first.id != second.id


def test_a_retry_does_not_wait_for_a_caller_who_adds_a_task_with_its_key(engine, queue, worker):
    with Session(engine) as caller:

        def process(task) -> None:
            queue.add(caller, "t", unique_key="k", delay=3600)
            raise Retry(timedelta(hours=1))

        worker.use("t", process)
        first = add(engine, queue)
        began = time.monotonic()
        worker.work()
        assert time.monotonic() < began + 5
        assert [task.state for task in stored(engine)] == ["pending"]
        assert holding(engine) == []
        caller.commit()

    assert holding(engine) != [first.id]


DIED = [
    """
    INSERT INTO apoq_workers
        (id, host, pid, version, queues, concurrency, expires_at, grace, last_heartbeat_at)
    VALUES (
        gen_random_uuid(), 'h', 1, '1', '{}', 1, now() - interval '1 hour', '1 second',
        now() - interval '1 hour'
    )
    """,
    """
    UPDATE apoq_tasks SET state = 'running', attempt = 1, claim_token = 1, claimed_at = now(),
        held_unique_key = NULL, worker_id = (SELECT id FROM apoq_workers)
    """,
]
"""A worker that claimed the tasks is dead."""


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_rescued_task_takes_its_key_only_if_it_is_free(engine, queue, make_worker, is_taken):
    first = add(engine, queue)
    with engine.begin() as connection:
        for statement in DIED:
            connection.execute(sa.text(statement))
        note(connection)
    holder = add(engine, queue, delay=3600) if is_taken else first
    rescuer = make_worker()
    rescuer.use("another type", print)
    rescuer.start()

    until(lambda: [task.state for task in stored(engine, id=first.id)] == ["pending"])
    until(lambda: holding(engine) == [holder.id])


@pytest.mark.as_owner("only an operator retries tasks with unique keys")
def test_retry_takes_the_key_again(engine, queue, worker):
    worker.use("t", lambda task: None)
    first = add(engine, queue)
    worker.work()
    with Session(engine) as session, session.begin():
        assert queue.retry(session, first.id)
        assert session.get(Task, first.id).held_unique_key == "k"

    assert holding(engine) == [first.id]
    assert len(stored(engine)) == 1


def test_retry_leaves_a_task_whose_key_is_held_as_it_is(engine, queue, worker):
    worker.use("t", lambda task: None)
    first = add(engine, queue)
    worker.work()
    second = add(engine, queue)
    with Session(engine) as session, session.begin():
        assert not queue.retry(session, first.id)
        assert not queue.retry(session, second.id)

    assert [task.state for task in stored(engine)] == ["completed", "pending"]


def test_retry_waits_for_a_caller_who_adds_a_task_with_its_key(engine, queue, worker):
    worker.use("t", lambda task: None)
    first = add(engine, queue)
    worker.work()
    with Session(engine) as adding, Session(engine) as retrying, ThreadPoolExecutor() as pool:
        queue.add(adding, "t", unique_key="k")
        retried = pool.submit(queue.retry, retrying, first.id)
        until(lambda: waits_for_a_lock(engine))
        adding.commit()

        assert retried.result() is False
        assert queue.add(retrying, "t", unique_key="l").is_new  # the transaction is unhurt


def waits_for_a_lock(engine: sa.Engine) -> bool:
    with engine.connect() as connection:
        return bool(
            connection.scalar(
                sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'")
            )
        )


# Two at once


def test_a_second_caller_waits_for_the_first_and_adds_the_task_if_that_rolls_back(engine, queue):
    with Session(engine) as first, ThreadPoolExecutor() as pool:
        queue.add(first, "t", unique_key="k")
        second = pool.submit(add, engine, queue)
        until(lambda: waits_for_a_lock(engine))
        first.rollback()

        assert second.result().is_new


def test_a_task_that_was_kept_is_claimed_only_after_the_commit(engine, queue, worker):
    """So it sees what the caller has written."""
    worker.use("t", lambda task: None)
    add(engine, queue)
    with Session(engine) as caller, Session(engine) as another:
        assert not queue.add(caller, "t", unique_key="k").is_new
        assert not queue.add(another, "t", unique_key="k").is_new  # which doesn't wait
        another.commit()
        assert worker.work() is None
        caller.commit()

    assert worker.work() is not None


@pytest.mark.parametrize("how", ["added", "kept", "added with others", "kept with others"])
def test_a_worker_is_notified_after_the_commit(engine, queue, make_worker, how):
    """Also of a task that was kept: while it was locked, a claim may have skipped it."""
    started = threading.Event()
    if "kept" in how:
        add(engine, queue)
    worker = make_worker(poll_interval=600)
    worker.use("t", lambda task: started.set())
    with Session(engine) as session:
        if "others" in how:
            queue.add_many(session, "t", [1], unique_key=lambda data: "k")
        else:
            queue.add(session, "t", unique_key="k")
        worker.start()
        until(lambda: probe.has_looked(worker))
        assert not started.wait(0.5)
        session.commit()

    assert started.wait(10)


def test_a_running_task_is_kept_without_a_lock(engine, queue, worker):
    with Session(engine) as caller:
        worker.use("t", lambda task: queue.add(caller, "t", unique_key="k"))
        add(engine, queue, unique_until="ended")
        worker.work()

        assert [task.state for task in stored(engine)] == ["completed"]


def test_the_key_of_a_task_that_is_claimed_meanwhile_is_taken(engine, queue):
    """The task was there for the INSERT, and isn't for the statement after it."""
    first = add(engine, queue)
    with engine.connect() as claiming, ThreadPoolExecutor() as pool:
        claiming.execute(sa.text("UPDATE apoq_tasks SET state = 'running', held_unique_key = NULL"))
        second = pool.submit(add, engine, queue)
        until(lambda: waits_for_a_lock(engine))
        claiming.commit()

        assert second.result().is_new
    assert holding(engine) != [first.id]


CALLERS = 200


@pytest.mark.parametrize("on_conflict", ["skip", "replace"])
def test_two_hundred_callers_of_one_key(url, queue, on_conflict):
    """Half of them roll back, some after a while; a worker's statements take and end the tasks."""
    engine = sa.create_engine(url, pool_size=20, max_overflow=0, pool_timeout=60)
    most: list[int] = []
    outcomes: list[str] = []
    over = threading.Event()

    def call(number: int) -> None:
        with Session(engine) as session:
            outcome = queue.add(session, "t", number, unique_key="k", on_conflict=on_conflict).add_outcome
            if number in {41, 82}:
                session.execute(sa.text("SELECT pg_sleep(2)"))
            if number % 2:
                session.commit()
                outcomes.append(outcome)

    def end() -> None:
        """Claim and complete as another worker does."""
        with engine.connect() as connection:
            while not over.is_set():
                most.append(len(connection.execute(HELD, {"key": "k"}).all()))
                connection.execute(
                    sa.text("""
                    UPDATE apoq_tasks SET state = 'completed', held_unique_key = NULL WHERE id = (
                        SELECT id FROM apoq_tasks WHERE state = 'pending' FOR UPDATE SKIP LOCKED LIMIT 1
                    )
                    """)
                )
                connection.commit()
                over.wait(0.1)

    with ThreadPoolExecutor(18) as pool:
        ending = pool.submit(end)
        try:
            for result in [pool.submit(call, number) for number in range(CALLERS)]:
                result.result()
        finally:
            over.set()
        ending.result()
    added = len(stored(engine))
    assert len(outcomes) == CALLERS / 2
    assert outcomes.count("added") == added
    assert 0 < added < CALLERS / 2
    assert max(most) == 1
    assert len(stored(engine, state="pending")) <= 1
    engine.dispose()


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("on_conflict", ["skip", "replace", "raise"])
def test_above_read_committed_a_caller_may_get_a_serialization_failure_and_nothing_else(
    engine, queue, level, on_conflict
):
    strict = engine.execution_options(isolation_level=level)
    failures = []

    def call(number: int) -> int:
        with Session(strict) as session:
            try:
                session.execute(sa.text("SELECT 1"))  # the snapshot
                before = queue.add(session, "before", number)
                task = queue.add(session, "t", number, unique_key="k", on_conflict=on_conflict)
                session.commit()
                assert before.id
            except DBAPIError as error:
                failures.append(error.orig.sqlstate)
            except DuplicateTask:
                session.commit()
                return 0
            else:
                return task.is_new
        return 0

    with ThreadPoolExecutor(8) as pool:
        added = sum(pool.map(call, range(40)))

    assert set(failures) <= {SERIALIZATION_FAILURE}
    assert added == 1
    assert len(stored(engine, type="t")) == 1
    assert len(stored(engine, type="before")) == 40 - len(failures)


def test_a_key_that_is_newer_than_the_snapshot_is_a_serialization_failure(engine, queue):
    with Session(engine.execution_options(isolation_level="REPEATABLE READ")) as session:
        session.execute(sa.text("SELECT count(*) FROM apoq_tasks"))
        add(engine, queue)
        with pytest.raises(DBAPIError) as caught:
            queue.add(session, "t", unique_key="k")

    assert caught.value.orig.sqlstate == SERIALIZATION_FAILURE


# Many


def test_add_many_adds_one_task_for_each_key(session, queue):
    queue.add(session, "t", {"n": "old"}, unique_key="3")

    added = queue.add_many(
        session, "t", [{"n": n % 5} for n in range(20)], unique_key=lambda data: str(data["n"])
    )

    assert added == 4
    found = session.scalars(sa.select(Task).order_by(Task.unique_key)).all()
    assert [(task.unique_key, task.data["n"]) for task in found] == [
        ("0", 0),
        ("1", 1),
        ("2", 2),
        ("3", "old"),
        ("4", 4),
    ]


def test_add_many_replaces_by_the_last_item_of_a_key(session, queue):
    queue.add(session, "t", "old", unique_key="1")

    added = queue.add_many(
        session,
        "u",
        [[1, "a"], [2, "b"], [1, "c"]],
        unique_key=lambda item: str(item[0]),
        on_conflict="replace",
        priority=3,
    )

    assert added == 1
    found = session.scalars(
        sa.select(Task).order_by(Task.unique_key).execution_options(populate_existing=True)
    )
    assert [(task.type, task.data, task.priority) for task in found] == [
        ("u", [1, "c"], 3),
        ("u", [2, "b"], 3),
    ]


def test_add_many_raises_for_a_key_that_is_held_or_given_twice(session, queue):
    first = queue.add(session, "t", unique_key="1")
    with pytest.raises(DuplicateTask, match=f"the task {first.id} has it"):
        queue.add_many(session, "t", [0, 1, 2], unique_key=str, on_conflict="raise")
    with pytest.raises(DuplicateTask, match="another item of this call has it"):
        queue.add_many(session, "t", [5, 5], unique_key=str, on_conflict="raise")


def test_items_without_a_key_are_all_added(session, queue):
    def key(item: int) -> str | None:
        return "k" if item < 3 else None

    assert queue.add_many(session, "t", iter(range(6)), unique_key=key) == 4
    assert queue.add_many(session, "t", range(6), unique_key=key) == 3
    assert queue.add(session, "t", 7, unique_key=key).is_new


def test_add_many_of_several_batches(session, queue):
    keys = [f"{n:05}" for n in range(2_500)]
    queue.add_many(session, "t", keys[::2], unique_key=str)

    assert queue.add_many(session, "t", reversed(keys), unique_key=str) == 1_250
    assert queue.add_many(session, "t", keys, unique_key=str, on_conflict="replace") == 0


@pytest.mark.parametrize("on_conflict", ["skip", "replace"])
def test_callers_of_add_many_do_not_deadlock(url, queue, on_conflict):
    engine = sa.create_engine(url, pool_size=8)
    keys = [str(n) for n in range(60)]

    def call(number: int) -> int:
        turned = keys[number:] + keys[:number]
        with Session(engine) as session:
            added = queue.add_many(
                session,
                "t",
                reversed(turned) if number % 2 else turned,
                unique_key=str,
                on_conflict=on_conflict,
            )
            if number % 3:
                session.commit()
                return added
        return 0

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(call, range(40))) == 60
    assert len(stored(engine)) == 60
    engine.dispose()


def test_bad_keys_of_items_are_named(session, queue):
    with pytest.raises(InvalidTask, match=r"the unique key of items\[1\] must be a string, got 2"):
        queue.add_many(session, "t", ["a", 2], unique_key=lambda item: item)


# Debounce


def test_debounce_lets_the_task_be_due_after_the_last_call_and_max_wait_after_the_first(session, queue):
    how = {"unique_key": "k", "debounce": 5, "max_wait": timedelta(seconds=12)}
    begin = datetime(2027, 1, 1, tzinfo=UTC)
    due = []
    for second in (0, 4, 8, 11):
        with freeze(session, begin + timedelta(seconds=second)):
            task = queue.add(session, "t", second, **how)
            due.append((task.process_at - begin).total_seconds())

    assert due == [5, 9, 12, 12]
    assert task.data == 11
    assert session.scalar(sa.select(sa.func.count()).select_from(Task)) == 1


def test_debounce_without_max_wait_has_no_end(session, queue):
    begin = datetime(2027, 1, 1, tzinfo=UTC)
    for second in range(0, 100, 4):
        with freeze(session, begin + timedelta(seconds=second)):
            task = queue.add(session, "t", unique_key="k", debounce=5)

    assert task.process_at == begin + timedelta(seconds=96 + 5)


# Typed tasks

typed = Queue("typed")


@typed.task(unique=True)
def reindex(doc_id: int, *, on: date = date(2026, 1, 1), tags: list[str] | None = None) -> None: ...


def year_of(doc_id: int, on: date, **_: object) -> str:
    return f"{doc_id} in {on:%Y}"


@typed.task(unique=year_of, unique_until="ended", on_conflict="replace")
def import_file(doc_id: int, *, on: date = date(2026, 1, 1)) -> None: ...


def test_a_unique_typed_task_has_a_key_of_its_type_and_arguments(session):
    first = reindex.add(session, 7)

    assert first.unique_key == reindex.type + ':{"doc_id":7}'
    assert not reindex.add(session, doc_id=7, on=date(2026, 1, 1)).is_new
    assert reindex.add(session, 8).is_new
    assert reindex.add(session, 7, on=date(2027, 1, 1)).is_new
    assert reindex.add_many(session, [reindex.call(n) for n in (6, 7, 8, 6)]) == 1


def test_a_long_key_is_shortened(session):
    tags = [["a" * 300], ["a" * 301]]
    first, second = (reindex.add(session, 7, tags=tag) for tag in tags)

    assert first.unique_key != second.unique_key
    assert len(first.unique_key) == 255
    assert not reindex.add(session, 7, tags=tags[0]).is_new


def test_the_key_of_a_typed_task_can_be_a_function_of_the_arguments(session):
    first = import_file.add(session, 7, on=date(2026, 3, 3))

    assert first.unique_key == f"{import_file.type}:7 in 2026"
    assert first.unique_until_end
    assert import_file.add(session, 7).add_outcome == "replaced"


def test_using_can_replace_the_key(session):
    assert reindex.using(unique_key="k").add(session, 1).unique_key == "k"
    plain = import_file.using(unique_key=None).add(session, 1)
    assert (plain.unique_key, plain.unique_until_end) == (None, None)
    assert import_file.using(debounce=5).add(session, 1).unique_until_end
    with pytest.raises(InvalidTask, match="on_conflict must be 'skip'"):
        reindex.using(on_conflict="never")
    with pytest.raises(InvalidTask, match="debounce and delay"):
        reindex.using(debounce=5, delay=3)


def test_bad_rules_of_typed_tasks_are_refused():
    queue = Queue("refused")
    with pytest.raises(InvalidProcessor, match=r"unique must be True, or a function .* got 'k'"):
        queue.task(type="t", unique="k")(lambda: None)
    with pytest.raises(InvalidProcessor, match="unique_until must be given with unique=True"):
        queue.task(type="t", unique_until="ended")(lambda: None)
    with pytest.raises(InvalidProcessor, match="on_conflict must be"):
        queue.task(type="t", unique=True, on_conflict="no")(lambda: None)


# In tests


def test_drain_gives_keys_up_and_takes_them_again(session, queue, make_worker):
    worker = make_worker()
    seen = []

    def process(task) -> None:
        seen.append(task.attempt)
        if task.attempt == 1:
            raise Retry(timedelta(hours=1))

    worker.use("t", process)
    first = queue.add(session, "t", unique_key="k")
    drain(session, worker)
    assert assert_enqueued(session, "t").held_unique_key == "k"
    assert not queue.add(session, "t", unique_key="k").is_new
    with travel(session, timedelta(hours=2)):
        drain(session, worker)

    assert seen == [1, 2]
    assert not enqueued(session)
    assert queue.add(session, "t", unique_key="k").id != first.id
