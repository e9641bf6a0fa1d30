"""The same commands, with the same options, as ``flask apoq``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import Queue, Task

pytestmark = pytest.mark.slow

APP = """
import os
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from apoq.flask import Apoq

db, tasks = SQLAlchemy(), Apoq()
app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["SHOP_URL"]
db.init_app(app)
tasks.init_app(app)

@tasks.task(type="pay", retry_delay=lambda _: 3_600)
def pay(amount: int) -> None:
    if amount < 0:
        raise ValueError("no money back")
    print("paid", amount, flush=True)
"""


@pytest.fixture
def flask(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call ``flask apoq`` for an application."""

    def call(url: sa.URL, *arguments: str) -> subprocess.CompletedProcess[str]:
        Path(tmp_path, "shop.py").write_text(APP)
        environment = os.environ | {"SHOP_URL": url.render_as_string(hide_password=False)}
        return subprocess.run(
            [sys.executable, "-m", "flask", "--app", "shop", "apoq", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return call


def test_a_burst_and_what_came_of_it(flask, url, engine):
    with Session(engine) as session, session.begin():
        paid = Queue().add(session, "pay", {"amount": 7}).id
        refused = Queue().add(session, "pay", {"amount": -7}).id

    done = flask(url, "worker", "--burst", "--timeout", "1 min")
    listed = flask(url, "list", "--retrying", "--error", "ValueError")
    shown = flask(url, "show", str(refused))

    assert (done.returncode, done.stdout) == (0, "paid 7\n"), done.stderr
    assert "1 task completed, 1 failed and will be tried again" in done.stderr
    assert f"{refused}  pay   retrying" in listed.stdout
    assert "ValueError: no money back" in listed.stdout
    assert f"in pay, {Path(shown.args[0]).anchor}" in shown.stdout
    with Session(engine) as session:
        assert session.get(Task, paid).state == "completed"


def test_an_error_names_the_commands_of_the_application(flask, empty_url):
    done = flask(empty_url, "stats")

    assert done.returncode == 4
    assert "run `python -m flask apoq migrate`" in done.stderr
    assert "or `flask db upgrade`" in done.stderr


def test_the_doctor_names_the_commands_of_the_application(flask, empty_url):
    done = flask(empty_url, "doctor")

    assert done.returncode == 1
    assert "→ python -m flask apoq migrate" in done.stdout


@pytest.mark.parametrize("option", ["--reload", "--burst", "--processes", "--timeout"])
def test_a_worker_has_the_options_of_apoq_worker(flask, url, option):
    assert option in flask(url, "worker", "--help").stdout
