"""apoq in Flask applications, with Flask-SQLAlchemy and Flask-SQLAlchemy-Lite."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import flask
import flask_sqlalchemy
import flask_sqlalchemy_lite
import pages
import probe
import pytest
import sqlalchemy as sa
from flask import Flask, current_app, g
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from apoq import (
    ApoqError,
    AsyncRunningTask,
    InvalidProcessor,
    InvalidTask,
    Limit,
    Queue,
    RunningTask,
    Task,
    TaskFailure,
    UnsupportedSession,
    prepare,
)
from apoq.flask import Apoq
from apoq.flask.contexts import context_for
from apoq.flask.tasks import AppTask
from apoq.testing import assert_enqueued, drain, travel


class Base(DeclarativeBase):
    pass


class Row(Base):
    """What the tests' processors and views write, into the table that each database of the tests has."""

    __tablename__ = "ledger"

    task_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)


@pytest.fixture(scope="module")
def databases(create_database, drop_database, template) -> Iterator[list[sa.URL]]:
    """Two, for all of these tests: to clone one takes longer than most of them."""
    urls = [create_database(template.database) for _ in range(2)]
    yield urls
    for url in urls:
        drop_database(url)


def emptied(url: sa.URL) -> Iterator[sa.Engine]:
    engine = sa.create_engine(url)
    yield engine
    with engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE apoq_tasks, apoq_workers, apoq_schedules, ledger")
    engine.dispose()


@pytest.fixture
def url(databases) -> sa.URL:
    return databases[0]


@pytest.fixture
def engine(url) -> Iterator[sa.Engine]:
    yield from emptied(url)


class Classic:
    """Flask-SQLAlchemy."""

    def __init__(self) -> None:
        self.db = flask_sqlalchemy.SQLAlchemy(model_class=Base)

    def configure(self, app: Flask, url: sa.URL, **binds: sa.URL) -> None:
        app.config["SQLALCHEMY_DATABASE_URI"] = url
        app.config["SQLALCHEMY_BINDS"] = binds

    def session_on(self, bind: str) -> Session:
        return Session(self.db.engines[bind])


class Lite:
    """Flask-SQLAlchemy-Lite."""

    def __init__(self) -> None:
        self.db = flask_sqlalchemy_lite.SQLAlchemy()

    def configure(self, app: Flask, url: sa.URL, **binds: sa.URL) -> None:
        app.config["SQLALCHEMY_ENGINES"] = {"default": url, **binds}

    def session_on(self, bind: str) -> Session:
        return Session(self.db.get_engine(bind))


@pytest.fixture(params=[Classic, Lite], ids=lambda flavour: flavour.__doc__)
def extension(request) -> Classic | Lite:
    return request.param()


@pytest.fixture
def db(extension) -> Any:
    return extension.db


@pytest.fixture
def apoq() -> Apoq:
    return Apoq()


@pytest.fixture
def make_app(extension, apoq, url, engine) -> Iterator[Callable[..., Flask]]:
    """Make applications, each with the settings that are given."""
    made = []

    def make(url: sa.URL = url, binds: dict[str, sa.URL] | None = None, **settings: Any) -> Flask:
        app = Flask("shop")
        extension.configure(app, url, **binds or {})
        app.config.update(TESTING=True, **settings)
        extension.db.init_app(app)
        apoq.init_app(app)
        made.append(app)
        return app

    yield make
    for app in made:
        with app.app_context():
            apoq.worker.stop(timeout=5)
            for own in extension.db.engines.values():
                own.dispose()


@pytest.fixture
def app(make_app) -> Flask:
    return make_app()


@pytest.fixture
def context(app) -> Iterator[None]:
    with app.app_context():
        yield


def tasks(engine: sa.Engine) -> list[tuple[str, str]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.select(Task.type, Task.state).order_by(Task.id))]


def ledger(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(Row.task_id)))


