"""An application's own history, by Flask-Migrate, adopts apoq's tables."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.pool import NullPool

from apoq.cli import main
from apoq.migrations import LATEST, current

pytestmark = pytest.mark.slow

PROGRAM = """
    import json, os, sys
    from pathlib import Path
    import sqlalchemy as sa
    from flask import Flask
    from flask_migrate import Migrate
    from flask_sqlalchemy import SQLAlchemy
    import apoq.migrations
    from apoq.flask import Apoq

    db = SQLAlchemy()

    class User(db.Model):
        id = sa.Column(sa.Integer, primary_key=True)

    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    app.config.update(json.loads(os.environ["CONFIG"]))
    db.init_app(app)
    Apoq(app)
    Migrate(app, db, directory="history", include_object=apoq.migrations.include_object)

    for command in json.loads(sys.argv[1]):
        result = app.test_cli_runner().invoke(args=command)
        assert isinstance(result.exception, SystemExit | None), (command, result.output, result.exception)
        print(result.output, end="=====")  # beside what Alembic has printed past it
"""


def dsn(url: sa.URL) -> str:
    return url.render_as_string(hide_password=False)


def has_tables(url: sa.URL) -> bool:
    engine = sa.create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return current(connection) == LATEST


@pytest.fixture
def other_url(create_database, drop_database):
    url = create_database()
    yield url
    drop_database(url)


@pytest.fixture
def flask(tmp_path, empty_url):
    """Call commands of an application, in one process that is not this one: they set up its logging."""

    def call(*commands: str, **config: object) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), json.dumps([c.split() for c in commands])],
            cwd=tmp_path,
            env={**os.environ, "DATABASE_URL": dsn(empty_url), "CONFIG": json.dumps(config)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.split("=====")[:-1]

    return call


def test_one_revision_adopts_them(flask, empty_url, tmp_path):
    *_, wrote, _ = flask(
        "db init",
        "db migrate -m users",
        "db upgrade",
        "apoq revision",
        "db upgrade",
    )

    engine = sa.create_engine(empty_url)
    with engine.connect() as connection:
        assert current(connection) == LATEST
    engine.dispose()
    assert "history/versions/" in wrote
    assert len(list((tmp_path / "history" / "versions").glob("*.py"))) == 2

    heads, check, again, ours, sql = flask(
        "db heads", "db check", "apoq revision", "apoq check", "db upgrade --sql"
    )
    assert heads.count("(head)") == 1
    assert "No new upgrade operations" in check
    assert "already has apoq's tables at version 1: nothing to write" in again
    assert str(LATEST) in ours
    assert re.search(r"CREATE TABLE .*apoq_tasks", sql)


def test_those_of_another_bind_are_made_there(flask, empty_url, other_url):
    config = {"SQLALCHEMY_BINDS": {"jobs": dsn(other_url)}, "APOQ_BIND": "jobs"}

    _, wrote, _, check, again = flask(
        "db init --multidb", "apoq revision", "db upgrade", "apoq check", "apoq revision", **config
    )

    assert "Wrote" in wrote
    assert "match it" in check
    assert "nothing to write" in again
    assert (has_tables(empty_url), has_tables(other_url)) == (False, True)


def test_a_history_of_the_default_bind_alone_is_no_place_for_those_of_another(flask, other_url, tmp_path):
    config = {"SQLALCHEMY_BINDS": {"jobs": dsn(other_url)}, "APOQ_BIND": "jobs"}

    _, refused, written = flask("db init", "apoq revision", "apoq revision --bind=", **config)

    assert "the bind 'jobs'" in refused
    assert "flask db init --multidb" in refused
    assert "Wrote" in written


def test_a_bind_that_leads_to_the_same_database_is_the_default_one(flask, empty_url, tmp_path):
    config = {"SQLALCHEMY_BINDS": {"jobs": dsn(empty_url)}, "APOQ_BIND": "jobs"}

    flask("db init", "apoq revision", "db upgrade", **config)

    assert has_tables(empty_url)


def test_the_default_bind_of_several_is_the_default(flask, empty_url, other_url):
    flask("db init --multidb", "apoq revision", "db upgrade", SQLALCHEMY_BINDS={"jobs": dsn(other_url)})

    assert (has_tables(empty_url), has_tables(other_url)) == (True, False)


def test_a_template_that_asks_the_application_wants_the_command_of_flask(flask, tmp_path, monkeypatch):
    flask("db init --multidb")
    monkeypatch.chdir(tmp_path)

    done = CliRunner().invoke(main, ["revision", "-d", "history"])

    assert done.exit_code == 1
    assert "run `flask apoq revision`" in done.stderr
    assert not list(tmp_path.rglob("versions/*.py"))
