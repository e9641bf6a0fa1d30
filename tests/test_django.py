"""Django: tasks through its own connection, in its own transactions, tables in its own migrations."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from apoq import InvalidTask, Queue, RunningTask, SchemaMismatch, Task, UnsupportedSession, Worker
from apoq.migrations import downgrade_sql, upgrade_sql

django = pytest.importorskip("django")

from django.conf import settings  # noqa: E402
from django.db import close_old_connections, connection, connections, migrations, transaction  # noqa: E402
from django.db.migrations.state import ProjectState  # noqa: E402
from django.http import HttpResponse  # noqa: E402
from django.test import Client, TestCase  # noqa: E402
from django.urls import path  # noqa: E402

DATA = {"colour": "100 % 💖", "sizes": [1, 2.5, None]}
KINDS = ["default", "server_side", "pooled"]
"""Aliases of databases: cursors that bind in the client, Django's default, or on the server; a pool."""

queue = Queue()


@pytest.fixture(scope="session")
def database(template, create_database, drop_database) -> Iterator[sa.URL]:
    """Django, set up on a database of its own; once in a process, as it demands."""
    url = create_database(template.database)

    def describe(**options) -> dict[str, object]:
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": url.database,
            "USER": url.username or "",
            "PASSWORD": url.password or "",
            "HOST": url.host or url.query.get("host", ""),
            "PORT": url.port or url.query.get("port", ""),
            "OPTIONS": options,
            "TIME_ZONE": "Asia/Tokyo",
        }

    settings.configure(
        DATABASES={
            "default": describe(),
            "server_side": describe(server_side_binding=True),
            "pooled": describe(pool={"min_size": 1, "max_size": 2}),
            "each_request": describe() | {"ATOMIC_REQUESTS": True},
        },
        ALLOWED_HOSTS=["testserver"],
        ROOT_URLCONF=(path("add/<alias>", add), path("fail/<alias>", add_and_fail)),
        USE_TZ=True,
    )
    django.setup()
    yield url
    for alias in connections:
        connections[alias].close()
    connections["pooled"].close_pool()
    drop_database(url)


@pytest.fixture(autouse=True)
def tables(database) -> Iterator[None]:
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE apoq_tasks RESTART IDENTITY")
    yield
    for alias in connections:
        connections[alias].close()


@pytest.fixture
def engine(database) -> Iterator[sa.Engine]:
    engine = sa.create_engine(database)
    yield engine
    engine.dispose()


@pytest.fixture
def types(engine):
    """Answer the types of the tasks that are committed."""

    def look() -> list[str]:
        with engine.connect() as other:
            return list(other.scalars(sa.select(Task.type).order_by(Task.id)))

    return look


def add(_request, alias: str) -> HttpResponse:
    queue.add(connections[alias].connection, "t")
    return HttpResponse("added")


def add_and_fail(request, alias: str) -> HttpResponse:
    add(request, alias)
    raise ZeroDivisionError


class TestAdding:
    @pytest.mark.parametrize("alias", KINDS)
    def test_a_task_is_in_the_atomic_block(self, alias, types):
        with transaction.atomic(using=alias):
            queue.add(connections[alias].connection, "t")
            assert types() == []

        assert types() == ["t"]

    @pytest.mark.parametrize("alias", KINDS)
    def test_a_block_that_raises_leaves_none(self, alias, types):
        with pytest.raises(ZeroDivisionError), transaction.atomic(using=alias):
            queue.add(connections[alias].connection, "t")
            raise ZeroDivisionError

        assert types() == []

    @pytest.mark.parametrize("alias", KINDS)
    def test_it_is_answered_as_it_stands(self, alias):
        """Django lets its connections read JSON as text, and times in its own zone."""
        due = datetime(2031, 5, 4, tzinfo=UTC)
        with transaction.atomic(using=alias):
            task = queue.add(
                connections[alias].connection, "t", DATA, process_at=due, retry_delay=5, priority=3
            )

        assert (task.data, task.process_at, task.priority) == (DATA, due, 3)
        assert task.retry_delay == timedelta(seconds=5)

    @pytest.mark.parametrize("alias", KINDS)
    def test_many_are_added_at_once(self, alias, types):
        with transaction.atomic(using=alias):
            assert queue.add_many(connections[alias].connection, "t", [DATA] * 3_000) == 3_000

        assert len(types()) == 3_000

    def test_the_orm_goes_on_as_before(self):
        with transaction.atomic():
            queue.add(connection.connection, "t", DATA)
            with connection.cursor() as cursor:
                cursor.execute("SELECT data, created_at FROM apoq_tasks WHERE type = %s", ["t"])
                data, created_at = cursor.fetchone()

        assert isinstance(data, str)  # which is what its JSONField wants
        assert created_at.tzname() == "JST"  # as its settings say

    def test_a_savepoint_takes_its_tasks_with_it(self, types):
        with transaction.atomic():
            queue.add(connection.connection, "kept")
            with pytest.raises(ZeroDivisionError), transaction.atomic():
                queue.add(connection.connection, "lost")
                raise ZeroDivisionError

        assert types() == ["kept"]

    def test_a_rollback_that_is_set_takes_it(self, types):
        with transaction.atomic():
            queue.add(connection.connection, "t")
            transaction.set_rollback(True)

        assert types() == []

    def test_an_error_that_is_caught_around_a_savepoint_leaves_the_rest(self, types):
        nowhere = Queue(schema="nowhere")
        with transaction.atomic():
            queue.add(connection.connection, "kept")
            with pytest.raises(SchemaMismatch), transaction.atomic():
                nowhere.add(connection.connection, "lost")

        assert types() == ["kept"]

    def test_an_error_that_is_caught_without_one_takes_all_of_it(self, types):
        """PostgreSQL's way, of which Django hears nothing: the docs warn of it."""
        nowhere = Queue(schema="nowhere")
        with transaction.atomic():
            queue.add(connection.connection, "lost")
            with pytest.raises(SchemaMismatch):
                nowhere.add(connection.connection, "lost")

        assert types() == []

    def test_outside_of_a_block_it_stands_at_once(self, types):
        connection.ensure_connection()

        queue.add(connection.connection, "t")

        assert types() == ["t"]

    def test_a_typed_task_checks_its_arguments_first(self, types):
        typed = Queue()

        @typed.task(type="greet")
        def greet(user_id: int) -> None: ...

        with transaction.atomic():
            with pytest.raises((InvalidTask, TypeError), match="user_id"):
                greet.add(connection.connection, user_id="seven")  # type: ignore[arg-type]
            greet.add(connection.connection, user_id=7)

        assert types() == ["greet"]