class TestAdding:
    @pytest.fixture
    def client(self, app, apoq, db):
        @app.post("/<int:number>")
        def post(number: int) -> str:
            db.session.add(Row(task_id=number))
            apoq.add("t", {"number": number})
            if number == 13:
                raise RuntimeError("bad luck")
            db.session.commit()
            return "done"

        app.config["PROPAGATE_EXCEPTIONS"] = False
        return app.test_client()

    def test_a_request_that_commits_adds_its_task(self, client, engine):
        assert client.post("/7").text == "done"

        assert (ledger(engine), tasks(engine)) == ([7], [("t", "pending")])

    def test_a_request_that_raises_adds_none(self, client, engine):
        assert client.post("/13").status_code == 500

        assert (ledger(engine), tasks(engine)) == ([], [])

    def test_a_request_that_does_nothing_else_adds_it_too(self, app, apoq, db, engine):
        with app.test_request_context():
            apoq.add("t")
            db.session.commit()

        assert tasks(engine) == [("t", "pending")]

    def test_the_task_is_in_the_session(self, context, apoq, db):
        task = apoq.add("t", {"color": "💖"}, priority=3, delay=timedelta(hours=1))

        assert db.session.get(Task, task.id) is task
        assert (task.data, task.priority) == ({"color": "💖"}, 3)

    def test_many_are_added(self, context, apoq, db, engine):
        assert apoq.add_many("t", [{"n": n} for n in range(3)]) == 3
        db.session.commit()

        assert tasks(engine) == [("t", "pending")] * 3

    def test_unique_tasks_are_added_once(self, context, apoq, db, engine):
        @apoq.task(type="unique", unique=True, unique_until="ended", on_conflict="replace")
        def unique(n: int) -> None: ...

        assert [apoq.add("t", unique_key="k").is_new for _ in range(2)] == [True, False]
        assert apoq.add_many("t", [1, 2, 1], unique_key=str) == 2
        assert [unique.add(7).add_outcome for _ in range(2)] == ["added", "replaced"]
        assert unique.add_many([unique.call(7), unique.call(8)]) == 1
        db.session.commit()

        assert sorted(tasks(engine)) == [("t", "pending")] * 3 + [("unique", "pending")] * 2

    def test_a_session_of_the_callers_may_be_given(self, context, apoq, db, engine):
        with Session(db.engine) as session, session.begin():
            apoq.add("one", session=session)
            apoq.add_many("many", [1], session=session.connection())
        db.session.rollback()

        assert tasks(engine) == [("one", "pending"), ("many", "pending")]

    def test_the_extensions_may_be_initialised_in_any_order(self, extension, url, engine):
        app, apoq = Flask("shop"), Apoq()
        extension.configure(app, url)
        apoq.init_app(app)
        extension.db.init_app(app)

        with app.app_context():
            apoq.add("t")
            extension.db.session.commit()
            extension.db.engine.dispose()

        assert tasks(engine) == [("t", "pending")]

    def test_an_async_view_adds_in_the_same_session(self, app, apoq, db, engine):
        @app.post("/")
        async def post() -> str:
            await asyncio.sleep(0)
            apoq.add("t")
            db.session.commit()
            return "done"

        assert app.test_client().post("/").text == "done"
        assert tasks(engine) == [("t", "pending")]


