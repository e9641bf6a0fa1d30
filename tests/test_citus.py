"""Schemas that Citus shards are recognized, and worked.

There is no Citus here. `citus_stand_in` creates tables with the names of Citus' catalogues in a real
PostgreSQL, and fills them as Citus would. The tables of apoq are ordinary ones. So these tests show what apoq
does if it finds a schema sharded, and not what Citus does; `test_citus_rules` checks the forms of statements.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator

import citus_stand_in
import pytest
import sqlalchemy as sa
from citus_stand_in import ANOTHER, NODE, SIZE
from click.testing import CliRunner, Result
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, RunningTask, Task, Worker, prepare
from apoq.cli import main
from apoq.errors import UnsupportedDatabase
from apoq.migrations import differences
from apoq.postgres import connections
from apoq.schema.citus import placement, shards
from apoq.schema.preflight import CITUS, problems
from apoq.worker import runtime as runtime_module

SOON = 20.0

until = patience(SOON)

STORAGE = """
    SELECT CAST(attstorage AS text) FROM pg_attribute
    WHERE attrelid = CAST('{}.apoq_claims' AS regclass) AND attname = 'task_ids'
"""

WAITING = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")


@pytest.fixture
def cluster(engine) -> sa.Engine:
    """A database that seems to have Citus."""
    citus_stand_in.install(engine)
    return engine


@pytest.fixture
def sharded(cluster) -> sa.Engine:
    """One in which the schema "jobs" is on the node to which the test connects."""
    prepare(cluster, schema="jobs")
    citus_stand_in.shard(cluster, "jobs")
    return cluster


@pytest.fixture
def run(engine, monkeypatch) -> Callable[..., Result]:
    monkeypatch.setenv("APOQ_DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return lambda *arguments: CliRunner().invoke(main, arguments)


def findings(result: Result) -> dict[str, dict[str, str]]:
    return {finding["subject"]: finding for finding in json.loads(result.stdout)}


class TestPlacement:
    def test_without_citus_there_is_none(self, engine):
        with engine.connect() as connection:
            assert (placement(connection), shards(connection)) == (None, False)

    def test_nor_in_a_schema_that_is_not_sharded(self, sharded):
        with sharded.connect() as connection:
            assert (placement(connection), shards(connection)) == (None, False)

    @pytest.mark.parametrize(
        ("node", "name", "is_here"), [(NODE, "w1:5432", True), (ANOTHER, "w2:5433", False)]
    )
    def test_a_sharded_schema_is_on_one_node(self, cluster, node, name, is_here):
        prepare(cluster, schema="The Jobs")
        citus_stand_in.shard(cluster, "The Jobs", node)

        with cluster.connect() as connection:
            found = placement(connection, "The Jobs")
            assert found is not None
            assert (found.node, found.is_here, found.is_whole) == (name, is_here, True)
            assert shards(connection, "The Jobs")

    def test_that_of_the_search_path_is_found(self, sharded):
        with sharded.connect() as connection:
            connection.exec_driver_sql("SET search_path = jobs")

            assert placement(connection) is not None
            assert shards(connection)


class TestPreflight:
    def test_a_sharded_schema_is_no_problem(self, sharded):
        with sharded.connect() as connection:
            assert problems(connection, "jobs") == []

    @pytest.mark.parametrize(
        ("method", "model"), [("h", "s"), ("n", "t")], ids=["rows on several nodes", "a copy on each node"]
    )
    def test_a_worker_does_not_start_on_a_table_that_is_on_several_nodes(
        self, cluster, make_worker, method, model
    ):
        prepare(cluster, schema="Jobs")
        with cluster.begin() as connection:
            citus_stand_in.distribute(connection, '"Jobs".apoq_tasks', method=method, model=model)

        with cluster.connect() as connection:
            (problem,) = problems(connection, "Jobs")

        fix = "SELECT undistribute_table('\"Jobs\".apoq_tasks')"
        assert (problem.subject, problem.fix, problem.is_fatal) == (CITUS, fix, True)
        with pytest.raises(UnsupportedDatabase, match="distributed by Citus over several nodes"):
            make_worker(Queue(schema="Jobs")).start()


class TestMigration:
    """Citus refuses to change the storage of a column of a sharded table."""

    @pytest.fixture
    def executed(self, engine) -> Iterator[list[str]]:
        statements: list[str] = []

        def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            statements.append(statement)

        sa.event.listen(engine, "before_cursor_execute", note)
        yield statements
        sa.event.remove(engine, "before_cursor_execute", note)

    def test_of_a_sharded_schema_sets_no_storage_afterwards(self, cluster, executed):
        with cluster.begin() as connection:
            connection.exec_driver_sql("CREATE SCHEMA jobs")
        citus_stand_in.shard(cluster, "jobs")
        executed.clear()

        prepare(cluster, schema="jobs")

        assert [each for each in executed if "SET STORAGE" in each] == []
        with cluster.connect() as connection:
            is_new = connection.dialect.server_version_info >= (16,)
            assert connection.exec_driver_sql(STORAGE.format("jobs")).scalar() == ("e" if is_new else "x")
            assert differences(connection, "jobs") == []

    def test_of_another_schema_is_as_without_citus(self, cluster, executed):
        prepare(cluster, schema="jobs")

        assert len([each for each in executed if "SET STORAGE" in each]) == 1
        with cluster.connect() as connection:
            assert connection.exec_driver_sql(STORAGE.format("jobs")).scalar() == "e"


class TestCommands:
    @pytest.mark.parametrize(
        ("node", "text"),
        [
            (NODE, "jobs.apoq_tasks is on the node w1:5432, to which this connection leads"),
            (ANOTHER, "jobs.apoq_tasks is on the node w2:5433, and this connection leads to another one: "),
        ],
    )
    def test_doctor_says_on_which_node_the_tables_are(self, cluster, run, node, text):
        prepare(cluster, schema="jobs")
        citus_stand_in.shard(cluster, "jobs", node)

        found = findings(run("doctor", "--schema", "jobs", "--json"))

        assert found["citus"]["level"] == "ok"
        assert found["citus"]["text"].startswith(text)

    def test_doctor_knows_of_no_dead_rows_there(self, sharded, run):
        found = findings(run("doctor", "--schema", "jobs", "--json"))

        assert found["vacuum"]["text"] == (
            "autovacuum is on; the number of dead rows is not known here, but only on the node w1:5432"
        )

    def test_doctor_says_nothing_of_it_if_a_schema_is_not_sharded(self, sharded, run):
        found = findings(run("doctor", "--json"))

        assert "citus" not in found
        assert "dead rows" in found["vacuum"]["text"]

    def test_stats_has_the_size_of_the_tables_on_their_node(self, sharded, run):
        shown = json.loads(run("stats", "--schema", "jobs", "--json").stdout)

        assert (shown["bytes"], shown["rows"]) == (SIZE, -1)
        assert "the table has 602 kB" in run("stats", "--schema", "jobs").output


class TestWorker:
    """No lock_timeout reaches the node that has the tables."""

    @pytest.fixture(autouse=True)
    def _without_timeout(self, monkeypatch) -> None:
        monkeypatch.setattr(runtime_module, "LOCK_TIMEOUT", "0")

    @pytest.fixture
    def running(self, sharded, make_worker) -> Iterator[tuple[Worker, list[int], threading.Event]]:
        """Tasks that run, of which every second one fails, and what lets them end."""
        queue, begun, go_on = Queue(schema="jobs"), threading.Semaphore(0), threading.Event()

        def process(task: RunningTask) -> None:
            begun.release()
            go_on.wait(SOON)
            if task.data % 2:
                raise ValueError

        worker = make_worker(queue, concurrency=10)
        worker.use("t", process, retry_limit=0)
        with Session(sharded) as session, session.begin():
            ids = [queue.add(session, "t", number).id for number in range(10)]
        worker.start()
        for _ in ids:
            assert begun.acquire(timeout=SOON)
        yield worker, ids, go_on
        go_on.set()

    def states(self, engine: sa.Engine) -> list[str]:
        with engine.connect() as connection:
            found = connection.exec_driver_sql("SELECT state FROM jobs.apoq_tasks ORDER BY id")
            return list(found.scalars())

    @pytest.mark.parametrize("commits", [True, False])
    def test_settles_the_others_while_a_caller_has_locked_some(self, sharded, running, commits):
        _, ids, go_on = running
        ended = ["completed", "failed"] * 5
        with Session(sharded) as session:
            for id_ in ids[:2]:
                assert Queue(schema="jobs").cancel(session, id_)

            go_on.set()

            until(lambda: self.states(sharded) == ["running"] * 2 + ended[2:])
            (session.commit if commits else session.rollback)()

        until(lambda: self.states(sharded) == (["cancelled"] * 2 if commits else ended[:2]) + ended[2:])

    def test_tells_of_each_once(self, sharded, running):
        worker, ids, go_on = running
        told: list[int] = []
        for event in ("task.completed", "task.failed"):
            worker.events.on(event, lambda task, *_: told.append(task.id))
        with Session(sharded) as session:
            assert Queue(schema="jobs").cancel(session, ids[0])
            assert Queue(schema="jobs").cancel(session, ids[1])
            go_on.set()
            until(lambda: len(told) == 8)
            session.rollback()

        until(lambda: len(told) == 10)
        assert sorted(told) == ids


class TestAWorkerWhoseSchemaIsShardedLater:
    """It doesn't know that its schema has moved, and waits for locks that no lock_timeout ends."""

    def test_waits_for_them_only_once(self, engine, queue, make_worker, monkeypatch):
        monkeypatch.setattr(runtime_module, "LOCK_TIMEOUT", "0")
        monkeypatch.setattr(connections, "SESSION", connections.SESSION.replace("'60s'", "'1s'"))
        begun, go_on = threading.Semaphore(0), [threading.Event(), threading.Event()]
        worker = make_worker(concurrency=2)
        worker.use("t", lambda task: begun.release() or go_on[task.data].wait(SOON))
        with Session(engine) as session, session.begin():
            ids = [queue.add(session, "t", number).id for number in range(2)]
        worker.start()
        for _ in ids:
            assert begun.acquire(timeout=SOON)

        with Session(engine) as session, Session(engine) as looking:
            assert queue.cancel(session, ids[0])
            go_on[0].set()
            until(lambda: looking.scalar(WAITING) or looking.rollback())
            go_on[1].set()

            until(lambda: looking.get_one(Task, ids[1]).state == "completed" or looking.rollback())
            session.rollback()

        with Session(engine) as looking:
            until(lambda: looking.get_one(Task, ids[0]).state == "completed" or looking.rollback())
