"""Each task runs in a context of its own."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import AsyncRunningTask, RunningTask, Worker

SOON = 30.0

until = patience(SOON)

VARIABLE: ContextVar[str] = ContextVar("variable", default="unset")


def plain(found: list[str]):
    def process(task: RunningTask) -> None:
        found.append(VARIABLE.get())
        VARIABLE.set(f"task {task.data}")
        found.append(VARIABLE.get())

    return process


def coroutine(found: list[str]):
    async def process(task: AsyncRunningTask) -> None:
        found.append(VARIABLE.get())
        VARIABLE.set(f"task {task.data}")
        await asyncio.sleep(0)
        child = asyncio.create_task(asyncio.to_thread(VARIABLE.get))
        assert await child == VARIABLE.get()
        found.append(VARIABLE.get())

    return process


@pytest.mark.parametrize("kind", [plain, coroutine])
@pytest.mark.parametrize("slots", [1, 3])
def test_what_a_task_sets_is_its_own(engine, queue, make_worker, kind, slots):
    found: list[str] = []
    worker = make_worker(concurrency=slots)
    worker.use("t", kind(found))
    with Session(engine) as session, session.begin():
        queue.add_many(session, "t", range(9))
    worker.start()

    until(lambda: len(found) == 18)

    assert sorted(found) == sorted(["unset"] * 9 + [f"task {number}" for number in range(9)])


@pytest.mark.parametrize("kind", [plain, coroutine])
def test_a_task_on_the_callers_thread_finds_what_the_caller_has_set_and_leaves_it(
    engine, queue, make_worker, kind
):
    found: list[str] = []
    worker: Worker = make_worker()
    worker.use("t", kind(found))
    with Session(engine) as session, session.begin():
        queue.add(session, "t", 1)
    token = VARIABLE.set("the caller's")

    worker.work()

    assert found == ["the caller's", "task 1"]
    assert VARIABLE.get() == "the caller's"
    VARIABLE.reset(token)


def test_a_session_that_is_awaited_keeps_to_it(engine, queue, make_worker):
    """SQLAlchemy's greenlets take the context of whoever awaits them."""
    found: list[tuple[str, int, str]] = []
    worker: Worker = make_worker(concurrency=1)

    async def process(task: AsyncRunningTask) -> None:
        before = VARIABLE.get()
        VARIABLE.set(f"task {task.data}")
        found.append((before, await task.session.scalar(sa.text("SELECT 1")), VARIABLE.get()))

    worker.use("t", process)
    with Session(engine) as session, session.begin():
        queue.add_many(session, "t", range(2))
    worker.start()

    until(lambda: len(found) == 2)

    assert found == [("unset", 1, "task 0"), ("unset", 1, "task 1")]


def test_a_cancelled_task_cleans_up_in_it(engine, queue, make_worker):
    found: list[str] = []
    begun = threading.Event()
    worker: Worker = make_worker()

    async def process(_task: AsyncRunningTask) -> None:
        VARIABLE.set("its own")
        begun.set()
        try:
            await asyncio.sleep(SOON)
        finally:
            found.append(VARIABLE.get())

    worker.use("t", process)
    with Session(engine) as session, session.begin():
        queue.add(session, "t")
    worker.start()
    begun.wait(SOON)

    worker.stop(timeout=0)

    assert found == ["its own"]