class TestProcessing:
    def test_each_task_has_an_application_context_of_its_own(self, context, app, apoq, db):
        seen = []

        @apoq.processor("t")
        def process(task: RunningTask) -> None:
            seen.append((current_app._get_current_object(), "mark" in g))
            g.mark = task.id

        g.mark = "the test's"
        apoq.add_many("t", [1, 2])
        db.session.commit()
        apoq.worker.work()
        apoq.worker.work()

        assert seen == [(app, False), (app, False)]
        assert g.mark == "the test's"

    def test_its_session_ends_with_it(self, app, apoq, db):
        ended = []
        app.teardown_appcontext(ended.append)

        @apoq.processor("t")
        def process(task: RunningTask) -> None:
            db.session.execute(sa.text("SELECT 1"))
            assert db.engine.pool.checkedout() == 1
            if task.attempt == 1:
                raise ValueError("no")

        with app.app_context():
            apoq.add("t", retry_delay=0)
            db.session.commit()
        for _ in range(2):
            app.extensions["apoq"].worker.work()

        with app.app_context():
            assert db.engine.pool.checkedout() == 0
        # The first two contexts are those of adding, and of looking for the engine.
        assert [str(error) for error in ended if error is not None] == ["no"]

    def test_what_is_committed_in_the_applications_session_stays_when_it_fails(
        self, context, apoq, db, engine
    ):
        @apoq.processor("t", retry_limit=0)
        def process(task: RunningTask) -> None:
            db.session.add(Row(task_id=1))
            db.session.commit()
            task.session.add(Row(task_id=2))
            task.session.flush()
            raise ValueError("no")

        apoq.add("t")
        db.session.commit()
        apoq.worker.work()

        assert (tasks(engine), ledger(engine)) == ([("t", "failed")], [1])

    def test_what_it_writes_through_the_tasks_session_commits_with_it(self, context, apoq, db, engine):
        @apoq.processor("t")
        def process(task: RunningTask) -> None:
            task.session.add(Row(task_id=2))

        apoq.add("t")
        db.session.commit()
        apoq.worker.work()

        assert (tasks(engine), ledger(engine)) == ([("t", "completed")], [2])

    def test_a_processor_adds_tasks_too(self, context, apoq, db, engine):
        @apoq.processor("first")
        def process(task: RunningTask) -> None:
            apoq.add("with the task", session=task.session)
            apoq.add("with its own session")
            db.session.commit()

        apoq.add("first")
        db.session.commit()
        apoq.worker.work()

        assert set(tasks(engine)) == {
            ("first", "completed"),
            ("with the task", "pending"),
            ("with its own session", "pending"),
        }

    def test_a_coroutine_has_its_context_until_it_ends(self, context, app, apoq, db, engine):
        @apoq.processor("t")
        async def process(task: AsyncRunningTask) -> None:
            g.number = task.data
            await asyncio.sleep(0)
            task.session.add(Row(task_id=g.number))

        apoq.add("t", 5)
        db.session.commit()
        apoq.worker.work()

        assert (tasks(engine), ledger(engine)) == ([("t", "completed")], [5])

    def test_the_session_of_a_coroutine_ends_with_it(self, app, apoq, db):
        @apoq.processor("t")
        async def process(task: AsyncRunningTask) -> None:
            db.session.execute(sa.text("SELECT 1"))
            assert db.engine.pool.checkedout() == 1

        with app.app_context():
            apoq.add("t")
            db.session.commit()
        worked = app.extensions["apoq"].worker.work()

        with app.app_context():
            assert (worked.state, db.engine.pool.checkedout()) == ("completed", 0)

    def test_a_processor_may_come_after_the_worker(self, context, apoq, db, engine):
        worker = apoq.worker
        apoq.use("t", lambda task: None)
        apoq.add("t")
        db.session.commit()
        worker.work()

        assert tasks(engine) == [("t", "completed")]

    def test_a_decorated_function_is_itself(self, apoq):
        def process(task: RunningTask) -> None: ...

        assert apoq.processor("t")(process) is process

    def test_a_type_has_one_processor(self, apoq):
        apoq.use("t", print)

        with pytest.raises(InvalidProcessor, match="the type 't' already has a processor"):
            apoq.use("t", repr)


