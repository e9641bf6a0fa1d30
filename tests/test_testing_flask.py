"""apoq.testing in the usual test set-ups of Flask: with Flask-SQLAlchemy, and with Flask-SQLAlchemy-Lite."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import flask_sqlalchemy
import flask_sqlalchemy_lite
import pytest
import sqlalchemy as sa
from flask import Flask, current_app, request
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from apoq import Queue, Retry, Task, Worker
from apoq.testing import assert_enqueued, drain, enqueued, travel

queue = Queue()


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "flask_users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]
    is_welcome: Mapped[bool] = mapped_column(default=False)


def make_app(db, url: sa.URL) -> Flask:
    """An application as many are, which knows nothing of tests."""
    app = Flask("shop")
    app.testing = True
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINES"] = {"default": url}
    db.init_app(app)

    @app.post("/sign-up")
    def sign_up():
        user = User(email=request.form["email"])
        db.session.add(user)
        db.session.flush()
        queue.add(db.session, "send_welcome", {"user_id": user.id})
        if "fail" in request.form:
            db.session.rollback()
            return "sorry", 500
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


@pytest.fixture(params=["Flask-SQLAlchemy", "Flask-SQLAlchemy-Lite"])
def shop(request, shared_engine, tables) -> Iterator[SimpleNamespace]:
    """The application, in a context of it, on a connection whose transaction is rolled back."""
    extension = flask_sqlalchemy if request.param == "Flask-SQLAlchemy" else flask_sqlalchemy_lite
    db = extension.SQLAlchemy()
    app = make_app(db, shared_engine.url)
    app.extensions["db"] = db
    with app.app_context():
        engine = db.engine
        with engine.connect() as connection, connection.begin() as transaction:
            connection.begin_nested()  # sessions that find a savepoint make their own, and commit into it
            if extension is flask_sqlalchemy:
                db.engines[None] = connection
            else:  # whose own test_isolation commits, on SQLAlchemy 2.1
                db.sessionmaker.configure(bind=connection)
            yield SimpleNamespace(app=app, db=db, client=app.test_client())
            db.session.close()
            transaction.rollback()
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
