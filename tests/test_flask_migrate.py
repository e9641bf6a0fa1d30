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

from apoq.migrations import LATEST, current

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
    db.init_app(app)
    Apoq(app)
    Migrate(app, db, directory="history", include_object=apoq.migrations.include_object)

    for command in json.loads(sys.argv[1]):
        result = app.test_cli_runner().invoke(args=command)
        assert result.exit_code == 0, (command, result.output, result.exception)
        print(result.output, end="=====")  # beside what Alembic has printed past it
"""


@pytest.fixture
def flask(tmp_path, empty_url):
    """Call commands of an application, in one process that is not this one: they set up its logging."""

    def call(*commands: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), json.dumps([c.split() for c in commands])],
            cwd=tmp_path,
            env={**os.environ, "DATABASE_URL": empty_url.render_as_string(hide_password=False)},
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
    assert "already: nothing to write" in again
    assert str(LATEST) in ours
    assert re.search(r"CREATE TABLE .*apoq_tasks", sql)