class TestTypedTasks:
    @pytest.fixture
    def welcome(self, apoq, db) -> AppTask:
        @apoq.task(type="welcome", aliases=["greet"], retry_limit=0)
        def welcome(task: RunningTask, number: int, *, twice: bool = False) -> None:
            assert current_app
            task.session.add(Row(task_id=number * 2 if twice else number))

        return welcome

    def test_a_call_is_added_in_the_current_session(self, context, db, engine, welcome):
        task = welcome.add(3, twice=True)
        assert db.session.get(Task, task.id) is task
        db.session.rollback()
        welcome.add(number=5)
        db.session.commit()

        with engine.connect() as connection:
            assert connection.scalars(sa.select(Task.data)).all() == [{"number": 5}]

    def test_a_call_is_added_in_a_session_that_is_given(self, context, db, engine, welcome):
        with Session(db.engine) as session, session.begin():
            welcome.add(session, 3)
            welcome.add_many(session, [welcome.call(4)])
        welcome.add(db.session, number=5)
        welcome.using(priority=1).add(6)
        welcome.add_many([welcome.call(7), welcome.call(8)])
        db.session.commit()

        assert tasks(engine) == [("welcome", "pending")] * 6

    def test_a_task_is_added_when_another_one_fails(self, context, apoq, db, engine):
        @apoq.task(type="tell")
        def tell(failure: TaskFailure) -> None:
            assert current_app
            assert failure.type == "charge"

        @apoq.task(type="charge", retry_limit=0, on_failure=tell)
        def charge(n: int) -> None:
            raise ConnectionError

        assert charge.using(expires_in=60).add_many([{"n": 1}]) == 1
        db.session.commit()
        apoq.worker.work()
        apoq.worker.work()

        assert tasks(engine) == [("charge", "failed"), ("tell", "completed")]

    def test_it_runs_in_a_context(self, context, apoq, db, engine, welcome):
        welcome.add(3, twice=True)
        apoq.add("greet", {"number": 7})
        db.session.commit()
        apoq.worker.work()
        apoq.worker.work()

        assert tasks(engine) == [("welcome", "completed"), ("greet", "completed")]
        assert ledger(engine) == [6, 7]

    def test_one_may_come_after_the_worker(self, context, apoq, db, engine):
        worker = apoq.worker

        @apoq.task
        async def late(task: AsyncRunningTask, number: int) -> None:
            task.session.add(Row(task_id=number))

        late.add(7)
        db.session.commit()
        worker.work()

        assert ledger(engine) == [7]

    def test_the_tasks_of_a_queue_that_was_given_run_too(self, extension, engine, url):
        queue = Queue("emails")
        app, apoq = Flask("shop"), Apoq(queue=queue)
        extension.configure(app, url)
        extension.db.init_app(app)
        apoq.init_app(app)

        @queue.task
        def send(task: RunningTask, number: int) -> None:
            task.session.add(Row(task_id=number + len(current_app.name)))

        with app.app_context():
            send.add(extension.db.session, 3)
            extension.db.session.commit()
            apoq.worker.work()
            extension.db.engine.dispose()

        assert ledger(engine) == [7]

    def test_wrong_arguments_are_refused_at_the_call(self, context, welcome):
        with pytest.raises(InvalidTask, match="missing a required argument: 'number'"):
            welcome.add(numer=3)

    def test_a_session_on_another_database_is_refused(self, context, welcome, databases):
        other = sa.create_engine(databases[1])
        with Session(other) as session, pytest.raises(UnsupportedSession, match="APOQ_BIND"):
            welcome.add(session, 3)
        other.dispose()

    def test_a_type_has_one_processor(self, apoq, welcome):
        with pytest.raises(InvalidProcessor, match="the type 'greet' already has a processor"):
            apoq.use("greet", print)

    def test_one_stays_in_the_queue_of_its_application(self, context, apoq, welcome):
        reports = Queue("reports")

        with pytest.raises(InvalidProcessor, match=r"got Queue\('reports'\): define its function on that"):
            welcome.to(reports)

        assert [type_ for type_ in apoq.worker.types if "reports" in type_] == []

    def test_one_may_have_a_schedule(self, context, apoq, db, engine):
        @apoq.task(cron="0 9 * * *", timezone="Europe/Berlin", type="early", aliases=["old"])
        def early(task: RunningTask) -> None:
            task.session.add(Row(task_id=1))

        worker = apoq.worker

        @apoq.task(every=timedelta(hours=1), type="late")
        def late(task: RunningTask) -> None:
            task.session.add(Row(task_id=2))

        with travel(db.session, timedelta(days=1)):
            ran = drain(db.session, worker)

        assert sorted((task.schedule, task.type, task.queue) for task in ran) == [
            ("early", "early", "default"),
            ("late", "late", "default"),
        ]
        assert [its.origin for its in apoq.queue.schedules(db.session)] == ["code", "code"]

    def test_it_is_still_a_function(self, context, apoq):
        @apoq.task
        def double(number: int) -> int:
            return 2 * number

        assert double(4) == 8
        assert double.type == f"{__name__}.{double.__qualname__}"
        assert (double.queue.name, double.queue.schema) == ("default", None)


class TestApplications:
    def test_one_may_work_several_queues(self, extension, engine, url):
        emails = Queue("emails")
        app, apoq = Flask("shop"), Apoq(queues=[emails])
        extension.configure(app, url)
        extension.db.init_app(app)
        apoq.init_app(app)
        apoq.use("t", lambda task: None)

        with app.app_context():
            apoq.add("t")
            emails.add(extension.db.session, "t")
            extension.db.session.commit()
            apoq.worker.work()
            apoq.worker.work()
            extension.db.engine.dispose()

        assert tasks(engine) == [("t", "completed")] * 2

    def test_several_have_settings_of_their_own(self, make_app, apoq, db, engine, empty_url):
        other_engine = sa.create_engine(empty_url)
        with other_engine.begin() as connection:
            connection.exec_driver_sql("CREATE SCHEMA jobs")
        prepare(other_engine, schema="jobs")
        one = make_app()
        other = make_app(url=empty_url, APOQ_SCHEMA="jobs", APOQ_QUEUE="emails", APOQ_CONCURRENCY=2)
        ran = []
        apoq.use("t", lambda task: ran.append((current_app._get_current_object(), task.queue)))

        for app in (one, other):
            with app.app_context():
                apoq.add("t")
                db.session.commit()
                apoq.worker.work()

        assert ran == [(one, "default"), (other, "emails")]
        assert repr(other.extensions["apoq"].worker) == (
            "<Worker of Queue('emails', schema='jobs') concurrency=2>"
        )
        other_engine.dispose()

    def test_one_has_a_worker_once(self, context, apoq):
        assert apoq.worker is apoq.worker

    def test_init_app_is_called_once(self, app, apoq):
        with pytest.raises(RuntimeError, match="the application 'shop' already has an Apoq"):
            apoq.init_app(app)

    def test_another_apoq_says_that_it_is_not_this_applications(self, context):
        with pytest.raises(
            RuntimeError, match="the application 'shop' doesn't have this Apoq: call its init_app"
        ):
            Apoq().add("t")

    def test_adding_wants_an_application_context(self, apoq):
        with pytest.raises(RuntimeError, match="outside of application context"):
            apoq.add("t")


