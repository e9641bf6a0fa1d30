"""A caller waits for the end of a task, from outside of transactions and processors."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq import AsyncRunningTask, Fail, Queue, RunningTask, TaskGone, WaitTimeout
from apoq.testing import drain

until = patience(30.0)
SOON = 30.0

Wait = Callable[..., Any]


def add(engine, queue: Queue, type_: str = "t") -> int:
    with Session(engine) as session, session.begin():
        return queue.add(session, type_).id


@pytest.fixture(params=["Engine", "AsyncEngine"])
def wait(request, engine, queue) -> Wait:
    """Wait through an engine of either kind."""

    async def awaited(task: Any, seconds: Any) -> Any:
        own = create_async_engine(engine.url)
        try:
            return await queue.wait(own, task, timeout=seconds)
        finally:
            await own.dispose()

    def wait(task: Any, *, timeout: Any = SOON) -> Any:
        if request.param == "Engine":
            return queue.wait(engine, task, timeout=timeout)
        return asyncio.run(awaited(task, timeout))

    return wait


def in_background(call: Callable[[], Any]) -> Callable[[], Any]:
    """Call this on a thread; return a function that returns its result."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def ended() -> Any:
        thread.join(SOON)
        return found[0]

    return ended


class TestWaiting:
    def test_returns_the_result_when_the_task_has_completed(self, engine, queue, worker, wait):
        go = threading.Event()
        worker.use("t", lambda task: go.wait(SOON) and {"a": 1}, keep_result=True)
        task_id = add(engine, queue)
        ended = in_background(lambda: wait(task_id))
        worker.start()
        go.set()

        assert ended().value == {"a": 1}

    def test_returns_when_the_task_has_failed(self, engine, queue, worker, wait):
        worker.use("t", lambda task: 1 / 0, retry_limit=0)
        task_id = add(engine, queue)
        worker.work()

        found = wait(task_id)

        assert (found.state, found.error["class"]) == ("failed", "ZeroDivisionError")

    def test_times_out_with_the_state(self, engine, queue, wait):
        task_id = add(engine, queue)

        with pytest.raises(TimeoutError, match=f"the task {task_id} is still pending after 0.01 s") as caught:
            wait(task_id, timeout=timedelta(milliseconds=10))
        assert isinstance(caught.value, WaitTimeout)
        assert (caught.value.task_id, caught.value.state) == (task_id, "pending")

    def test_raises_at_once_if_there_is_no_such_task(self, wait):
        with pytest.raises(TaskGone, match=r"the task 99 is not in Queue\('default'\)") as caught:
            wait(99)
        assert caught.value.task_id == 99

    def test_counts_a_task_that_disappears_meanwhile_as_completed(self, engine, queue, make_worker, wait):
        worker = make_worker(queue, keep_completed=0)
        worker.use("t", lambda task: None)
        task_id = add(engine, queue)
        looked = threading.Event()

        def look(*_: object) -> None:
            looked.set()

        sa.event.listen(sa.Engine, "after_cursor_execute", look)
        try:
            ended = in_background(lambda: wait(task_id))
            assert looked.wait(SOON)
        finally:
            sa.event.remove(sa.Engine, "after_cursor_execute", look)
        worker.work()

        assert ended().state == "completed"

    def test_holds_no_connection_between_two_looks(self, engine, queue, worker):
        task_id = add(engine, queue)
        small = sa.create_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=SOON)
        ended = in_background(lambda: queue.wait(small, task_id, timeout=SOON))

        with small.begin() as connection:
            connection.execute(sa.text("UPDATE apoq_tasks SET state = 'cancelled'"))

        assert ended().state == "cancelled"
        small.dispose()

    def test_is_not_disturbed_by_the_isolation_level_of_the_engine(self, engine, queue):
        strict = engine.execution_options(isolation_level="REPEATABLE READ")
        task_id = add(engine, queue)
        ended = in_background(lambda: queue.wait(strict, task_id, timeout=SOON))
        with engine.begin() as connection:
            connection.execute(sa.text("UPDATE apoq_tasks SET state = 'cancelled'"))

        assert ended().state == "cancelled"

    @pytest.mark.parametrize(
        ("timeout", "error", "message"),
        [
            (math.nan, ValueError, "timeout must be positive and finite, got nan"),
            pytest.param(10**400, ValueError, "positive and finite, got 10000", id="400 digits"),
            (math.inf, ValueError, "got inf"),
            (0, ValueError, "got 0"),
            (-1, ValueError, "got -1"),
            (timedelta(), ValueError, "got datetime.timedelta"),
            (None, TypeError, "timeout must be a number of seconds or a timedelta, got None"),
            (True, TypeError, "got True"),
        ],
    )
    def test_refuses_a_timeout_that_never_ends(self, wait, timeout, error, message):
        with pytest.raises(error, match=message):
            wait(1, timeout=timeout)

    def test_needs_a_timeout(self, engine, queue):
        with pytest.raises(TypeError, match="timeout"):
            queue.wait(engine, 1)

    def test_refuses_a_session_and_says_why(self, engine, queue):
        with Session(engine) as session, engine.connect() as connection:
            for given in (session, connection, AsyncSession(create_async_engine(engine.url))):
                with pytest.raises(TypeError, match=r"must be given an Engine .* would hold its connection"):
                    queue.wait(given, 1, timeout=1)
        with pytest.raises(TypeError, match="must be given an Engine or an AsyncEngine, got 7"):
            queue.wait(7, 1, timeout=1)


