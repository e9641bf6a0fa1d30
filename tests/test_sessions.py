"""The completion that is written in the transaction of `task.session`."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, RunningTask, Task, Worker
from apoq.schema.statements.settle import complete_last, remove_last

until = patience(10)


def add(engine, data=None) -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, "t", data).id


def ledger(engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT task_id FROM ledger")))


def write(task: RunningTask) -> None:
    task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})


async def write_async(task) -> None:
    await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})


@pytest.mark.parametrize("processor", [write, write_async])
@pytest.mark.parametrize("keep", [timedelta(), timedelta(days=1)])
@pytest.mark.parametrize("heard", [True, False])
def test_it_is_written_whether_or_not_it_is_kept_and_heard(engine, make_worker, processor, keep, heard):
    worker = make_worker(keep_completed=keep)
    told = []
    if heard:
        worker.events.on("task.completed", told.append)
    worker.use("t", processor)
    task_id = add(engine, {"n": 1})

    worker.work()

    with Session(engine) as session:
        left = [(task.id, task.state) for task in session.scalars(sa.select(Task))]
    assert left == ([(task_id, "completed")] if keep else [])
    assert ledger(engine) == [task_id]
    assert [(task.id, task.state, task.data, task.claim_token) for task in told] == (
        [(task_id, "completed", {"n": 1}, 1)] if heard else []
    )


@pytest.mark.parametrize(
    "change", [{"claim_token": Task.claim_token + 1}, {"state": "pending"}, {"state": "cancelled"}]
)
@pytest.mark.parametrize("keep", [timedelta(), timedelta(days=1)])
@pytest.mark.parametrize("heard", [True, False])
def test_a_lost_task_is_left_as_it_is(engine, make_worker, change, keep, heard):
    def process(task: RunningTask) -> None:
        write(task)
        with engine.begin() as connection:
            connection.execute(sa.update(Task).values(**change))

    worker = make_worker(keep_completed=keep)
    told = []
    if heard:
        worker.events.on("task.completed", told.append)
    worker.use("t", process)
    task_id = add(engine)

    worker.work()

    with Session(engine) as session:
        task = session.get(Task, task_id)
    assert (task.state, task.completed_at, task.fail_count) == (change.get("state", "running"), None, 0)
    assert (ledger(engine), told) == ([], [])


@pytest.mark.parametrize("keep", [timedelta(), timedelta(days=1)])
def test_it_says_when_the_task_ended_and_not_when_the_transaction_began(engine, make_worker, keep):
    ends, told = [], []

    def process(task: RunningTask) -> None:
        write(task)
        ends.append(task.session.scalar(sa.select(sa.func.clock_timestamp())))

    worker = make_worker(keep_completed=keep)
    worker.events.on("task.completed", told.append)
    worker.use("t", process)
    add(engine)

    worker.work()

    assert told[0].completed_at > ends[0]


@pytest.mark.parametrize("heard", [True, False])
def test_until_the_commit_a_frozen_worker_keeps_the_row_locked_for_seconds_only(engine, worker, heard):
    shown = []

    @sa.event.listens_for(engine, "commit")
    def committing(connection) -> None:
        shown.append(connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout").scalar())

    if heard:
        worker.events.on("task.completed", lambda task: None)
    worker.use("t", write)
    add(engine)
    shown.clear()

    worker.work()

    assert shown == ["5s"]
    sa.event.remove(engine, "commit", committing)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout").scalar() == "0"


def test_a_serialization_failure_uses_up_no_attempt(url, engine):
    strict = sa.create_engine(url, isolation_level="SERIALIZABLE")
    tokens: list[int] = []

    def process(task: RunningTask) -> None:
        write(task)
        tokens.append(task.claim_token)
        if len(tokens) == 1:
            with engine.begin() as connection:
                # A newer version of the row than this transaction may see.
                connection.execute(sa.update(Task).values(priority=1))

    worker = Worker(strict)
    worker.use("t", process, retry_delay=lambda fail_count: 0)
    task_id = add(engine)

    released = worker.work()
    assert (released.state, released.attempt, released.fail_count, released.error) == ("pending", 0, 0, None)
    assert ledger(engine) == []

    until(lambda: worker.work() is not None)
    assert ledger(engine) == [task_id]
    assert tokens == [1, 2]
    strict.dispose()


@pytest.mark.parametrize("statement", [complete_last, remove_last])
def test_its_plan_is_made_once_and_goes_by_the_primary_key(engine, statement):
    sql = str(statement(None).compile(dialect=engine.dialect))
    sql = sql.replace("%(task_id)s", "$1").replace("%(held_under)s", "$2")

    with engine.connect() as connection:
        connection.exec_driver_sql(f"PREPARE completion (bigint, bigint) AS {sql}")
        for _ in range(6):  # after five plans for their values, the server makes one for all
            plan = connection.exec_driver_sql("EXPLAIN EXECUTE completion (1, 1)").scalars().all()

    assert any("Index Scan using apoq_tasks_pkey" in line for line in plan)
    assert any("(id = $1)" in line for line in plan)