class TestDatabases:
    """With binds, a task has to be where the workers look for it."""

    @pytest.fixture
    def other_url(self, databases) -> sa.URL:
        return databases[1]

    @pytest.fixture
    def other(self, other_url) -> Iterator[sa.Engine]:
        yield from emptied(other_url)

    def test_a_session_on_another_bind_is_refused(self, make_app, extension, apoq, other_url):
        app = make_app(binds={"other": other_url})

        with app.app_context(), extension.session_on("other") as session:
            with pytest.raises(UnsupportedSession, match="APOQ_BIND") as caught:
                apoq.add("t", session=session)
            with pytest.raises(UnsupportedSession):
                apoq.add("t", session=session.connection())

        assert other_url.database in str(caught.value)
        assert "password" not in str(caught.value)

    def test_a_session_on_another_database_is_refused(self, context, apoq, other):
        with Session(other) as session, pytest.raises(UnsupportedSession, match="APOQ_BIND"):
            apoq.add("t", session=session)

    def test_another_engine_to_the_same_database_is_not(self, context, apoq, engine):
        with Session(engine) as session, session.begin():
            apoq.add("t", session=session)

        assert tasks(engine) == [("t", "pending")]

    def test_the_tasks_may_be_in_a_bind(self, make_app, apoq, db, engine, other, other_url):
        app = make_app(binds={"jobs": other_url}, APOQ_BIND="jobs")
        apoq.use("t", lambda task: None)

        with app.app_context():
            apoq.add("t")
            apoq.add("rolled back", session=db.session)
            db.session.rollback()
            apoq.add("t", session=db.session)
            db.session.commit()
            apoq.worker.work()

        assert (tasks(other), tasks(engine)) == ([("t", "completed")], [])

    def test_a_bind_that_is_not_there_is_named(self, make_app, apoq, other_url):
        app = make_app(binds={"other": other_url}, APOQ_BIND="jobs")

        with (
            app.app_context(),
            pytest.raises(ApoqError, match=r"APOQ_BIND must be one of .*'other'\), got 'jobs'"),
        ):
            apoq.add("t")
        del app.config["APOQ_BIND"]
        probe.forget_bind(app)  # for the clean-up

    def test_lite_may_bind_the_task_itself(self, apoq, url, engine, other, other_url):
        db = flask_sqlalchemy_lite.SQLAlchemy(session_options={"binds": {Task: "jobs"}})
        app = Flask("shop")
        app.config["SQLALCHEMY_ENGINES"] = {"default": url, "jobs": other_url}
        db.init_app(app)
        apoq.init_app(app)
        apoq.use("t", lambda task: None)

        with app.app_context():
            apoq.add("t")
            db.session.commit()
            apoq.worker.work()
            for known in db.engines.values():
                known.dispose()

        assert (tasks(other), tasks(engine)) == ([("t", "completed")], [])


