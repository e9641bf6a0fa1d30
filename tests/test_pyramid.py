"""apoq in Pyramid applications."""

from __future__ import annotations

import threading

import pyramid_site
import pytest
import sqlalchemy as sa
from pyramid import testing
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationConflictError, ConfigurationError
from pyramid.request import apply_request_extensions
from pyramid.response import Response
from pyramid.scripting import prepare
from pyramid.threadlocal import get_current_request
from pyramid_site import Base, Note
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from transaction import TransactionManager
from webtest import TestApp
from zope.sqlalchemy import register

from apoq import Queue, Task, Worker
from apoq.pyramid import Misconfigured, apoq_task, make_worker


@pytest.fixture(scope="module")
def database(template, create_database, drop_database):
    """A database for all of these tests, which leave nothing in it."""
    url = create_database(template.database)
    engine = sa.create_engine(url)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()
    drop_database(url)


@pytest.fixture
def engine(database):
    yield database
    with database.begin() as connection:
        connection.execute(sa.delete(Note))
        connection.execute(sa.delete(Task))


@pytest.fixture
def settings(engine):
    return {"sqlalchemy.url": engine.url.render_as_string(hide_password=False)}


@pytest.fixture
def make_site(settings):
    """Make applications, whose engines are disposed of at the end."""
    made = []

    def make(**more):
        made.append(pyramid_site.main({}, **settings, **more))
        return made[-1]

    yield make
    for site in made:
        site.registry["dbsession_factory"].kw["bind"].dispose()


@pytest.fixture
def site(make_site):
    return make_site()


@pytest.fixture
def browser(site):
    return TestApp(site)


@pytest.fixture
def worker(site) -> Worker:
    return make_worker(site.registry)


@pytest.fixture
def tasks(engine):
    def read() -> list[tuple[str, str]]:
        with Session(engine) as session:
            return [tuple(row) for row in session.execute(sa.select(Task.type, Task.state).order_by(Task.id))]

    return read


@pytest.fixture
def notes(engine):
    def read() -> list[str]:
        with Session(engine) as session:
            return list(session.scalars(sa.select(Note.text).order_by(Note.id)))

    return read


class TestAdding:
    def test_the_task_of_an_otherwise_read_only_request_is_committed(self, browser, tasks):
        browser.get("/add")

        assert tasks() == [("note", "pending")]

    def test_many_are_too(self, browser, tasks):
        assert browser.get("/add_many").text == "1500"

        assert len(tasks()) == 1_500

    def test_a_request_that_raises_leaves_none(self, browser, tasks):
        with pytest.raises(ValueError, match="after it was added"):
            browser.get("/add_and_raise")

        assert tasks() == []

    def test_a_request_that_is_refused_leaves_none(self, browser, tasks):
        browser.get("/add_and_refuse", status=400)

        assert tasks() == []

    def test_what_is_undone_to_a_savepoint_is_not_there(self, browser, tasks):
        browser.get("/add_in_savepoint")

        assert tasks() == [("note", "pending")]

    def test_what_is_cancelled_or_run_once_more_is_so_with_the_commit(self, browser, tasks):
        task_id = browser.get("/add").text

        assert browser.get("/cancel", {"id": task_id}).text == "True"
        assert tasks() == [("note", "cancelled")]
        assert browser.get("/retry", {"id": task_id}).text == "True"
        assert tasks() == [("note", "pending")]
        assert browser.get("/retry", {"id": "0"}).text == "False"

    def test_a_request_that_is_tried_again_leaves_one(self, browser, tasks):
        browser.get("/add_on_the_third_attempt")

        assert tasks() == [("note", "pending")]


