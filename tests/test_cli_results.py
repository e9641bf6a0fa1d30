"""``apoq show`` shows results and progress, and follows a task."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, RunningTask
from apoq.cli import follow as follow_module
from apoq.cli import main

until = patience(30.0)


@pytest.fixture
def run(engine, monkeypatch) -> Callable[..., Result]:
    """Call the command line on the test's database."""
    monkeypatch.setenv("APOQ_DATABASE_URL", engine.url.render_as_string(hide_password=False))

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    return call


def add(engine, queue: Queue) -> int:
    with Session(engine) as session, session.begin():
        return queue.add(session, "t").id


def execute(engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)


def facts(done: Result) -> list[str]:
    return [" ".join(line.split()) for line in done.output.splitlines()]


@pytest.fixture
def ran(engine, queue, worker) -> int:
    """A task that has completed."""

    def process(task: RunningTask) -> dict[str, str]:
        task.set_progress(1_250, 5_000, "the [red]first[/red] \x1b[31mfile")
        return {"name": "é€💖"}

    worker.use("t", process, keep_result=True)
    task_id = add(engine, queue)
    worker.work()
    return task_id


class TestShow:
    def test_shows_the_result_and_the_progress(self, run, ran):
        lines = facts(run("show", str(ran)))

        assert lines[-4:] == ["result", "{", '"name": "é€💖"', "}"]
        (line,) = [line for line in lines if line.startswith("progress")]
        assert line.startswith("progress 1,250 of 5,000 (25 %), the [red]first[/red]")
        assert "\x1b" not in line

    def test_prints_them_as_json(self, run, ran):
        shown = json.loads(run("show", str(ran), "--json").output)

        assert shown["result"] == {"name": "é€💖"}
        assert (shown["progress_done"], shown["progress_total"]) == (1250, 5000)

    def test_cuts_a_long_result_unless_all_of_it_is_asked_for(self, run, engine, queue, ran):
        execute(engine, "UPDATE apoq_tasks SET result = (SELECT jsonb_agg(n) FROM generate_series(1, 60) n)")

        assert "more lines: --full shows them" in run("show", str(ran)).output
        assert "60" in facts(run("show", str(ran), "--full"))

    @pytest.mark.parametrize(
        ("done", "total", "text"),
        [(0, 0, "0 of 0"), (1.5, "NULL", "1.50"), (7, 5, "7 of 5 (100 %)"), (1, 3, "1 of 3 (33 %)")],
    )
    def test_writes_any_numbers(self, run, engine, ran, done, total, text):
        execute(engine, f"UPDATE apoq_progress SET done = {done}, total = {total}, note = ''")

        assert any(line.startswith(f"progress {text} (") for line in facts(run("show", str(ran))))


class TestFollow:
    def test_prints_a_line_for_each_change_and_then_the_task(self, run, engine, queue, worker, monkeypatch):
        monkeypatch.setattr(follow_module, "LOOK_SECONDS", 0.01)
        go = threading.Event()

        def process(task: RunningTask) -> None:
            task.set_progress(1, 4)
            go.wait(30)
            task.set_progress(4, 4, "done")

        worker.use("t", process)
        task_id = add(engine, queue)
        original = follow_module.progress_text

        def look(row: sa.RowMapping) -> str:
            if row["state"] == "pending":
                worker.start()
            elif row["progress_done"] == 1:
                go.set()
            return original(row)

        monkeypatch.setattr(follow_module, "progress_text", look)
        done = run("show", str(task_id), "--follow")

        lines = done.stderr.splitlines()
        assert lines[0] == "pending"
        assert "running 1 of 4 (25 %)" in lines
        assert lines[-1].startswith("completed")
        assert len(set(lines)) == len(lines)
        assert "state completed" in [" ".join(line.split()) for line in done.stdout.splitlines()]

    def test_prints_only_json_if_that_is_asked_for(self, run, ran):
        assert json.loads(run("show", str(ran), "--follow", "--json").stdout)["id"] == ran

    def test_fails_if_there_is_no_such_task(self, run):
        done = run("show", "7", "--follow")

        assert (done.exit_code, done.stdout) == (1, "")
        assert "there is no task 7" in done.stderr

    @pytest.mark.slow
    def test_draws_a_bar_on_a_terminal(self, engine, queue, ran):
        execute(engine, "UPDATE apoq_tasks SET state = 'running', completed_at = NULL")
        environment = {
            **os.environ,
            "APOQ_DATABASE_URL": engine.url.render_as_string(hide_password=False),
            "TERM": "xterm",
            "COLUMNS": "120",
        }
        leader, follower = pty.openpty()
        command = [sys.executable, "-m", "apoq", "show", str(ran), "-f"]
        with subprocess.Popen(command, stderr=follower, stdout=subprocess.PIPE, env=environment) as program:
            os.close(follower)
            drawn = b""
            while b"1,250 of 5,000" not in drawn:
                drawn += os.read(leader, 1_000)
            execute(engine, "UPDATE apoq_tasks SET state = 'completed', completed_at = now()")
            out, _ = program.communicate(timeout=30)
        os.close(leader)

        assert "━".encode() in drawn
        assert b"completed" in out