class TestAnApplicationsOwnSession:
    @pytest.fixture
    def sessions(self, engine) -> Iterator[scoped_session[Session]]:
        sessions = scoped_session(sessionmaker(engine))
        yield sessions
        sessions.remove()

    def test_it_is_joined(self, sessions, engine):
        app, apoq = Flask("shop"), Apoq(session=sessions)
        apoq.init_app(app)
        app.teardown_appcontext(lambda _error: sessions.remove())
        apoq.use("t", lambda task: sessions.execute(sa.text("SELECT 1")))

        with app.app_context():
            apoq.add("t")
            sessions.commit()
            apoq.worker.work()

        assert tasks(engine) == [("t", "completed")]

    def test_a_function_may_answer_it(self, engine):
        app = Flask("shop")
        apoq = Apoq(app, session=lambda: g.session)

        def enter() -> None:
            g.session = Session(engine)

        # The engine is looked for in a context, too.
        flask.appcontext_pushed.connect(lambda *_args, **_options: enter(), app, weak=False)
        app.teardown_appcontext(lambda _error: g.session.close())
        with app.app_context():
            apoq.add("t")
            g.session.commit()

        assert tasks(engine) == [("t", "pending")]

    def test_an_asyncio_session_is_awaited(self, engine):
        app = Flask("shop")
        db = flask_sqlalchemy_lite.SQLAlchemy()
        app.config["SQLALCHEMY_ASYNC_ENGINES"] = {"default": engine.url}
        db.init_app(app)
        apoq = Apoq(app)
        apoq.use("t", lambda task: task.session.execute(sa.text("SELECT 1")))

        @app.post("/")
        async def post() -> str:
            session = db.async_session
            assert isinstance(session, AsyncSession)
            await apoq.add("t", session=session)
            await apoq.add_many("t", [1], session=session)
            await session.commit()
            await session.close()
            await db.async_engine.dispose()
            return "done"

        assert app.test_client().post("/").text == "done"
        with app.app_context():
            apoq.worker.work()
        assert tasks(engine) == [("t", "completed"), ("t", "pending")]

    def test_a_factory_of_sessions_is_refused(self, engine):
        with pytest.raises(TypeError, match="which the request commits, got a sessionmaker"):
            Apoq(session=sessionmaker(engine))

    def test_a_single_session_is_refused(self, session):
        with pytest.raises(TypeError, match=r"must be a scoped_session or a function .*, got a Session"):
            Apoq(session=session)

    def test_without_any_it_says_what_to_do(self):
        app = Flask("shop")
        apoq = Apoq(app)

        with (
            app.app_context(),
            pytest.raises(ApoqError, match="must have Flask-SQLAlchemy or Flask-SQLAlchemy-Lite: call"),
        ):
            apoq.add("t")


class TestSettings:
    def read(self, apoq: Apoq | None = None, **settings: Any) -> Any:
        app = Flask("shop")
        app.config.update(settings)
        (apoq or Apoq()).init_app(app)
        return app.extensions["apoq"]

    def test_durations_may_be_in_seconds(self):
        settings = self.read(APOQ_LEASE=3, APOQ_KEEP_FAILED=None, APOQ_KEEP_COMPLETED=timedelta(1)).settings

        assert settings.worker == {
            "lease": timedelta(seconds=3),
            "keep_failed": None,
            "keep_completed": timedelta(days=1),
        }

    def test_the_environment_may_say_them(self, monkeypatch):
        monkeypatch.setenv("FLASK_APOQ_CONCURRENCY", "8")
        monkeypatch.setenv("FLASK_APOQ_IN_PROCESS_WORKER", "true")
        app = Flask("shop")
        app.config.from_prefixed_env()
        Apoq(app)

        settings = app.extensions["apoq"].settings
        assert (settings.worker, settings.in_process_worker) == ({"concurrency": 8}, True)

    def test_what_is_no_duration_is_named(self):
        with pytest.raises(
            TypeError, match="APOQ_LEASE must be a number of seconds or a timedelta, got '3 s'"
        ):
            self.read(APOQ_LEASE="3 s")

    @pytest.mark.parametrize(
        ("name", "value", "error", "says"),
        [
            ("CONCURRENCY", "8", ValueError, "must be a number of tasks, 1 or more, got '8'"),
            ("CONCURRENCY", 0, ValueError, "must be a number of tasks, 1 or more, got 0"),
            ("POLL_INTERVAL", 0, ValueError, "must be positive, got 0"),
            ("LEASE", None, TypeError, "must be a number of seconds or a timedelta, got None"),
            ("LISTEN_URL", "user:secret@host", ValueError, ": the database's URL can't be read"),
            ("LISTEN_URL", "mysql://host/shop", TypeError, ": the database must be PostgreSQL"),
            ("LISTEN_URL", 5432, TypeError, ": a database's URL must be a str"),
        ],
    )
    def test_a_wrong_one_is_named(self, name, value, error, says):
        with pytest.raises(error, match=re.escape(says)) as raised:
            self.read(**{f"APOQ_{name}": value})

        assert str(raised.value).startswith(f"APOQ_{name}")
        assert "secret" not in str(raised.value)

    def test_the_in_process_worker_is_a_question_of_yes_or_no(self):
        with pytest.raises(TypeError, match="APOQ_IN_PROCESS_WORKER must be True or False, got 'yes'"):
            self.read(APOQ_IN_PROCESS_WORKER="yes")

    def test_a_queue_is_named_or_given(self):
        emails = Queue("emails", schema="jobs")

        assert self.read(Apoq(queue=emails)).queue is emails
        assert self.read(APOQ_QUEUE="emails").queue == Queue("emails")
        with pytest.raises(ValueError, match=r"and also APOQ_QUEUE or APOQ_SCHEMA"):
            self.read(Apoq(queue=emails), APOQ_QUEUE="other")

    def test_a_queue_is_a_queue(self):
        with pytest.raises(
            TypeError, match=r"a queue must be a Queue, such as Queue\('emails'\), got 'emails'"
        ):
            Apoq(queue="emails")
        with pytest.raises(TypeError, match="got 'e'"):
            Apoq(queues="emails")


