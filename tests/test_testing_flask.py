"""apoq.testing in the usual test set-ups of Flask: with Flask-SQLAlchemy, and with Flask-SQLAlchemy-Lite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import flask_sqlalchemy
import flask_sqlalchemy_lite
import pytest
import sqlalchemy as sa
from flask import Flask, current_app, request
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from apoq import ApoqError, Queue, Retry, Task, UnsupportedSession, Worker
from apoq.flask.testing import rolled_back
from apoq.testing import assert_enqueued, drain, enqueued, travel

queue = Queue()


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "flask_users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    is_welcome: Mapped[bool] = mapped_column(default=False)


def make_app(db, url: sa.URL, audit_url: sa.URL) -> Flask:
    """An application as many are, which knows nothing of tests."""
    app = Flask("shop")
    app.testing = True
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_BINDS"] = {"audit": audit_url, "same": url}
    app.config["SQLALCHEMY_ENGINES"] = {"default": url, "audit": audit_url, "same": url}
    app.config["PROPAGATE_EXCEPTIONS"] = False
    db.init_app(app)

    @app.post("/sign-up")
    def sign_up():
        user = User(email=request.form["email"])
        db.session.add(user)
        db.session.flush()
        queue.add(db.session, "send_welcome", {"user_id": user.id})
        if "audit" in request.form:
            audit = db.session.connection(bind_arguments={"bind": db.engines["audit"]})
            queue.add(audit, "audit")
        if "fail" in request.form:
            db.session.rollback()
            return "sorry", 500
        if "raise" in request.form:
            raise RuntimeError
        if "forget" in request.form:
            return "not committed"
        db.session.commit()
        return "welcome"

    return app


def send_welcome(task) -> None:
    # The context's own session, as in a view, in an application that hasn't heard of task.session.
    db = current_app.extensions["db"]
    user = db.session.get(User, task.data["user_id"])
    user.is_welcome = True
    db.session.commit()
    if user.email == "full@example.com":
        raise Retry("the mailbox is full", delay=60)


@pytest.fixture(scope="module")
def tables(shared_engine) -> Iterator[None]:
    Base.metadata.create_all(shared_engine)
    yield
    Base.metadata.drop_all(shared_engine)


@pytest.fixture(scope="module")
def audit_engine(template, create_database, drop_database) -> Iterator[sa.Engine]:
    """Another database of the application, in which it has tasks, too."""
    url = create_database(template.database)
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()
    drop_database(url)


@pytest.fixture(params=["Flask-SQLAlchemy", "Flask-SQLAlchemy-Lite"])
def shop(request, shared_engine, tables, audit_engine) -> Iterator[SimpleNamespace]:
    """The application, in a context of it, on a connection whose transaction is rolled back."""
    extension = flask_sqlalchemy if request.param == "Flask-SQLAlchemy" else flask_sqlalchemy_lite
    db = extension.SQLAlchemy()
    app = make_app(db, shared_engine.url, audit_engine.url)
    app.extensions["db"] = db
    with rolled_back(app):
        yield SimpleNamespace(app=app, db=db, client=app.test_client())
    with app.app_context():
        assert isinstance(db.engine, sa.Engine)
        for engine in db.engines.values():
            engine.dispose()


@pytest.fixture
def worker(shop, shared_engine) -> Worker:
    worker = Worker(shared_engine, queue, middleware=lambda task: shop.app.app_context())
    worker.use("send_welcome", send_welcome)
    return worker


def sign_up(shop, email="ann@example.com", **form) -> User:
    shop.client.post("/sign-up", data={"email": email, **form})
    return shop.db.session.scalar(sa.select(User).where(User.email == email))


def test_a_request_that_commits_has_added_the_task(shop):
    user = sign_up(shop)

    assert_enqueued(shop.db.session, "send_welcome", user_id=user.id)


def test_a_request_that_rolls_back_has_added_none(shop):
    sign_up(shop)
    sign_up(shop, "bob@example.com", fail="1")

    assert len(enqueued(shop.db.session)) == 1


@pytest.mark.parametrize("outcome", ["raise", "forget"])
@pytest.mark.parametrize("keeps_context", [False, True])
def test_what_a_request_has_not_committed_is_gone_after_it(shop, outcome, keeps_context):
    sign_up(shop)
    with shop.client if keeps_context else nullcontext():
        shop.client.post("/sign-up", data={"email": "bob@example.com", outcome: "1"})

        assert len(enqueued(shop.db.session)) == 1
        assert shop.db.session.scalars(sa.select(User.email)).all() == ["ann@example.com"]


def test_a_request_has_a_session_of_its_own_and_the_test_keeps_its(shop):
    user = User(email="ann@example.com")
    shop.db.session.add(user)
    shop.db.session.flush()

    shop.client.post("/sign-up", data={"email": "bob@example.com", "raise": "1"})
    shop.client.post("/sign-up", data={"email": "eve@example.com"})

    assert user in shop.db.session
    assert set(shop.db.session.scalars(sa.select(User.email))) == {"ann@example.com", "eve@example.com"}


def test_what_is_committed_to_another_bind_is_rolled_back(shop, audit_engine):
    sign_up(shop, audit="1")
    assert enqueued(shop.db.engines["audit"], "audit")
    assert enqueued(shop.db.engines["same"], "send_welcome")

    with Session(audit_engine) as other:
        assert not other.scalars(sa.select(Task)).all()


def test_after_the_test_the_application_commits(shared_engine, audit_engine, tables):
    db = flask_sqlalchemy.SQLAlchemy()
    app = make_app(db, shared_engine.url, audit_engine.url)
    with rolled_back(app):
        serve = app.wsgi_app
    with rolled_back(app), pytest.raises(RuntimeError, match="in the test"):
        raise RuntimeError("in the test")

    assert app.wsgi_app != serve
    with app.app_context():
        queue.add(db.session, "audit")
        assert isinstance(db.session.get_bind(), sa.Engine)
        db.session.remove()
        for engine in db.engines.values():
            engine.dispose()


def test_what_is_no_such_application_is_refused():
    with pytest.raises(TypeError, match="must be a Flask application, got None"), rolled_back(None):  # type: ignore[arg-type]
        pass
    with (
        pytest.raises(ApoqError, match=r"must have Flask-SQLAlchemy .*rolled_back\(engine\)"),
        rolled_back(Flask("a")),
    ):
        pass


def test_asyncio_engines_are_refused(shared_engine):
    app = Flask("a")
    app.config["SQLALCHEMY_ASYNC_ENGINES"] = {"default": shared_engine.url}
    flask_sqlalchemy_lite.SQLAlchemy(app)

    with pytest.raises(UnsupportedSession, match="each async view has another event loop"), rolled_back(app):
        pass


def test_the_task_runs_in_a_context_of_its_own(shop, worker):
    user = sign_up(shop)

    (task,) = drain(shop.db.session, worker)

    assert task.state == "completed"
    assert user.is_welcome


def test_what_it_has_committed_stays_when_it_is_tried_again(shop, worker):
    user = sign_up(shop, "full@example.com")

    (task,) = drain(shop.db.session, worker)
    assert (task.state, user.is_welcome) == ("pending", True)
    user.email = "emptied@example.com"
    with travel(shop.db.session, timedelta(minutes=1)):
        (task,) = drain(shop.db.session, worker)

    assert task.state == "completed"


def test_nothing_is_committed(shop, worker, shared_engine):
    sign_up(shop)
    drain(shop.db.session, worker)

    with Session(shared_engine) as other:
        assert not other.scalars(sa.select(User)).all()
        assert not other.scalars(sa.select(Task)).all()


def test_the_worker_of_the_extension_is_drained(shop):
    extension = pytest.importorskip("apoq.flask").Apoq(shop.app)
    extension.use("send_welcome", send_welcome)
    user = sign_up(shop)

    drain(shop.db.session, extension.worker)

    assert user.is_welcome
