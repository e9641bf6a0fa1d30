"""What a processor returns is kept with its task, and read by its caller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from operator import itemgetter
from typing import Any
from uuid import UUID

import probe
import psycopg
import pytest
import sqlalchemy as sa
from claims import hold_lease
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from waiting import patience

from apoq import (
    AsyncRunningTask,
    Cancel,
    Fail,
    InvalidProcessor,
    InvalidTask,
    NoResult,
    Progress,
    Queue,
    Result,
    RunningTask,
    Task,
    Worker,
)
from apoq.schema.statements.claim import ID
from apoq.testing import drain
from apoq.worker.execution.runner import ended

until = patience(30.0)
KIB = 1024


@dataclass
class Order:
    id: int
    at: datetime


def add(engine, queue: Queue, type_: str = "t", data: Any = None) -> int:
    with Session(engine) as session, session.begin():
        return queue.add(session, type_, data).id


def result(engine, queue: Queue, task_id: int) -> Result[Any]:
    with Session(engine) as session:
        found = queue.result(session, task_id)
        assert found is not None
        return found


def in_session(task: RunningTask) -> int:
    task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
    return 5


async def awaited_in_session(task: AsyncRunningTask) -> int:
    await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
    return 5


async def awaited(task: AsyncRunningTask) -> list[int]:
    return [task.id]


def ledger(engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.text("SELECT count(*) FROM ledger"))


class TestAResult:
    @pytest.mark.parametrize(
        ("processor", "value"),
        [
            (lambda task: {"rows": [1, 2.5, None, "é€💖"]}, {"rows": [1, 2.5, None, "é€💖"]}),
            (lambda task: None, None),
            (in_session, 5),
            (awaited_in_session, 5),
            (awaited, [1]),
        ],
        ids=["JSON", "None", "with task.session", "a coroutine's with task.session", "a coroutine's"],
    )
    def test_is_what_the_processor_has_returned(self, engine, queue, worker, processor, value):
        worker.use("t", processor, keep_result=True)
        task_id = add(engine, queue)

        worker.work()

        assert result(engine, queue, task_id).value == value

    def test_is_written_for_each_of_a_batch_and_not_for_tasks_that_keep_none(self, engine, queue, worker):
        worker.use("kept", lambda task: task.data, keep_result=True)
        worker.use("t", lambda task: task.data)
        with Session(engine) as session, session.begin():
            for number in range(200):
                queue.add(session, "kept" if number % 2 else "t", number)
        open_tasks = sa.select(sa.func.count()).where(Task.state != "completed")
        worker.start()

        with engine.connect() as connection:
            until(lambda: connection.scalar(open_tasks) == 0 or connection.rollback())
            rows = connection.execute(sa.select(Task.type, Task.data, Task.result)).all()
        assert sorted(row[1:] for row in rows if row.type == "kept") == [(n, n) for n in range(1, 200, 2)]
        assert {row.result for row in rows if row.type == "t"} == {None}

    def test_is_in_the_row_that_listeners_get(self, engine, queue, worker):
        told = []
        worker.events.on("task.completed", lambda task: told.append(task.result))
        worker.use("t", lambda task: [1], keep_result=True)
        add(engine, queue)

        worker.work()

        assert told == [[1]]

    def test_is_gone_when_the_task_runs_again_and_the_last_attempt_wins(self, engine, queue, worker):
        returned = iter(("first", "second"))
        worker.use("t", lambda task: next(returned), keep_result=True)
        task_id = add(engine, queue)
        worker.work()
        with Session(engine) as session, session.begin():
            task = session.get(Task, task_id)
            assert queue.retry(session, task_id)
            assert task.result is None
        between = result(engine, queue, task_id)
        worker.work()

        assert (between.state, between.has_ended) == ("pending", False)
        with pytest.raises(NoResult, match=f"the task {task_id} has no result: it is pending"):
            between.value  # noqa: B018
        assert result(engine, queue, task_id).value == "second"

    def test_is_not_written_by_a_worker_that_has_lost_the_task(self, engine, queue, worker):
        def lose(task: RunningTask) -> str:
            with engine.begin() as connection:
                connection.execute(sa.update(Task).values(claim_token=Task.claim_token + 1))
            return "stale"

        worker.use("t", lose, keep_result=True)
        add(engine, queue)

        assert worker.work().result is None


@pytest.fixture
def end(engine, queue, worker) -> Iterator[Callable[..., Worker]]:
    """Let tasks end with these results, all in one batch, which is not written yet."""

    def end(*results: str) -> Worker:
        worker.use("t", lambda task: None, keep_result=True, retry_limit=0)
        with Session(engine) as session, session.begin():
            queue.add_many(session, "t", range(len(results)))
        hold_lease(worker)
        rows = sorted(probe.claim(worker, len(results), len(results)), key=itemgetter(ID))
        for row, its in zip(rows, results, strict=True):
            probe.put_ended(worker, ended(probe.make_attempt(worker, row), None, result=its))
        return worker

    yield end
    probe.own_engine(worker).dispose()


class TestABatch:
    @pytest.mark.parametrize("is_sharded", [False, True])
    def test_of_which_one_is_locked_is_written_but_for_that_one(self, engine, queue, end, is_sharded):
        worker = end('"first"', '"second"')
        if is_sharded:
            probe.shard(worker)
        with engine.connect() as caller:
            locked = caller.scalar(sa.select(sa.func.min(Task.id)))
            caller.execute(sa.select(Task.id).where(Task.id == locked).with_for_update())
            probe.settler(worker).turn()

            assert result(engine, queue, locked).state == "running"
            assert result(engine, queue, locked + 1).value == "second"
        probe.settler(worker).flush(30)

        assert result(engine, queue, locked).value == "first"

    def test_of_which_one_can_not_be_stored_fails_that_one_and_settles_it(self, engine, queue, end):
        """As in a database of another encoding, or if there is a trigger."""
        worker = end('"first"', '"\\ud800"', '"third"')

        probe.settler(worker).flush(30)

        with engine.connect() as connection:
            ids = connection.scalars(sa.select(Task.id).order_by(Task.id)).all()
        found = [result(engine, queue, task_id) for task_id in ids]
        assert [each.state for each in found] == ["completed", "failed", "completed"]
        assert [found[0].value, found[2].value] == ["first", "third"]
        assert found[1].error["class"] == "InvalidData"
        assert not probe.claim_log(worker).held()


UNSTORABLE = {
    "NaN": (lambda: float("nan"), "result: JSON has no nan"),
    "NUL": (lambda: {"a": "\0"}, r"result\['a'\]: jsonb can't hold U\+0000"),
    "a lone surrogate": (lambda: ["\ud800"], r"result\[0\]: jsonb can't hold a lone surrogate"),
    "an object": (object, "result: object is not JSON"),
    "large": (lambda: "x" * (64 * KIB - 1), "65,537 bytes of JSON exceed max_result_size, 65,536: write"),
    "large in bytes": (lambda: "é" * (32 * KIB), "65,538 bytes of JSON exceed"),
    "deep": (lambda: deep(300), "nested more than 200 levels"),
}


def deep(levels: int) -> list[Any]:
    return [deep(levels - 1)] if levels else []


class TestAResultThatCanNotBeStored:
    @pytest.mark.parametrize("processor", ["plain", "session", "coroutine"])
    @pytest.mark.parametrize(("make", "message"), UNSTORABLE.values(), ids=UNSTORABLE)
    def test_fails_the_attempt_before_anything_is_written(
        self, engine, queue, worker, make, message, processor
    ):
        async def coroutine(task: AsyncRunningTask) -> Any:
            await awaited_in_session(task)
            return make()

        processors = {
            "plain": lambda task: make(),
            "session": lambda task: (in_session(task), make())[1],
            "coroutine": coroutine,
        }
        worker.use("t", processors[processor], keep_result=True, retry_limit=0)
        task_id = add(engine, queue)

        worker.work()

        found = result(engine, queue, task_id)
        assert (found.state, found.error["class"]) == ("failed", "InvalidData")
        with pytest.raises(NoResult, match=f"it has failed, with InvalidData: .*{message}"):
            found.value  # noqa: B018
        assert ledger(engine) == 0

    def test_may_be_as_large_as_the_processor_says(self, engine, queue, worker):
        worker.use("t", lambda task: "x" * (KIB * KIB - 2), keep_result=True, max_result_size=KIB * KIB)
        task_id = add(engine, queue)

        worker.work()

        assert len(result(engine, queue, task_id).value) == KIB * KIB - 2


class TestAProcessor:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"keep_result": 1}, "keep_result must be True or False, got 1"),
            ({"max_result_size": 5}, "max_result_size must be given together with keep_result=True"),
            ({"keep_result": True, "max_result_size": KIB * KIB + 1}, "from 1 to 1048576, got 1048577"),
            ({"keep_result": True, "max_result_size": "5"}, "must be a whole number"),
        ],
    )
    def test_must_have_valid_options(self, queue, worker, options, message):
        with pytest.raises(InvalidProcessor, match=message):
            worker.use("t", print, **options)
        with pytest.raises(InvalidProcessor, match=message):
            queue.task(**options)(print_it)

    def test_keeps_no_results_if_its_worker_keeps_no_tasks(self, engine, queue):
        worker = Worker(engine, queue, keep_completed=0)
        message = "'t' has keep_result=True, but its worker has keep_completed=0"

        with pytest.raises(InvalidProcessor, match=message):
            worker.use("t", print, keep_result=True)
        with pytest.raises(InvalidProcessor, match=message):
            queue.task(type="t", keep_result=True)(print_it)
        assert "t" not in queue.tasks

        del worker
        other = Queue("other")
        other.task(type="t", keep_result=True)(print_it)
        with pytest.raises(InvalidProcessor, match=message):
            Worker(engine, other, keep_completed=timedelta())

    def test_must_not_have_a_return_annotation_that_json_can_not_hold(self, queue):
        def call() -> Callable[[], int]: ...

        with pytest.raises(InvalidProcessor, match=r"the return annotation of 't'.* can't be sent as JSON"):
            queue.task(type="t", keep_result=True)(call)
        queue.task(type="t")(call)


def print_it() -> None: ...


class TestATypedTask:
    @pytest.mark.parametrize(
        ("annotation", "value"),
        [
            (Order, Order(7, datetime(2031, 5, 4, tzinfo=UTC))),
            (list[Decimal], [Decimal("1.10")]),
            (dict[UUID, date], {UUID(int=1): date(2031, 5, 4)}),
            (tuple[int, str] | None, (1, "a")),
            (bytes, b"\0\xff"),
            (Any, {"a": [1]}),
        ],
        ids=str,
    )
    def test_returns_its_result_as_the_function_did(self, session, queue, annotation, value):
        def get():
            return value

        get.__annotations__["return"] = annotation
        task = queue.task(keep_result=True)(get)
        added = task.add(session)

        drain(session, queue)

        assert task.result(session, added).value == value

    def test_fails_if_the_result_would_come_back_changed(self, session, queue):
        @queue.task(keep_result=True)
        def get() -> int:
            return "5"

        @queue.task(keep_result=True)
        async def get_later():
            return {1, 2}

        first, second = get.add(session), get_later.add(session)
        drain(session, queue, errors="record")

        assert first.error["message"] == f"result: Expected `int`, got `str`, returned by {get.type!r}"
        assert second.error["message"].startswith("result: set is not JSON, and is converted only if")

    def test_says_so_if_the_stored_result_does_not_fit_any_more(self, session, queue):
        @queue.task(type="t", keep_result=True)
        def get() -> str:
            return "a"

        added = get.add(session)
        drain(session, queue)
        get.function.__annotations__["return"] = "int"
        changed = Queue("other").task(type="t")(get.function)
        changed.queue = queue

        found = changed.result(session, added)

        with pytest.raises(NoResult, match="the stored result of 't' doesn't fit its return annotation"):
            found.value  # noqa: B018

    def test_refuses_the_task_of_another_function(self, session, queue):
        get = queue.task(type="t", aliases=["old"])(print_it)
        other, old = queue.add(session, "other"), queue.add(session, "old")

        assert get.result(session, old).state == "pending"
        with pytest.raises(
            InvalidTask, match=f"of the type 't' or 'old', got the task {other.id} of 'other'"
        ):
            get.result(session, other)


async def through_asyncio(engine, queue: Queue, task_id: int) -> list[Any]:
    own = create_async_engine(engine.url)
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    driver = await psycopg.AsyncConnection.connect(url)
    scoped = async_scoped_session(lambda: AsyncSession(own), asyncio.current_task)
    async with own.connect() as core, AsyncSession(own) as orm, driver:
        sessions = orm, scoped, core, driver
        found = [await queue.result(each, task_id) for each in sessions]
        found += [await queue.progress(each, task_id) for each in sessions]
        await scoped.remove()
    await own.dispose()
    return found


class TestReading:
    def test_is_possible_through_every_kind_of_session(self, engine, queue, worker):
        def run(task: RunningTask) -> dict[str, int]:
            task.set_progress(1, 2, "half")
            return {"a": 1}

        worker.use("t", run, keep_result=True)
        task_id = add(engine, queue)
        worker.work()
        url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        scoped = scoped_session(sessionmaker(engine))
        with Session(engine) as orm, engine.connect() as core, psycopg.connect(url) as driver:
            driver.execute("SET DateStyle = 'German'")
            sessions = orm, scoped, core, driver
            found = [queue.result(each, task_id) for each in sessions]
            found += [queue.progress(each, task_id) for each in sessions]
        scoped.remove()
        found += asyncio.run(through_asyncio(engine, queue, task_id))

        results = [each for each in found if isinstance(each, Result)]
        assert [each.value for each in results] == [{"a": 1}] * 8
        assert len({each for each in found if isinstance(each, Progress)}) == 1
        assert abs(found[4].at - datetime.now(UTC)) < timedelta(minutes=1)

    def test_tells_a_task_that_is_gone_from_one_that_has_not_ended(self, session, queue):
        task = queue.add(session, "t")

        assert queue.result(session, task).state == "pending"
        assert queue.result(session, task.id + 1_000) is None
        assert Queue("other").result(session, task) is None

    def test_refuses_what_is_not_a_task_or_a_session(self, session, queue):
        with pytest.raises(InvalidTask, match="a task's id must be a whole number"):
            queue.result(session, "7")
        with pytest.raises(TypeError, match=r"queue.result\(session, 7\)"):
            queue.result(7)

    @pytest.mark.parametrize(
        ("outcome", "state", "message"),
        [
            (Fail("no such user"), "failed", "it has failed, with Fail: no such user"),
            (Cancel("no"), "cancelled", "it was cancelled"),
        ],
    )
    def test_has_the_error_of_a_task_that_did_not_complete(
        self, engine, queue, worker, outcome, state, message
    ):
        def end(task: RunningTask) -> None:
            raise outcome

        worker.use("t", end, keep_result=True)
        task_id = add(engine, queue)
        worker.work()

        found = result(engine, queue, task_id)

        assert (found.state, found.has_ended) == (state, True)
        with pytest.raises(NoResult, match=message):
            found.value  # noqa: B018

    def test_says_that_the_result_of_a_completed_task_was_not_kept(self, engine, queue, worker):
        worker.use("t", lambda task: 5)
        task_id = add(engine, queue)
        worker.work()

        with pytest.raises(
            NoResult, match="has completed, but its result was not kept: pass keep_result=True"
        ):
            result(engine, queue, task_id).value  # noqa: B018

    def test_survives_values_of_other_programs(self, engine, queue):
        task_id = add(engine, queue)
        with closing(engine.raw_connection()) as connection:
            connection.cursor().execute(
                "UPDATE apoq_tasks SET state = 'completed', error = '[1]', "
                "result = (repeat('[', 5000) || repeat(']', 5000))::jsonb"
            )
            connection.commit()

        found = result(engine, queue, task_id)

        assert found.error is None
        with pytest.raises(NoResult, match="can't be read"):
            found.value  # noqa: B018


class TestDrain:
    def test_keeps_results_and_progress_in_the_transaction_of_the_test(self, session, queue):
        @queue.task(keep_result=True)
        def plain(task: RunningTask, number: int) -> int:
            task.set_progress(number, 5)
            task.session.execute(sa.select(1))
            return number

        @queue.task(keep_result=True)
        async def coroutine(number: int) -> int:
            return number

        first, second = plain.add(session, 3), coroutine.add(session, 4)

        assert [task.result for task in drain(session, queue)] == [3, 4]
        assert plain.result(session, first).value == 3
        assert coroutine.result(session, second).value == 4
        assert queue.progress(session, first).fraction == 0.6