class TestCommands:
    """``flask apoq``, in the application's command line."""

    def run(self, app: Flask, *arguments: str) -> Any:
        return app.test_cli_runner().invoke(args=["apoq", *arguments])

    def test_they_are_those_of_apoq(self, app):
        result = self.run(app, "--help")

        assert result.exit_code == 0
        assert {"worker", "migrate", "revision", "check"} <= set(result.output.split())

    def test_they_work_on_the_applications_database_and_in_its_schema(self, make_app, empty_url):
        engine = sa.create_engine(empty_url)
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE SCHEMA jobs")
        app = make_app(url=empty_url, APOQ_SCHEMA="jobs")

        result = self.run(app, "migrate")

        assert result.exit_code == 0, result.output
        assert sa.inspect(engine).has_table("apoq_tasks", schema="jobs")
        engine.dispose()

    def test_they_work_on_the_bind_of_the_tasks(self, make_app, url, empty_url):
        app = make_app(binds={"jobs": empty_url}, APOQ_BIND="jobs")

        assert self.run(app, "check").exit_code == 4
        assert self.run(app, "migrate").exit_code == 0
        assert self.run(app, "check").exit_code == 0

    def test_an_application_with_asyncio_engines_only_has_them(self, url):
        db = flask_sqlalchemy_lite.SQLAlchemy()
        app = Flask("shop")
        app.config["SQLALCHEMY_ASYNC_ENGINES"] = {"default": url}
        db.init_app(app)
        Apoq(app)

        result = self.run(app, "check")

        assert result.exit_code == 0, result.output

    def test_without_a_database_they_say_what_to_do(self):
        app = Flask("shop")
        Apoq(app)

        result = self.run(app, "check")

        assert result.exit_code == 1
        assert "must have Flask-SQLAlchemy or Flask-SQLAlchemy-Lite: call" in result.output

    @pytest.mark.parametrize("command", ["check", "worker"])
    def test_a_session_that_needs_a_request_is_named(self, command):
        app = Flask("shop")
        Apoq(app, session=lambda: g.session)

        result = self.run(app, command)

        assert result.exit_code == 1
        assert "must return a session without a request, too" in result.output
        assert "AttributeError: session: pass a scoped_session" in result.output

    @pytest.mark.parametrize("command", ["check", "worker"])
    def test_on_another_database_than_postgresql_they_say_so(self, command):
        app = Flask("shop")
        app.config["SQLALCHEMY_ENGINES"] = {"default": "sqlite://"}
        flask_sqlalchemy_lite.SQLAlchemy(app)
        Apoq(app)

        result = self.run(app, command)

        assert result.exit_code == 2
        assert "must be PostgreSQL through psycopg 3" in result.output

    def test_an_unmigrated_database_is_named_with_the_cure(self, make_app, apoq, empty_url):
        apoq.use("t", print)

        result = self.run(make_app(url=empty_url), "worker")

        assert result.exit_code == 4
        assert "apoq's tables are missing" in result.output


def test_its_documentation_runs(empty_url, monkeypatch, capsys, run_page):
    monkeypatch.setenv("DATABASE_URL", empty_url.render_as_string(hide_password=False))

    namespace = run_page("flask.md", "app")

    assert capsys.readouterr().out == "📧 welcome, ada@example.org\n"
    with namespace["app"].app_context():
        namespace["db"].engine.dispose()