class TestWaitingInAProcessor:
    """A slot would wait for a task that may need this very slot."""

    @pytest.fixture
    def message(self, engine, queue, worker) -> Callable[[Callable[[Any], Any]], str]:
        """Let a worker run a processor; return the error of its attempt."""

        def message(processor: Callable[[Any], Any]) -> str:
            worker.use("t", processor, retry_limit=0)
            add(engine, queue)
            worker.start()
            with engine.connect() as connection:
                error = sa.text("SELECT error->>'message' FROM apoq_tasks")
                until(lambda: connection.scalar(error) or connection.rollback())
                found: str = connection.scalar(error)
                return found

        return message

    def test_is_refused_on_a_thread(self, engine, queue, message):
        # Also for another queue, another schema and another database.
        other = Queue("other", schema="elsewhere")

        assert "wait must not be called by a processor: it would hold a slot" in message(
            lambda task: other.wait(engine, 1, timeout=1)
        )

    def test_is_refused_in_a_coroutine_in_its_tasks_and_in_its_threads(self, engine, queue, message):
        async def processor(task: AsyncRunningTask) -> None:
            own: AsyncEngine = create_async_engine(engine.url)
            errors = []
            for call in (
                lambda: queue.wait(own, 1, timeout=1),
                lambda: asyncio.create_task(start(own)),
                lambda: asyncio.to_thread(queue.wait, engine, 1, timeout=1),
            ):
                try:
                    await call()
                except RuntimeError as error:
                    errors.append(error)
            raise Fail(f"{len(errors)} {errors[0]}")

        async def start(own: AsyncEngine) -> None:
            await queue.wait(own, 1, timeout=1)

        assert message(processor).startswith("3 wait must not be called by a processor")

    def test_is_refused_in_drain_and_allowed_after_it(self, session, engine, queue):
        @queue.task
        def waits(task: RunningTask) -> None:
            queue.wait(engine, task.id, timeout=1)

        waits.add(session)

        with pytest.raises(RuntimeError, match=r"queue\.result and raise Snooze"):
            drain(session, queue)
        with pytest.raises(TaskGone):
            queue.wait(engine, 1, timeout=1)


class TestATypedTask:
    def test_converts_what_it_has_waited_for(self, engine, queue, make_worker):
        @queue.task(keep_result=True)
        def double(number: int) -> tuple[int, int]:
            return number, number

        worker = make_worker(queue)
        with Session(engine) as session, session.begin():
            task_id = double.add(session, 3).id
        worker.start()

        assert double.wait(engine, task_id, timeout=SOON).value == (3, 3)