class TestProcessing:
    @pytest.fixture
    def process(self, browser, worker, tasks, notes):
        """Add a task of this type by a request, and work it; answer its state and the notes."""

        def process(type: str):
            browser.get("/add", {"type": type, "text": "noted"})
            assert worker.work() is not None
            return tasks()[0][1], notes()

        return process

    def test_what_its_session_writes_commits(self, process):
        assert process("note") == ("completed", ["noted"])

    def test_where_it_raises_nothing_does(self, process):
        assert process("note and raise") == ("failed", [])

    def test_where_it_gives_the_task_back_nothing_does(self, process):
        assert process("note and snooze") == ("pending", [])

    def test_where_it_dooms_its_transaction_nothing_does(self, process):
        assert process("note and doom") == ("completed", [])

    def test_where_the_database_refuses_a_flush_at_its_end_nothing_does(self, process, engine):
        assert process("note twice") == ("failed", [])

        with Session(engine) as session:
            assert session.scalars(sa.select(Task)).one().error["class"] == "IntegrityError"

    def test_what_it_commits_half_way_does_with_the_completion_only(self, process):
        assert process("commit and raise") == ("failed", [])

    def test_where_the_task_was_taken_from_the_worker_nothing_does(self, browser, worker, notes):
        browser.get("/add", {"type": "be lost", "text": "noted"})

        worker.work()

        assert notes() == []

    def test_a_task_that_it_adds_is_there_with_the_completion(self, process, tasks):
        assert process("note and add") == ("completed", ["noted"])
        assert tasks() == [("note and add", "completed"), ("note", "pending")]

    def test_one_that_does_not_use_the_session_holds_no_connection(self, process):
        assert process("look at the pool") == ("completed", [])

    def test_its_request_is_the_current_one_and_is_finished(self, process, engine):
        pyramid_site.FINISHED.clear()

        assert process("note the request") == ("completed", ["http://localhost/add"])

        with Session(engine) as session:
            assert [session.scalars(sa.select(Task.id)).one()] == pyramid_site.FINISHED

    def test_its_request_makes_the_urls_of_the_site(self, make_site, notes):
        site = make_site(**{"apoq.base_url": "https://example.com/shop/"})
        TestApp(site).get("/add", {"type": "note the request"})

        make_worker(site.registry).work()

        assert notes() == ["https://example.com/shop/add"]

    def test_the_transaction_manager_may_be_the_threads_own(self, make_site, notes):
        site = make_site(**{"tm.manager_hook": None})
        TestApp(site).get("/add", {"text": "noted"})

        make_worker(site.registry).work()

        assert notes() == ["noted"]

    def test_a_task_that_a_processor_adds_wakes_the_workers(self, make_site, browser, notes):
        site = make_site(**{"apoq.poll_interval": "1 h"})
        worker, ended = make_worker(site.registry), threading.Semaphore(0)
        worker.events.on("task.completed", lambda task: ended.release())
        worker.start()
        try:
            TestApp(site).get("/add", {"type": "note and add", "text": "one"})
            for _ in range(2):
                assert ended.acquire(timeout=10)
        finally:
            worker.stop()

        assert notes() == ["one", "by another task"]


class Mailer:
    """A data manager such as pyramid_mailer's: its mail is sent when the transaction has been voted for."""

    def __init__(self, sent: list[str], transaction_manager) -> None:
        self.sent = sent
        self.transaction_manager = transaction_manager
        self.said: list[str] = []

    def sortKey(self):  # noqa: N802
        return "mailer"

    def _note(self, *_):
        pass

    abort = tpc_begin = commit = tpc_vote = tpc_abort = _note

    def tpc_finish(self, _transaction):
        self.sent.append("a mail")


