"""A call without a session, or by the name of another library's method, gets an error with the right call."""

from __future__ import annotations

import re

import psycopg
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Session, sessionmaker

from apoq import Queue, Task, UnsupportedSession
from apoq.flask import Apoq
from apoq.testing import enqueued

queue = Queue("forgotten")


@queue.task
def send_welcome(user_id: int, *, locale: str = "en") -> None: ...


@queue.task
def fetch(url: str) -> None: ...


CALLS = {
    "keywords": (lambda: send_welcome.add(user_id=7), "send_welcome.add(session, user_id=7)"),
    "positional": (lambda: send_welcome.add(7), "send_welcome.add(session, 7)"),
    "both": (lambda: send_welcome.add(7, locale="de"), "send_welcome.add(session, 7, locale='de')"),
    "nothing": (send_welcome.add, "send_welcome.add(session)"),
    "a URL as an argument": (
        lambda: fetch.add("https://example.com"),
        "fetch.add(session, 'https://example.com')",
    ),
    "many": (lambda: send_welcome.add_many([1]), "send_welcome.add_many(session, [1])"),
    "with options": (
        lambda: send_welcome.using(priority=3).add(user_id=7),
        "send_welcome.add(session, user_id=7)",
    ),
    "queue.add": (
        lambda: queue.add("send_welcome", {"user_id": 7}),
        "queue.add(session, 'send_welcome', {'user_id': 7})",
    ),
    "queue.add without data": (lambda: queue.add("send_welcome"), "queue.add(session, 'send_welcome')"),
    "queue.add with keywords": (lambda: queue.add(type="send"), "queue.add(session, type='send')"),
    "queue.add_many": (lambda: queue.add_many("send", [1, 2]), "queue.add_many(session, 'send', [1, 2])"),
    "queue.cancel": (lambda: queue.cancel(7), "queue.cancel(session, 7)"),
    "queue.retry": (lambda: queue.retry(7, delay=5), "queue.retry(session, 7, delay=5)"),
}


@pytest.mark.parametrize(("call", "meant"), CALLS.values(), ids=CALLS)
def test_a_call_without_a_session_gets_the_right_call(call, meant):
    with pytest.raises(UnsupportedSession, match=re.escape(f"did you mean `{meant}`?")):
        call()


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda engine: engine, r"got sqlalchemy\.engine\.base\.Engine: begin a session"),
        (sessionmaker, "sessionmaker: call it, and pass the result"),
        (lambda engine: Session, "the class .*Session: call it"),
        (lambda engine: None, "got NoneType: begin a session"),
        (lambda engine: "postgresql://user:secret@host/db", "got str: begin a session"),
    ],
    ids=["engine", "sessionmaker", "class", "None", "URL"],
)
def test_a_mistaken_session_gets_what_to_pass(shared_engine, make, advice):
    for call in (send_welcome.add, lambda given, **data: queue.add(given, "t", data)):
        with pytest.raises(UnsupportedSession, match=advice) as raised:
            call(make(shared_engine), user_id=7)
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize("name", ["delay", "apply_async", "enqueue", "send", "defer"])
def test_a_method_of_another_library_gets_the_right_one(name):
    meant = re.escape("did you mean `send_welcome.add(session, …)`?")

    with pytest.raises(AttributeError, match=rf"no attribute '{name}': {meant}"):
        getattr(send_welcome, name)(7)
    assert not hasattr(send_welcome, name)


def test_any_other_attribute_is_just_missing():
    with pytest.raises(AttributeError, match=r"'TypedTask' object has no attribute 'dealy'$"):
        send_welcome.dealy  # noqa: B018


class TestRightCalls:
    def test_a_session_may_be_a_keyword(self, session):
        assert queue.add(session=session, type="t").state == "pending"

    def test_a_parameter_of_the_function_may_be_called_session(self, session):
        @queue.task(type="log_in")
        def log_in(session: str) -> None: ...

        assert log_in.add(session, session="abc").data == {"session": "abc"}
        with pytest.raises(UnsupportedSession, match=re.escape("log_in.add(session, session='abc')")):
            log_in.add(session="abc")

    def test_a_psycopg_connection_is_one(self, url):
        dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(dsn) as connection:
            assert send_welcome.add(connection, 7).data == {"user_id": 7}


class TestFlask:
    @pytest.fixture
    def app(self, url):
        db, apoq = SQLAlchemy(), Apoq()
        app = Flask(__name__)
        app.config.update(SQLALCHEMY_DATABASE_URI=url)
        db.init_app(app)
        apoq.init_app(app)

        @apoq.task
        def send_mail(to: str = "", user_id: int = 0) -> None: ...

        app.db, app.send_mail = db, send_mail
        with app.app_context():
            yield app
            db.session.remove()
            db.engine.dispose()

    def test_no_session_is_needed(self, app):
        app.send_mail.add(user_id=7)
        app.send_mail.add("postgresql://a/b")

        assert [task.data for task in enqueued(app.db.session)] == [
            {"user_id": 7},
            {"to": "postgresql://a/b"},
        ]

    def test_an_engine_is_no_argument(self, app):
        with pytest.raises(
            UnsupportedSession, match=r"got sqlalchemy\.engine\.base\.Engine: begin a session"
        ):
            app.send_mail.add(app.db.engine, user_id=1)
        assert app.db.session.scalar(sa.select(sa.func.count()).select_from(Task)) == 0

    def test_the_extension_is_no_argument(self, app):
        with pytest.raises(UnsupportedSession, match=r"pass its session, `db\.session`"):
            app.send_mail.add_many(app.db, [app.send_mail.call(user_id=1)])

    def test_a_method_of_another_library_gets_the_right_one(self, app):
        with pytest.raises(AttributeError, match=re.escape("did you mean `send_mail.add(…)`?")):
            app.send_mail.delay(user_id=1)

    def test_too_many_arguments_of_add_many_are_rejected(self, app):
        with pytest.raises(TypeError, match="an optional session and the calls, got 2 arguments"):
            app.send_mail.add_many([], [])
