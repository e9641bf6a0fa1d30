"""What became of tasks is written many at a time, and none is in the others' way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import itemgetter
from uuid import UUID

import probe
import pytest
import sqlalchemy as sa
from claims import hold_lease, note
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Retry, Task, Worker
from apoq.schema.statements.claim import CLAIM_TOKEN, ID
from apoq.schema.statements.recover import rescue
from apoq.schema.tables import ClaimRow
from apoq.worker.execution.runner import ended

SOON = 30.0

until = patience(SOON)

REFUSE = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not so'; END $$;
    CREATE TRIGGER refuse BEFORE UPDATE ON apoq_tasks
        FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION refuse()
"""
"""What somebody has added to the table, and what can't be written because of it."""


CLAIMED_BEFORE = sa.text(
    "UPDATE apoq_tasks SET claim_token = claim_token + :times WHERE data = CAST(:data AS jsonb)"
)


def refuse(engine: sa.Engine, condition: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(REFUSE.format(condition=condition))


def tasks(engine: sa.Engine) -> list[Task]:
    with Session(engine) as session:
        return list(session.scalars(sa.select(Task).order_by(Task.id)))


@pytest.fixture
def worker(make_worker) -> Worker:
    worker = make_worker()
    worker.use("t", lambda task: None)
    return worker


@pytest.fixture
def end(engine, queue, worker) -> Iterator[Callable[..., Callable[[], object]]]:
    """Let tasks end so, the last one first; answer what writes that, all in one batch."""

    def end(*outcomes: BaseException | None, claims: Iterable[int] = ()) -> Callable[[], object]:
        with Session(engine) as session, session.begin():
            queue.add_many(session, "t", range(len(outcomes)))
            for number, times in enumerate(claims):
                session.execute(CLAIMED_BEFORE, {"data": str(number), "times": times - 1})
        hold_lease(worker)
        rows = sorted(probe.claim(worker, len(outcomes), len(outcomes)), key=itemgetter(ID))
        for row, outcome in reversed(list(zip(rows, outcomes, strict=True))):
            probe.put_ended(worker, ended(probe.make_attempt(worker, row), outcome))
        return partial(probe.settler(worker).flush, SOON)

    yield end
    probe.own_engine(worker).dispose()


@pytest.mark.parametrize(
    ("outcome", "state"), [(None, "completed"), (Retry(delay=60), "pending")], ids=["completions", "failures"]
)
class TestABatch:
    def test_of_which_one_can_not_be_written_is_written_but_for_that_one(self, engine, end, outcome, state):
        refuse(engine, f"NEW.state = '{state}' AND NEW.data = '1'")

        end(outcome, outcome, outcome)()

        assert [task.state for task in tasks(engine)] == [state, "running", state]

    @pytest.mark.parametrize("claims", [(1, 1, 1), (1, 2, 3)], ids=["alike", "claimed more or less often"])
    def test_of_which_one_was_taken_away_is_written_but_for_that_one(
        self, engine, end, outcome, state, claims
    ):
        write = end(outcome, outcome, outcome, claims=claims)
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE apoq_tasks SET claim_token = claim_token + 1 WHERE data = '1'")

        write()

        assert [task.state for task in tasks(engine)] == [state, "running", state]

    def test_is_written_in_the_order_of_the_ids(self, engine, end, outcome, state):
        """So that it and whoever else keeps to that order never wait for each other."""
        write = end(outcome, outcome, outcome)
        ids = [task.id for task in tasks(engine)]
        lock = sa.select(Task.id).with_for_update(nowait=True)
        waiting = sa.text(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        writing = threading.Thread(target=write)
        with engine.connect() as caller, engine.connect() as looking:
            caller.execute(lock.where(Task.id == ids[0]))
            writing.start()
            until(lambda: looking.scalar(waiting) == 1 or looking.rollback())

            assert caller.scalars(lock.where(Task.id > ids[0])).all() == ids[1:]
            caller.rollback()
        writing.join()

        assert [task.state for task in tasks(engine)] == [state] * 3


def test_the_completions_of_a_batch_have_one_time(engine, end):
    """So the index by which they are pruned keeps it once for many of them."""
    end(None, None, None)()

    assert len({task.completed_at for task in tasks(engine)} - {None}) == 1


def test_each_of_a_batch_is_told_of_once_where_one_can_not_be_written_and_another_is_locked(
    engine, worker, end, caplog
):
    told = []
    worker.events.on("task.completed", lambda task: told.append(task.data))
    refuse(engine, "NEW.state = 'completed' AND NEW.data = '1'")
    writing = threading.Thread(target=end(None, None, None))
    with caplog.at_level(logging.INFO, "apoq"), engine.connect() as caller:
        locked = caller.scalars(sa.select(Task.data).where(Task.data == sa.cast(2, JSONB)).with_for_update())
        assert locked.all() == [2]
        writing.start()
        until(lambda: told == [0])
        caller.rollback()
        writing.join()

    assert told == [0, 2]
    assert [message for message in caplog.messages if "was taken" in message] == []
    assert [task.state for task in tasks(engine)] == ["completed", "running", "completed"]


def test_a_locked_task_that_is_in_a_batch_twice_is_settled_by_its_last_claim(engine, queue, worker):
    """It was claimed again after the worker had lost it."""
    with Session(engine) as session, session.begin():
        queue.add(session, "t")
    hold_lease(worker)
    (row,) = probe.claimer(worker).claim(1, 1)
    before = (*row[:CLAIM_TOKEN], row[CLAIM_TOKEN] - 1, *row[CLAIM_TOKEN + 1 :])
    for each in (before, row):
        probe.put_ended(worker, ended(probe.make_attempt(worker, each), None))
    writing = threading.Thread(target=probe.settler(worker).flush, args=(SOON,))
    with engine.connect() as caller:
        caller.execute(sa.select(Task.id).with_for_update())
        writing.start()
        until(lambda: probe.put_off_count(worker))
        caller.rollback()
    writing.join()

    assert [task.state for task in tasks(engine)] == ["completed"]
    probe.own_engine(worker).dispose()


def test_an_error_that_can_not_be_stored_is_left_out_and_its_task_settled(engine, end):
    refuse(engine, "NEW.error->>'message' = 'the secret'")

    end(ValueError("the secret"), ValueError("another"))()

    first, second = tasks(engine)
    assert (first.state, first.fail_count, first.error["class"]) == ("pending", 1, "ValueError")
    assert (first.error["message"], second.error["message"]) == ("", "another")


def sweep(connection: sa.Connection, at_most: int = 10) -> int:
    """Rescue what runs, whoever has it."""
    dead = connection.scalars(sa.union(sa.select(Task.worker_id), sa.select(ClaimRow.worker_id))).all()
    parameters = {"at_most": at_most, "reason": "{}", "dead": dead}
    return connection.execute(rescue(None), parameters).rowcount


def test_a_task_that_is_ended_without_an_attempt_has_failed_when_it_is_ended(engine, worker):
    """It is kept from then on, and not from when its last worker died."""
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    with Session(engine) as session, session.begin():
        session.add(Task(type="t", fail_count=100, attempt=100, rescue_count=100, failed_at=long_ago))

    assert worker.work() is None

    (task,) = tasks(engine)
    assert (task.state, task.attempt) == ("failed", 100)
    assert task.failed_at > task.claimed_at > long_ago


class TestTheSweep:
    """Running tasks whose workers are gone."""

    @pytest.fixture(autouse=True)
    def _orphans(self, engine, queue) -> None:
        with engine.begin() as connection:
            queue.add_many(connection, "t", range(5))
            connection.exec_driver_sql(
                "UPDATE apoq_tasks SET state = 'running', attempt = 1, worker_id = gen_random_uuid()"
            )
            note(connection)

    def test_rescues_all_but_what_can_not_be_written_and_its_worker_lives(self, engine, make_worker):
        refuse(engine, "OLD.state = 'running' AND NEW.state = 'pending' AND NEW.data IN ('0', '2')")
        worker = make_worker(lease=timedelta(seconds=1))
        worker.use("t", lambda task: None, retry_delay=lambda fail_count: 0)
        worker.start()

        until(lambda: [task.state for task in tasks(engine)].count("completed") == 3)
        first = worker.last_heartbeat_at
        until(lambda: worker.last_heartbeat_at - first > timedelta(seconds=1.5))
        assert worker.is_healthy()
        assert [task.state for task in tasks(engine)] == ["running", "completed"] * 2 + ["completed"]

    def test_takes_the_oldest_first(self, engine):
        ids = [task.id for task in tasks(engine)]
        for id_ in reversed(ids):  # now the table and its index have them the other way round
            with engine.begin() as connection:
                last_first = sa.update(Task).where(Task.id == id_).values(worker_id=UUID(int=100 - id_))
                connection.execute(last_first)

        with engine.begin() as connection:
            sweep(connection, at_most=2)

        assert [task.id for task in tasks(engine) if task.state == "pending"] == ids[:2]

    def test_takes_no_attempt_from_what_was_claimed_ahead(self, engine):
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE apoq_tasks SET prefetched = true WHERE data IN ('1', '2')")
            sweep(connection)

        used = [(task.attempt, task.fail_count) for task in tasks(engine)]
        assert used == [(1, 1), (0, 0), (0, 0), (1, 1), (1, 1)]

    def test_passes_over_what_somebody_holds(self, engine):
        lock = sa.select(Task.id).where(sa.text("data = '2'")).with_for_update()
        with engine.connect() as holding, engine.begin() as connection:
            holding.execute(lock)
            connection.exec_driver_sql("SET LOCAL lock_timeout = '2s'")

            assert sweep(connection) == 4