class TestWhatIsNoConnection:
    """Each is told what to give instead."""

    def test_djangos_own_object(self):
        with transaction.atomic(), pytest.raises(UnsupportedSession, match=r"connection\.connection"):
            queue.add(connection, "t")  # type: ignore[call-overload]

    def test_one_that_is_not_open_yet(self):
        connection.close()

        with pytest.raises(UnsupportedSession, match=r"is None outside `transaction\.atomic\(\)`"):
            queue.add(connection.connection, "t")


class TestRequests:
    def test_one_that_is_atomic_commits_its_task(self, types):
        assert Client().get("/add/each_request").content == b"added"

        assert types() == ["t"]

    def test_one_that_raises_leaves_none(self, types):
        assert Client(raise_request_exception=False).get("/fail/each_request").status_code == 500

        assert types() == []


class TestTests:
    def test_a_test_case_rolls_its_tasks_back(self, types):
        counts: list[int] = []

        class Case(TestCase):
            def add_one(self) -> None:
                queue.add(connection.connection, "t")
                with connection.cursor() as cursor:
                    cursor.execute("SELECT count(*) FROM apoq_tasks")
                    counts.append(cursor.fetchone()[0])

            test_one = test_another = add_one

        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)

        assert result.wasSuccessful(), result.errors
        assert counts == [1, 1]
        assert types() == []


class TestMigrations:
    OPERATION = migrations.RunSQL(upgrade_sql(version=1), downgrade_sql(version=0))

    @pytest.fixture
    def missing(self) -> Iterator[None]:
        """A database in which they have not been run, until the end of the test."""
        with transaction.atomic():
            self.migrate("backwards")
            yield
            transaction.set_rollback(True)

    def migrate(self, direction: str) -> None:
        state = ProjectState()
        with connection.schema_editor() as editor:
            getattr(self.OPERATION, f"database_{direction}")("signup", editor, state, state)

    @pytest.mark.usefixtures("missing")
    def test_one_of_the_project_makes_the_tables(self):
        self.migrate("forwards")

        assert queue.add(connection.connection, "t").id == 1

    @pytest.mark.usefixtures("missing")
    def test_without_it_the_first_task_says_what_is_missing(self):
        with (
            pytest.raises(SchemaMismatch, match='relation "apoq_tasks" does not exist'),
            transaction.atomic(),
        ):
            queue.add(connection.connection, "t")


class TestWorking:
    @pytest.fixture
    def worker(self, engine) -> Iterator[Worker]:
        @contextmanager
        def fresh_connections(_task: RunningTask) -> Iterator[None]:
            close_old_connections()
            try:
                yield
            finally:
                close_old_connections()

        worker = Worker(engine, queue, middleware=fresh_connections)
        yield worker
        worker.stop(timeout=5)

    def test_a_processor_has_djangos_connection_and_leaves_none_open(self, worker):
        found: list[int] = []

        def process(task: RunningTask) -> None:
            with connection.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM apoq_tasks")
                found.append(cursor.fetchone()[0])
            assert connection.connection is not None

        worker.use("t", process)
        with transaction.atomic():
            queue.add(connection.connection, "t")

        assert worker.work().state == "completed"
        assert found == [1]
        assert connection.connection is None

    def test_a_connection_that_died_fails_one_attempt_and_no_more(self, worker, engine):
        def process(_task: RunningTask) -> None:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                (pid,) = cursor.fetchone()
                if len(killed) < 1:
                    killed.append(pid)
                    with engine.connect() as other:
                        other.execute(sa.select(sa.func.pg_terminate_backend(pid, 5_000)))
                cursor.execute("SELECT 1")

        killed: list[int] = []
        worker.use("t", process, retry_delay=lambda _: 0)
        with transaction.atomic():
            queue.add(connection.connection, "t")

        assert [worker.work().state for _ in range(2)] == ["pending", "completed"]

    def test_a_processor_adds_the_next_task_in_its_own_transaction(self, worker, types):
        def process(_task: RunningTask) -> None:
            with transaction.atomic():
                queue.add(connection.connection, "next")

        worker.use("t", process)
        with transaction.atomic():
            queue.add(connection.connection, "t")

        worker.work()

        assert types() == ["t", "next"]
