"""apoq.testing in the test set-up of Pyramid's cookiecutter: WebTest, pyramid_tm, one doomed transaction."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
import transaction
import zope.sqlalchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from webtest import TestApp

from apoq import Queue, Task, Worker
from apoq.testing import assert_enqueued, drain, enqueued, rolled_back

queue = Queue()


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "pyramid_users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    is_welcome: Mapped[bool] = mapped_column(default=False)


def get_tm_session(factory, tm) -> Session:
    """Make a request's session, as the cookiecutter's models do."""
    session = factory()
    zope.sqlalchemy.register(session, transaction_manager=tm)
    return session


def sign_up(request):
    user = User(email=request.params["email"])
    request.dbsession.add(user)
    request.dbsession.flush()
    queue.add(request.dbsession, "send_welcome", {"user_id": user.id})
    if "fail" in request.params:
        raise RuntimeError
    return {"id": user.id}


def ping(request):
    queue.add(request.dbsession, "ping")
    return {}


def make_app(engine, processor=None):
    from pyramid.config import Configurator

    with Configurator(settings={"tm.manager_hook": "pyramid_tm.explicit_manager"}) as config:
        config.include("pyramid_tm")
        factory = sessionmaker(engine)
        config.registry["dbsession_factory"] = factory

        def dbsession(request):
            given = request.environ.get("app.dbsession")
            return given if given is not None else get_tm_session(factory, request.tm)

        config.add_request_method(dbsession, "dbsession", reify=True)
        config.add_route("sign_up", "/sign-up")
        config.add_view(sign_up, route_name="sign_up", renderer="json")
        config.add_route("ping", "/ping")
        config.add_view(ping, route_name="ping", renderer="json")
        if processor is not None:
            config.include("apoq.pyramid")
            config.add_apoq_task(processor, "send_welcome")
        return config.make_wsgi_app()


@pytest.fixture(scope="module")
def app(shared_engine):
    Base.metadata.create_all(shared_engine)
    yield make_app(shared_engine)
    Base.metadata.drop_all(shared_engine)


@pytest.fixture
def dbsession(app, shared_engine) -> Iterator[Session]:
    """As docs/testing.md has it."""
    factory = app.registry["dbsession_factory"]
    with rolled_back(shared_engine) as session:
        factory.configure(bind=session.connection(), join_transaction_mode="create_savepoint")
        yield session
        factory.configure(bind=shared_engine, join_transaction_mode="conditional_savepoint")


class TestRequestsWithTransactionsOfTheirOwn:
    def test_a_request_has_added_the_task_and_it_runs(self, app, dbsession, worker):
        user_id = TestApp(app).post("/sign-up", {"email": "ann@example.com"}).json["id"]

        assert_enqueued(dbsession, "send_welcome", user_id=user_id)
        drain(dbsession, worker)
        assert dbsession.get(User, user_id).is_welcome

    def test_a_request_that_raises_adds_nothing(self, app, dbsession):
        TestApp(app).post("/sign-up", {"email": "ann@example.com"})
        with pytest.raises(RuntimeError):
            TestApp(app).post("/sign-up", {"email": "bob@example.com", "fail": "1"})

        assert len(enqueued(dbsession)) == 1
        assert dbsession.scalars(sa.select(User.email)).all() == ["ann@example.com"]

    def test_nothing_is_committed(self, app, dbsession, worker, shared_engine):
        TestApp(app).post("/sign-up", {"email": "ann@example.com"})
        drain(dbsession, worker)

        with Session(shared_engine) as other:
            assert not other.scalars(sa.select(User)).all()
            assert not other.scalars(sa.select(Task)).all()

    def test_processors_have_requests_of_their_own(self, shared_engine, app):
        apoq_pyramid = pytest.importorskip("apoq.pyramid")

        def send_welcome(task, request):
            request.dbsession.get(User, task.data["user_id"]).is_welcome = True
            if request.dbsession.get(User, task.data["user_id"]).email == "bob@example.com":
                raise RuntimeError("no mail for Bob")

        app = make_app(shared_engine, send_welcome)
        factory = app.registry["dbsession_factory"]
        with rolled_back(shared_engine) as session:
            factory.configure(bind=session.connection(), join_transaction_mode="create_savepoint")
            ids = [
                TestApp(app).post("/sign-up", {"email": email}).json["id"]
                for email in ("ann@example.com", "bob@example.com")
            ]

            done = drain(session, apoq_pyramid.make_worker(app.registry), errors="record")

            assert [task.state for task in done] == ["completed", "pending"]
            assert [session.get(User, id_).is_welcome for id_ in ids] == [True, False]


@pytest.fixture
def tm() -> Iterator[transaction.TransactionManager]:
    tm = transaction.TransactionManager(explicit=True)
    tm.begin()
    tm.doom()
    yield tm
    tm.abort()


@pytest.fixture
def site(app, tm) -> SimpleNamespace:
    dbsession = get_tm_session(app.registry["dbsession_factory"], tm)
    environ = {"tm.active": True, "tm.manager": tm, "app.dbsession": dbsession}
    return SimpleNamespace(testapp=TestApp(app, extra_environ=environ), dbsession=dbsession)


@pytest.fixture
def worker(shared_engine) -> Worker:
    def send_welcome(task):
        task.session.get(User, task.data["user_id"]).is_welcome = True

    worker = Worker(shared_engine)
    worker.use("send_welcome", send_welcome)
    worker.use("ping", lambda task: None)
    return worker


def test_a_request_has_added_the_task(site):
    user_id = site.testapp.post("/sign-up", {"email": "ann@example.com"}).json["id"]

    assert_enqueued(site.dbsession, "send_welcome", user_id=user_id)


def test_the_task_of_a_request_runs(site, worker):
    user_id = site.testapp.post("/sign-up", {"email": "ann@example.com"}).json["id"]
    user = site.dbsession.get(User, user_id)

    (task,) = drain(site.dbsession, worker)

    assert task.state == "completed"
    assert user.is_welcome


def test_the_task_of_an_otherwise_read_only_request_runs(site, worker):
    site.testapp.get("/ping")

    assert [task.type for task in drain(site.dbsession, worker)] == ["ping"]
    assert not enqueued(site.dbsession)


def test_nothing_is_committed(site, worker, shared_engine):
    site.testapp.post("/sign-up", {"email": "ann@example.com"})
    drain(site.dbsession, worker)

    with Session(shared_engine) as other:
        assert not other.scalars(sa.select(User)).all()
        assert not other.scalars(sa.select(Task)).all()


def test_a_task_with_a_request_of_its_own_runs_in_the_test_s_transaction(shared_engine, app, tm):
    apoq_pyramid = pytest.importorskip("apoq.pyramid")

    def send_welcome(task, request):
        request.dbsession.get(User, task.data["user_id"]).is_welcome = True

    app = make_app(shared_engine, send_welcome)
    dbsession = get_tm_session(app.registry["dbsession_factory"], tm)
    environ = {"tm.active": True, "tm.manager": tm, "app.dbsession": dbsession}
    user_id = TestApp(app, extra_environ=environ).post("/sign-up", {"email": "ann@example.com"}).json["id"]

    drain(dbsession, apoq_pyramid.make_worker(app.registry))

    assert dbsession.get(User, user_id).is_welcome
