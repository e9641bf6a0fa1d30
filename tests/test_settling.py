"""How what has ended is written, many at once: a batch survives its worst member."""

from __future__ import annotations

import threading
from collections import deque

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import Queue, RunningTask, Task

SOON = 30.0


def add(engine, type_: str) -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, type_).id


def load(engine) -> dict[str, Task]:
    with Session(engine) as session:
        return {task.type: task for task in session.scalars(sa.select(Task))}


def until(condition) -> None:
    pause = threading.Event()
    for _ in range(int(SOON / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it hasn't come to pass")


@pytest.fixture
def batch(engine, make_worker, monkeypatch):
    """A worker with tasks that run, and will be settled in one batch when they are let go."""
    begun, go_on = threading.Semaphore(0), threading.Event()

    def process(task: RunningTask) -> None:
        begun.release()
        go_on.wait(SOON)
        if task.type.startswith("fails"):
            raise ValueError(task.type)

    def start(*types: str):
        worker = make_worker(concurrency=len(types))
        for type_ in types:
            worker.use(type_, process, retry_limit=0)
            add(engine, type_)
        worker.start()
        for _ in types:
            assert begun.acquire(timeout=SOON)
        worker._settling.stop()

        def end():
            go_on.set()
            until(lambda: worker._slots.load == 0)
            return worker._settler

        return end

    yield start
    go_on.set()


def test_a_completion_that_the_database_refuses_does_not_keep_the_others_from_being_written(
    engine, batch, caplog
):
    end = batch("good", "bad", "another")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE apoq_tasks ADD CONSTRAINT refused CHECK (type <> 'bad' OR state <> 'completed')"
        )

    end().turn()

    assert {type_: task.state for type_, task in load(engine).items()} == {
        "good": "completed",
        "bad": "running",
        "another": "completed",
    }
    assert "what became of a task could not be written" in caplog.text


def test_an_error_that_the_database_refuses_is_left_out_and_the_task_has_ended(engine, batch):
    end = batch("fails", "fails.badly", "good")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE apoq_tasks ADD CONSTRAINT refused CHECK (error->>'message' <> 'fails.badly')"
        )

    end().turn()

    tasks = load(engine)
    assert [tasks[type_].state for type_ in ("fails", "fails.badly", "good")] == [
        "failed",
        "failed",
        "completed",
    ]
    assert tasks["fails"].error["message"] == "fails"
    assert tasks["fails.badly"].error == {"class": "ValueError", "message": "", "traceback": ""}


def test_rows_are_locked_in_the_order_of_their_ids(engine, batch):
    """Two that lock the same rows in one order wait for each other, and never both."""
    settler = batch("a", "b", "c")()
    rows = sorted(settler._completed, reverse=True)
    settler._completed = deque(rows)
    looking = engine.execution_options(isolation_level="AUTOCOMMIT")
    look = sa.text(
        "SELECT (SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'), "
        "array(SELECT id FROM apoq_tasks ORDER BY id FOR UPDATE SKIP LOCKED)"
    )
    first, *others = sorted(row[0] for row in rows)
    free: list[list[int]] = []

    with engine.connect() as connection:
        connection.execute(sa.select(Task.id).where(Task.id == first).with_for_update())
        thread = threading.Thread(target=settler.turn)
        thread.start()
        with looking.connect() as observer:
            while thread.is_alive():
                is_waiting, lockable = observer.execute(look).one()
                if is_waiting:
                    free.append(lockable)
        connection.rollback()
    thread.join()

    # While it waits for the first, it holds none of the others.
    assert free
    assert all(lockable == others for lockable in free)
    settler.flush(SOON)
    assert {task.state for task in load(engine).values()} == {"completed"}
