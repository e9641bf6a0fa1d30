"""Where Citus shards a schema, a claim is several statements of one transaction.

There is no Citus here. A trigger stands for it, which refuses what Citus' planner refuses: an UPDATE of tasks
in a statement that writes to another table as well. `test_citus_rules` has the rules for the statements.
"""

from __future__ import annotations

import threading

import probe
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, Task
from apoq.schema.statements.claim import LONGEST

until = patience(10.0)

SHARD = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF current_query() ~ 'INSERT' THEN
            RAISE feature_not_supported USING message = 'cannot perform distributed planning';
        END IF;
        RETURN NULL;
    END $$;
    CREATE TRIGGER refuse BEFORE UPDATE ON apoq_tasks EXECUTE FUNCTION refuse()
"""


@pytest.fixture
def shard(engine):
    def shard() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(SHARD)

    return shard


def add(engine, data: list) -> None:
    with Session(engine) as session, session.begin():
        Queue().add_many(session, "t", data, meta={"tenant": 7})


def states(engine) -> list[str]:
    with engine.connect() as connection:
        return sorted(connection.scalars(sa.select(Task.state)))


@pytest.mark.parametrize("data", [{"x": 1}, {"x": "y" * 2 * LONGEST}], ids=["short", "large"])
def test_tasks_are_claimed_with_their_data(engine, worker, shard, data):
    shard()
    add(engine, [data])
    seen = []
    worker.use("t", lambda task: seen.append((task.data, task.meta)))

    worker.work()

    assert seen == [(data, {"tenant": 7})]
    assert states(engine) == ["completed"]


def test_the_claim_is_recorded_with_it(engine, worker, shard):
    """By this, other workers find the tasks if this one dies."""
    shard()
    add(engine, [{}] * 3)
    began, may_end = threading.Event(), threading.Event()
    worker.use("t", lambda task: (began.set(), may_end.wait(10)))
    worker.start()
    assert began.wait(10)

    with engine.connect() as connection:
        ids = connection.scalar(sa.text("SELECT array_agg(id) FROM apoq_claims, unnest(task_ids) id"))
        running = list(connection.scalars(sa.select(Task.id).where(Task.state == "running")))
    may_end.set()

    assert sorted(ids) == sorted(running)


def test_a_worker_goes_on_when_its_schema_is_distributed(engine, worker, shard):
    done = []
    worker.use("t", lambda task: done.append(task.id))
    worker.start()
    add(engine, [{}] * 10)
    until(lambda: len(done) == 10)

    shard()
    add(engine, [{}] * 10)

    until(lambda: states(engine) == ["completed"] * 20)
    assert len(set(done)) == len(done) == 20


def test_it_does_not_ask_each_time(engine, worker, shard):
    shard()
    worker.use("t", lambda task: None)
    for _ in range(3):
        add(engine, [{}])
        worker.work()

    assert probe.has_split_claims(worker)