class TestOtherResources:
    @pytest.fixture
    def work(self, settings, engine):
        """Process a task which has a mail sent, and answer those that were."""

        def work(finish) -> list[str]:
            sent: list[str] = []

            def send(task, request):
                request.tm.get().join(Mailer(sent, request.tm))
                request.dbsession.add(Note(text="noted"))
                finish(request)

            with Configurator(
                settings=settings | {"tm.manager_hook": "pyramid_tm.explicit_manager"}
            ) as config:
                pyramid_site.add_session(config)
                config.include("apoq.pyramid")
                config.add_apoq_task(send, "send", retry_limit=0)
            with Session(engine) as session, session.begin():
                Queue().add(session, "send")
            make_worker(config.registry).work()
            config.registry["dbsession_factory"].kw["bind"].dispose()
            return sent

        return work

    def test_what_joins_the_transaction_takes_place_with_it(self, work, notes):
        assert work(lambda request: None) == ["a mail"]
        assert notes() == ["noted"]

    def test_what_joins_the_transaction_does_not_take_place_if_the_processor_raises(self, work, notes):
        assert work(lambda request: 1 / 0) == []
        assert notes() == []

    def test_what_joins_the_transaction_does_not_take_place_if_the_last_flush_is_refused(self, work, notes):
        twice = [Note(id=1, text="once"), Note(id=1, text="twice")]

        assert work(lambda request: request.dbsession.add_all(twice)) == []
        assert notes() == []


class TestOtherSessions:
    """Applications that differ from the cookiecutter's."""

    @pytest.fixture
    def work(self, settings, engine):
        def work(include, **more) -> str:
            with Configurator(settings=settings | more) as config:
                config.include(include)
                config.include("apoq.pyramid")
                config.scan(pyramid_site)
            with Session(engine) as session, session.begin():
                Queue().add(session, "note", {"text": "noted"})
            return make_worker(config.registry).work().state

        return work

    def test_a_session_without_a_transaction_manager(self, work, engine, notes):
        def include(config):
            config.add_request_method(lambda request: Session(engine), "dbsession", reify=True)

        assert (work(include), notes()) == ("completed", ["noted"])

    def test_a_scoped_session_is_removed(self, work, engine, notes):
        scoped = scoped_session(sessionmaker(engine))

        def include(config):
            config.add_request_method(lambda request: scoped, "dbsession", reify=True)

        assert (work(include), notes()) == ("completed", ["noted"])
        assert not scoped.registry.has()

    def test_a_session_of_several_binds(self, work, engine, notes):
        def include(config):
            binds = {Note: engine, Task: engine}
            config.add_request_method(lambda request: Session(binds=binds), "dbsession", reify=True)

        assert (work(include), notes()) == ("completed", ["noted"])

    def test_an_attribute_of_another_name(self, work, engine, notes):
        def include(config):
            config.add_request_method(lambda request: Session(engine), "db", reify=True)
            config.add_request_method(lambda request: request.db, "dbsession", property=True)

        assert (work(include, **{"apoq.session": "db"}), notes()) == ("completed", ["noted"])

    def test_none(self, work):
        with pytest.raises(Misconfigured, match="must have an attribute `dbsession` that is a SQLAlchemy"):
            work(lambda config: None)

    def test_one_that_does_not_know_apoqs_tables(self, work, engine):
        def include(config):
            config.add_request_method(lambda request: Session(binds={Note: engine}), "dbsession", reify=True)

        with pytest.raises(Misconfigured, match=r"`request.dbsession` .* add `Task` to its binds"):
            work(include)


def process(task, request):
    """Process nothing."""


def another(task, request):
    """Process nothing, either."""


async def coroutine(task, request):
    pass


def generator(task, request):
    yield


def introspected(config):
    found = config.introspector.get_category("apoq tasks")
    return {each["introspectable"].discriminator: each["introspectable"] for each in found}


@pytest.fixture
def config():
    config = Configurator()
    config.include("apoq.pyramid")
    return config


