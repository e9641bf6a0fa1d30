"""In a process with a Flask application, messages name Flask's commands."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Session

from apoq import Queue, SchemaMismatch, Worker
from apoq.errors import command, migrate_command
from apoq.flask import Apoq

CURE = (
    r"run `flask apoq migrate`, `apoq\.prepare\(engine\)`, or `flask db upgrade` if your migrations include"
)


@pytest.fixture
def make_app():
    engines = []

    def make(url: sa.URL, **settings: object) -> tuple[Flask, Apoq]:
        app, db, apoq = Flask("shop"), SQLAlchemy(), Apoq()
        app.config.update(SQLALCHEMY_DATABASE_URI=url, **settings)
        db.init_app(app)
        apoq.init_app(app)
        with app.app_context():
            engines.append(db.engine)
        return app, apoq

    yield make
    for engine in engines:
        engine.dispose()


def test_in_a_request_without_tables(make_app, empty_url):
    app, apoq = make_app(empty_url)

    with app.app_context(), pytest.raises(SchemaMismatch, match=CURE):
        apoq.add("send_welcome")


def test_of_the_applications_worker_without_tables(make_app, empty_url):
    app, apoq = make_app(empty_url)

    with app.app_context(), pytest.raises(SchemaMismatch, match=CURE):
        apoq.worker.start()


def test_on_a_thread_without_an_application_context(make_app, empty_url):
    app, apoq = make_app(empty_url)
    with app.app_context():
        worker = apoq.worker
    raised: list[str] = []

    def start() -> None:
        try:
            worker.start()
        except SchemaMismatch as error:
            raised.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()

    assert "run `flask apoq migrate`" in raised[0]


@pytest.mark.parametrize("name", ["migrate", "worker", "check"])
def test_of_the_commands_themselves_once(make_app, empty_url, name):
    app, apoq = make_app(empty_url)
    apoq.use("t", print)
    if name == "migrate":
        with app.app_context(), Session(app.extensions["sqlalchemy"].engine) as session:
            session.execute(sa.text("CREATE TABLE apoq_tasks (id text)"))
            session.commit()

    result = app.test_cli_runner().invoke(args=["apoq", name])

    assert result.exit_code != 0
    assert "flask flask" not in result.output
    assert "`apoq " not in result.output
    if name != "migrate":
        # The test runner's program has the name of the application.
        assert "`shop apoq migrate`" in " ".join(result.output.split())


def test_the_schema_is_a_setting_and_no_option(make_app, empty_url):
    make_app(empty_url, APOQ_SCHEMA="jobs")

    assert migrate_command("jobs") == "flask apoq migrate"


def test_other_programs_have_apoqs_own(empty_url):
    engine = sa.create_engine(empty_url)

    with pytest.raises(SchemaMismatch, match=r"run `apoq migrate`.*, or `alembic upgrade head` if your"):
        Worker(engine).start()
    with Session(engine) as session, pytest.raises(SchemaMismatch, match="run `apoq migrate --schema jobs`"):
        Queue(schema="jobs").add(session, "t")
    assert command("doctor") == "apoq doctor"
    engine.dispose()


def test_a_taken_id_names_the_command_that_helps(make_app, url):
    app, apoq = make_app(url)
    with app.app_context():
        session = app.extensions["sqlalchemy"].session
        session.execute(sa.text("INSERT INTO apoq_tasks (id, type) VALUES (1, 't')"))

        with pytest.raises(SchemaMismatch, match="`flask apoq doctor` shows the statement"):
            apoq.add("t")
        session.rollback()
