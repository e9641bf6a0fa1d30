"""What a caller may read of the `Task` that `add` returned, after its transaction has ended."""

from __future__ import annotations

import asyncio
import pickle
from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import ObjectDeletedError

from apoq import Queue, Task, Worker, prepare


@pytest.fixture(params=[True, False], ids=["expires on commit", "does not expire"])
def options(request) -> dict[str, bool]:
    return {"expire_on_commit": request.param}


@pytest.fixture
def work(engine, queue):
    """Complete and delete all tasks, as a worker does that keeps none."""
    worker = Worker(engine, queue, keep_completed=timedelta())
    worker.use("t", lambda task: None)

    def work() -> None:
        while worker.work():
            pass

    return work


class TestItsId:
    def test_after_the_commit_and_the_deletion_of_its_row(self, engine, queue, options, work):
        with Session(engine, **options) as session:
            task = queue.add(session, "t")
            session.commit()
            work()
            assert task.id > 0
            assert f"id={task.id}" in repr(task)

    def test_after_the_session_was_closed(self, engine, queue, options):
        with Session(engine, **options) as session, session.begin():
            task = queue.add(session, "t")

        assert pickle.loads(pickle.dumps(task)).id == task.id > 0

    @pytest.mark.parametrize("in_savepoint", [False, True])
    def test_after_a_rollback_the_task_is_as_any_object_that_was_not_kept(
        self, engine, queue, options, in_savepoint
    ):
        with Session(engine, **options) as session:
            transaction = session.begin_nested() if in_savepoint else session
            task = queue.add(session, "t")
            transaction.rollback()

            assert (task.id > 0, task.type, task in session) == (True, "t", False)
            assert session.get(Task, task.id) is None
            assert not queue.cancel(session, task)

    def test_after_a_savepoint_is_released_and_its_transaction_rolled_back(self, engine, queue):
        with Session(engine) as session:
            with session.begin_nested():
                task = queue.add(session, "t")
            assert task in session
            session.rollback()
            assert (task.id > 0, task in session) == (True, False)

    def test_on_asyncio(self, url, queue, options, work):
        async def main() -> list[int]:
            async_engine = create_async_engine(url)
            async with AsyncSession(async_engine, **options) as session:
                added = [await queue.add(session, "t")]
                await session.commit()
                await asyncio.to_thread(work)
                ids = [added[0].id]
                added.append(await queue.add(session, "t"))
                await session.rollback()
                added.append(await queue.add(session, "t"))
                session.expire_all()
                ids += [task.id for task in added[1:]]
            await async_engine.dispose()
            assert ids == [task.id for task in added]
            return ids

        assert min(asyncio.run(main())) > 0

    def test_in_a_schema(self, engine, options):
        prepare(engine, schema="jobs")
        with Session(engine, **options) as session:
            task = Queue(schema="jobs").add(session, "t")
            session.commit()
            session.execute(sa.text("DELETE FROM jobs.apoq_tasks"))
            session.commit()
            assert task.id > 0

    def test_through_a_connection(self, engine, queue, work):
        with engine.begin() as connection:
            task = queue.add(connection, "t")
        work()

        assert (task.id > 0, task.state) == (True, "pending")

    def test_of_one_that_was_added_as_an_object(self, engine, options, work):
        with Session(engine, **options) as session:
            task = Task(type="t")
            session.add(task)
            session.commit()
            work()
            assert task.id > 0


class TestItsOtherColumns:
    def test_they_are_read_anew_after_the_commit(self, engine, queue):
        with Session(engine) as session:
            task = queue.add(session, "t")
            session.commit()
            with engine.begin() as connection:
                connection.execute(sa.update(Task).values(state="completed"))
            assert task.state == "completed"

    def test_they_are_gone_with_the_row(self, engine, queue, work):
        with Session(engine) as session:
            task = queue.add(session, "t")
            session.commit()
            work()
            assert session.get(Task, task.id) is None
            with pytest.raises(ObjectDeletedError):
                _ = task.state


def test_an_object_that_refers_to_a_task_can_be_added_again_after_a_rollback(engine, queue):
    registry = sa.orm.registry()

    @registry.mapped
    class Order:
        __tablename__ = "orders"
        id = sa.Column(sa.Integer, primary_key=True)
        task_id = sa.Column(sa.ForeignKey(Task.id))
        task = sa.orm.relationship(Task)

    registry.metadata.tables["orders"].create(engine)
    with Session(engine) as session:
        order = Order(id=1, task=queue.add(session, "t"))
        session.add(order)
        session.rollback()
        session.add(order)
        session.commit()

        assert order.task_id == order.task.id > 0
        assert order.task.state == "pending"