class TestConfiguration:
    def test_two_processors_of_a_type_are_a_conflict_that_names_both_places(self, config):
        config.add_apoq_task(process, "t")
        config.add_apoq_task(another, "t")

        with pytest.raises(ConfigurationConflictError) as raised:
            config.commit()
        assert str(raised.value).count("test_pyramid.py") == 2
        assert "('apoq tasks', 't')" in str(raised.value)

    def test_a_decorated_one_is_named_by_its_place(self, config):
        config.scan(pyramid_site)
        config.add_apoq_task(process, "note")

        with pytest.raises(ConfigurationConflictError, match=r"(?s)pyramid_site.py.*test_pyramid.py"):
            config.commit()

    def test_an_applications_own_processor_is_used_instead_of_an_included_one(self, config):
        config.include(lambda config: config.add_apoq_task(another, "t"))
        config.add_apoq_task(process, "t")
        config.commit()

        assert introspected(config)["t"]["function"] is process

    def test_a_processor_can_be_introspected(self, config):
        config.add_apoq_task(process, "t", retry_limit=3)
        config.commit()

        assert introspected(config)["t"] == {"type": "t", "function": process, "retry_limit": 3}
        assert introspected(config)["t"].title == f"t: {__name__}.process"

    def test_its_default_type_is_its_dotted_name(self, config):
        config.add_apoq_task("pyramid_site.note")
        config.commit()

        assert list(introspected(config)) == ["pyramid_site.note"]

    @pytest.mark.parametrize(
        ("function", "says"),
        [
            (lambda task: None, r"give it the parameters `\(task, request\)`"),
            ("pyramid_site", "must be one that takes a task and a request, got <module"),
            (coroutine, "must be a plain function, .*Pyramid's requests belong to a thread"),
            (generator, "must not be a generator function, because calling it runs nothing"),
        ],
    )
    def test_a_function_that_can_not_process(self, config, function, says):
        with pytest.raises(Misconfigured, match=says):
            config.add_apoq_task(function, "t")

    @pytest.mark.parametrize(
        ("options", "says"),
        [({"retry_limit": -1}, "retry_limit"), ({"timeout": "soon"}, "timeout"), ({"type": "a\0b"}, "type")],
    )
    def test_options_that_make_no_sense(self, config, options, says):
        with pytest.raises(Misconfigured, match=says):
            config.add_apoq_task(process, **options)

    def test_a_decorator_without_its_parentheses(self):
        with pytest.raises(Misconfigured, match=r"with parentheses: @apoq_task\(\)"):
            apoq_task(process)

    def test_a_scan_before_the_include(self):
        with pytest.raises(Misconfigured, match=r"must be called before config\.scan"):
            Configurator().scan(pyramid_site)

    def test_an_application_without_apoq(self):
        with pytest.raises(Misconfigured, match=r'call config.include\("apoq.pyramid"\)'):
            make_worker(Configurator().registry)


emails = Queue("emails")


@emails.task(retry_limit=0)
def note_typed(text: str):
    get_current_request().dbsession.add(Note(text=text))


