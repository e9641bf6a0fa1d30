"""The middleware in which each processor is called."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import AsyncRunningTask, Queue, RunningTask, Task, Worker


def add(engine) -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, "t").id


def test_a_plain_processor_is_called_within_it(engine, make_worker):
    said: list[str] = []

    @contextmanager
    def middleware(task: RunningTask) -> Iterator[None]:
        said.append(f"enter {task.type}")
        yield
        said.append("exit")

    worker: Worker = make_worker(middleware=middleware)
    worker.use("t", lambda task: said.append("run"))
    add(engine)

    worker.work()

    assert said == ["enter t", "run", "exit"]


def test_a_coroutine_ends_within_it(engine, make_worker):
    said: list[str] = []

    @contextmanager
    def middleware(_task: AsyncRunningTask) -> Iterator[None]:
        said.append("enter")
        yield
        said.append("exit")

    async def process(_task: AsyncRunningTask) -> None:
        await asyncio.sleep(0)
        said.append("run")

    worker: Worker = make_worker(middleware=middleware)
    worker.use("t", process)
    add(engine)

    worker.work()

    assert said == ["enter", "run", "exit"]


@pytest.mark.parametrize("where", ["enter", "exit"])
def test_what_it_raises_fails_the_attempt(engine, make_worker, where):
    @contextmanager
    def middleware(_task: RunningTask) -> Iterator[None]:
        if where == "enter":
            raise ValueError("no context")
        yield
        raise ValueError("no context")

    worker: Worker = make_worker(middleware=middleware)
    worker.use("t", lambda task: task.session.execute(sa.text("CREATE TABLE made ()")))
    task_id = add(engine)

    worker.work()

    with Session(engine) as session:
        task = session.get_one(Task, task_id)
        assert (task.state, task.fail_count) == ("pending", 1)
        assert task.error is not None
        assert task.error["message"] == "no context"
        assert not sa.inspect(session.connection()).has_table("made")


def test_of_several_the_first_is_the_outermost(engine, make_worker):
    said: list[str] = []

    def named(name: str):
        @contextmanager
        def middleware(_task: RunningTask) -> Iterator[None]:
            said.append(f"enter {name}")
            yield
            said.append(f"exit {name}")

        return middleware

    worker: Worker = make_worker(middleware=[named("outer"), named("inner")])
    worker.use("t", lambda task: said.append("run"))
    add(engine)

    worker.work()

    assert said == ["enter outer", "enter inner", "run", "exit inner", "exit outer"]


@pytest.mark.parametrize("middleware", ["flask", [None], [contextmanager, 3]])
def test_what_is_no_function_is_refused(engine, middleware):
    with pytest.raises(TypeError, match="middleware must be a function"):
        Worker(engine, middleware=middleware)