def test_its_first_example_serves_a_request_after_the_commands_below_it(tmp_path, empty_url, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", empty_url.render_as_string(hide_password=False))
    page = pages.DOCS / "flask.md"
    (tmp_path / "app.py").write_text(next(pages.blocks(page, "python")).code, encoding="utf-8")
    commands = next(block.code for block in pages.blocks(page, "sh") if "flask run" in block.code)
    flask = f"{shlex.quote(sys.executable)} -m flask"
    for line in commands.splitlines()[1:]:
        if "flask run" in line:
            break
        command = re.sub(r"\bflask\b(?= (apoq|shell))", flask, line)
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)

    program = (
        "import app; app = app.create_app(); app.testing = True;"
        "print(app.test_client().post('/sign-up', data={'email': 'ada@example.org'}).text)"
    )
    serve = [sys.executable, "-W", "ignore", "-c", program]
    ran = subprocess.run(serve, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert ran.stdout == "Welcome!\n", ran.stderr


class TestItsTests:
    """The usual set-ups of an application's own tests."""

    def test_flask_sqlalchemys_rolled_back_transaction(self, apoq, engine, url):
        db = flask_sqlalchemy.SQLAlchemy(model_class=Base)
        app = Flask("shop")
        app.config["SQLALCHEMY_DATABASE_URI"] = url
        db.init_app(app)
        apoq.init_app(app)

        @app.post("/")
        def post() -> str:
            note.add(7)
            db.session.commit()
            return str(db.session.scalar(sa.select(sa.func.count(Task.id))))

        @apoq.task
        def note(task: RunningTask, number: int) -> None:
            task.session.add(Row(task_id=number))
            db.session.add(Row(task_id=number + 1))
            db.session.commit()

        with app.app_context():
            own = db.engine
            connection = own.connect()
            transaction = connection.begin()
            db.engines[None] = connection  # as its documentation advises
            assert app.test_client().post("/").text == "1"
            assert_enqueued(db.session, note, number=7)
            drain(db.session, apoq.worker)
            assert set(db.session.scalars(sa.select(Row.task_id))) == {7, 8}
            transaction.rollback()
            connection.close()
            db.engines[None] = own
            own.dispose()

        assert (tasks(engine), ledger(engine)) == ([], [])

    @pytest.mark.skipif(
        not sa.__version__.startswith("2.0."), reason="Lite 0.2.1's own isolation recurses on SQLAlchemy 2.1"
    )
    def test_lites_isolation(self, apoq, engine, url):
        db = flask_sqlalchemy_lite.SQLAlchemy()
        app = Flask("shop")
        app.config["SQLALCHEMY_ENGINES"] = {"default": url}
        db.init_app(app)
        apoq.init_app(app)

        @app.post("/")
        def post() -> str:
            apoq.add("t")
            db.session.commit()
            return str(db.session.scalar(sa.select(sa.func.count(Task.id))))

        with app.app_context():
            with db.test_isolation():
                assert app.test_client().post("/").text == "1"
            db.engine.dispose()

        assert tasks(engine) == []


def test_the_context_of_a_coroutine_ends_although_no_thread_can_be_started(monkeypatch):
    app, ended = Flask("shop"), []
    app.teardown_appcontext(ended.append)

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def process() -> None:
        with context_for(app, AsyncRunningTask.__new__(AsyncRunningTask)):
            assert current_app == app
            monkeypatch.setattr(threading.Thread, "start", refuse)

    asyncio.run(process())

    assert ended == [None]


def test_a_typed_task_has_a_limit_of_each_key(app, apoq, context, db):
    @apoq.task(type="charge", limit=Limit(1, key=lambda account_id: account_id))
    def charge(account_id: int) -> None: ...

    assert charge.add(account_id=7).key == "7"
    db.session.commit()
    assert apoq.worker.work().type == "charge"
    (limit,) = apoq.worker.queues[0].limits(db.session)
    assert (limit.type, limit.at_most, limit.is_of_key) == ("charge", 1, True)


def test_a_call_in_a_group_has_the_key_of_its_limit(app, apoq, context, db):
    @apoq.task(type="charge", limit=Limit(1, key=lambda account_id: account_id))
    def charge(account_id: int) -> None: ...

    with apoq.queue.group(db.session) as group:
        group.add(charge.call(7))
        group.add_many([charge.call(8)])
        group.then(charge.call(9))

    assert db.session.scalars(sa.select(Task.key).order_by(Task.id)).all() == ["9", "7", "8"]


def test_a_call_in_a_chain_has_the_key_of_its_limit(app, apoq, context, db):
    @apoq.task(type="charge", limit=Limit(1, key=lambda account_id: account_id))
    def charge(account_id: int) -> None: ...

    charged = apoq.queue.chain(db.session, charge.call(7), charge.using(key="mine").call(8))

    assert [task.key for task in charged] == ["7", "mine"]
