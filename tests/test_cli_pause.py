"""``apoq pause`` and ``apoq resume``, and what other commands show of a pause."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import sqlalchemy as sa
from click.testing import Result
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, Task
from apoq.cli import main

until = patience(10.0)


@pytest.fixture
def run(engine, invoke) -> Callable[..., Result]:
    return lambda *arguments: invoke(engine, *arguments)


@pytest.fixture
def invoke() -> Callable[..., Result]:
    from click.testing import CliRunner

    def call(engine: sa.Engine, *arguments: str) -> Result:
        url = engine.url.render_as_string(hide_password=False)
        return CliRunner(env={"APOQ_DATABASE_URL": url}).invoke(main, arguments)

    return call


def add(engine, type_: str = "t", queue: str = "default") -> None:
    with Session(engine) as session, session.begin():
        Queue(queue).add(session, type_)


def test_a_queue_is_paused_and_resumed(run, engine, worker):
    worker.use("t", lambda task: None)
    add(engine)

    assert run("pause", "--reason", "the mail server is down").stdout == "Paused the queue 'default'.\n"
    assert worker.work() is None
    assert run("resume").stdout == "Resumed the queue 'default'.\n"
    assert worker.work() is not None


def test_a_type_is_paused_by_itself(run, engine):
    said = run("pause", "--type", "t", "--until", "2040-01-01T00:00Z").stdout
    assert said.startswith("Paused the type 't' of queue 'default' until 2040-01-01 00:00:00")

    refused = run("resume")
    assert refused.exit_code == 1
    assert "is not paused" in refused.output
    assert "type 't' of queue 'default' was paused" in refused.output  # a hint
    assert run("resume", "--type", "t").exit_code == 0


def test_a_queue_that_no_worker_has_gets_a_warning(run, engine, make_worker):
    assert "No live worker has the queue 'typo'" in run("pause", "typo").stderr

    worker = make_worker()
    worker.use("t", lambda task: None)
    worker.start()
    assert run("pause").stderr == ""


def test_it_waits_until_nothing_runs(run, engine, worker):
    began, may_end = threading.Event(), threading.Event()
    worker.use("t", lambda task: (began.set(), may_end.wait(10)))
    add(engine)
    worker.start()
    assert began.wait(10)

    late = run("pause", "--wait", "--timeout", "0.1s")
    assert late.exit_code == 1
    assert "1 task still running after" in late.output

    threading.Timer(0.3, may_end.set).start()
    assert "No task is running." in run("pause", "--wait", "--timeout", "20s").stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--until", "2040-01-01T00:00Z", "--for", "2h"], "Give either --until or --for"),
        (["--timeout", "2h"], "--timeout is how long to --wait"),
        (["--until", "2020-01-01T00:00Z"], "until must be in the future"),
        (["--for", "soon"], "must be a length of time"),
    ],
    ids=str,
)
def test_nonsense_is_an_error(run, engine, options, said):
    refused = run("pause", *options)

    assert refused.exit_code in {1, 2}
    assert said in refused.output


class TestOtherCommands:
    @pytest.fixture(autouse=True)
    def paused(self, engine, run) -> None:
        add(engine, "t")
        add(engine, "u", "imports")
        run("pause", "--reason", "the mail server is down", "--for", "1h")
        run("pause", "imports", "--type", "u")

    def test_stats_show_it(self, run):
        said = run("stats").stdout
        found = json.loads(run("stats", "--json").stdout)["pauses"]

        assert "queue 'default' was paused" in said
        assert ": the mail server is down" in said
        assert [(pause["queue"], pause["type"], pause["reason"]) for pause in found] == [
            ("default", None, "the mail server is down"),
            ("imports", "u", ""),
        ]

    def test_list_shows_it(self, run):
        lines = run("list").stdout.splitlines()[2:]

        assert all("paused" in line for line in lines)
        assert len(lines) == 2

    def test_doctor_warns_and_says_how_to_resume(self, run, engine):
        with engine.begin() as connection:
            connection.execute(sa.update(Task).values(process_at=Task.process_at - timedelta(hours=1)))
        found = {finding["cure"]: finding for finding in json.loads(run("doctor", "--json").stdout)}

        assert found["apoq resume default"]["subject"] == "pauses"
        assert "apoq resume imports --type u" in found
        assert not any("has had a task" in finding["text"] for finding in found.values())