class TestTypedTasks:
    def test_are_added_in_the_requests_transaction_and_processed_with_a_request(self, settings, notes, tasks):
        with Configurator(settings=settings | {"apoq.queues": "default emails"}) as config:
            pyramid_site.add_session(config)
            config.include("apoq.pyramid")
            config.add_apoq_queue(emails)
            config.add_route("add", "/")
            config.add_view(
                lambda request: Response(str(note_typed.add(request.dbsession, text="typed").id)),
                route_name="add",
            )
        TestApp(config.make_wsgi_app()).get("/")

        make_worker(config.registry).work()

        assert (notes(), tasks()) == (["typed"], [(f"{__name__}.note_typed", "completed")])
        config.registry["dbsession_factory"].kw["bind"].dispose()

    def test_may_have_a_schedule(self, settings):
        queue = Queue("reports")

        @queue.task(type="report", every=3600)
        def report() -> None: ...

        with Configurator(settings=settings) as config:
            pyramid_site.add_session(config)
            config.include("apoq.pyramid")
            config.add_apoq_queue(queue)

        worker = make_worker(config.registry)

        assert [list(its.scheduled_tasks()) for its in worker.queues if its == queue] == [[report]]
        config.registry["dbsession_factory"].kw["bind"].dispose()

    def test_can_be_introspected(self, config):
        config.add_apoq_queue(emails)
        config.commit()

        (found,) = introspected(config).values()
        assert found == {"type": note_typed.type, "function": note_typed.function, "queue": emails}

    def test_their_queue_is_given_and_not_they(self, config):
        with pytest.raises(Misconfigured, match=r"config\.add_apoq_queue\(queue\)"):
            config.add_apoq_task(note_typed)
        with pytest.raises(Misconfigured, match="must be a Queue, such as"):
            config.add_apoq_queue(note_typed)

    def test_their_queue_may_be_given_twice_and_be_said_in_two_places(self, config):
        another = Queue("emails")
        another.task(type="another")(note_typed.function)
        for queue in (emails, another, emails):
            config.add_apoq_queue(queue)
        config.commit()

        assert len(introspected(config)) == 2

    @pytest.mark.parametrize(
        ("setting", "works"),
        [
            ({}, "Queue('emails', schema='jobs'), Queue('default')"),
            ({"apoq.queues": "emails"}, "Queue('emails', schema='jobs')"),
            ({"apoq.queues": "reports"}, "Queue('reports')"),
        ],
    )
    def test_their_queue_is_worked_unless_others_are_named(self, settings, setting, works):
        with Configurator(settings=settings | setting) as config:
            pyramid_site.add_session(config)
            config.include("apoq.pyramid")
            config.add_apoq_queue(Queue("emails", schema="jobs"))

        assert repr(make_worker(config.registry)) == f"<Worker of {works} concurrency=4>"

    def test_of_coroutines_can_not_be_processed(self, config):
        queue = Queue()
        queue.task(type="t")(coroutine)
        config.add_apoq_queue(queue)

        with pytest.raises(ConfigurationError, match="t must be a plain function"):
            config.commit()

    def test_one_of_a_type_that_has_a_processor_is_refused(self, settings):
        queue = Queue()
        queue.task(type="note")(note_typed.function)
        with Configurator(settings=settings) as config:
            pyramid_site.add_session(config)
            config.include("apoq.pyramid")
            config.add_apoq_queue(queue)
            config.scan(pyramid_site)

        with pytest.raises(Misconfigured, match="the type 'note' has a processor already"):
            make_worker(config.registry)


class TestInTests:
    """What Pyramid's own documentation does, and the cookiecutter's `conftest.py`."""

    def test_an_application_in_a_transaction_that_is_rolled_back(self, site, engine, tasks):
        manager = TransactionManager(explicit=True)
        manager.begin()
        manager.doom()
        with Session(engine) as session:
            register(session, transaction_manager=manager)
            environ = {"tm.active": True, "tm.manager": manager, "app.dbsession": session}

            TestApp(site, extra_environ=environ).get("/add")

            assert session.scalars(sa.select(Task.type)).all() == ["note"]
            manager.abort()
        assert tasks() == []

    def test_a_view_with_a_dummy_request(self, session):
        request = testing.DummyRequest(params={"text": "noted"}, dbsession=session)
        with testing.testConfig(request=request) as config:
            config.include("apoq.pyramid")
            apply_request_extensions(request)

            pyramid_site.add(request)

        assert session.scalars(sa.select(Task.data)).all() == [{"text": "noted"}]

    def test_a_view_with_a_prepared_request(self, site, session):
        with prepare(registry=site.registry) as env:
            env["request"].dbsession = session

            env["request"].apoq.add("note")

        assert session.scalars(sa.select(Task.type)).all() == ["note"]

    def test_a_processor_with_a_dummy_request(self, session):
        task = Queue().add(session, "note", {"text": "noted"})

        pyramid_site.note(task, testing.DummyRequest(dbsession=session))

        assert [each.text for each in session.new] == ["noted"]


def test_what_the_documentation_shows_runs(url, monkeypatch, capsys, run_page):
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))

    namespace = run_page("pyramid.md", "pyramid_page")

    TestApp(namespace["app"]).get("/sign-up", {"name": "Ada"})
    task = namespace["worker"].work()
    namespace["registry"]["dbsession_factory"].kw["bind"].dispose()

    assert task.state == "completed"
    assert capsys.readouterr().out == (
        "send_welcome: pyramid_page.send_welcome\n📧 Welcome, Ada! http://localhost/sign-up\n"
    )
