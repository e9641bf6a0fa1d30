"""``apoq worker --reload``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.orm import Session
from worker_programs import Program

from apoq import Queue, Task
from apoq.cli import main
from apoq.cli.exits import BadUsage
from apoq.cli.reload import Reloader

pytestmark = pytest.mark.slow

APP = """
import threading
from apoq import Queue

queue = Queue()

@queue.task(type="say")
def say() -> None:
    print("{word}", flush=True)

@queue.task(type="hold")
def hold() -> None:
    print("holding", flush=True)
    threading.Event().wait()
"""


@pytest.fixture
def start(url, tmp_path) -> Iterator[Callable[..., Program]]:
    pytest.importorskip("watchfiles")
    started = []

    def begin(*arguments: str) -> Program:
        write(tmp_path, "one")
        started.append(Program("app:queue", "--reload", *arguments, cwd=tmp_path, url=url))
        return started[-1]

    yield begin
    for program in started:
        program.kill()


def write(folder: Path, word: str) -> None:
    # Of different lengths: within a second, Python knows a changed file by its size.
    (folder / "app.py").write_text(APP.replace("{word}", word))


def add(engine: sa.Engine, type_: str) -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, type_).id


def test_a_change_restarts_the_worker_with_the_new_code(start, engine, tmp_path):
    program = start()
    add(engine, "say")
    program.wait_for("^one$")

    write(tmp_path, "number two")
    program.wait_for(r"app\.py changed: the worker restarts")
    program.wait_for("has started")
    add(engine, "say")

    program.wait_for("^number two$")
    assert program.stop() == 0


def test_running_tasks_get_the_usual_time_and_are_given_back(start, engine, tmp_path):
    program = start("--timeout", "0.5")
    task_id = add(engine, "hold")
    program.wait_for("holding")

    write(tmp_path, "number two")

    program.wait_for("changed: the worker restarts")
    program.wait_for("holding")
    with Session(engine) as session:
        assert (session.get(Task, task_id).state, session.get(Task, task_id).attempt) == ("running", 1)


def test_after_an_error_it_waits_for_the_next_change(start, engine, tmp_path):
    program = start()
    program.wait_for("has started")

    (tmp_path / "app.py").write_text("def")
    program.wait_for("SyntaxError")
    program.wait_for("the worker ended with code 2; it starts again when a Python file changes")
    write(tmp_path, "number three")

    program.wait_for("has started")
    assert program.stop() == 0


def test_other_files_are_ignored(start, tmp_path):
    program = start()
    program.wait_for("has started")

    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "other.py").write_text("x = 1")

    program.wait_for(r"other\.py changed: the worker restarts")
    assert "notes.txt" not in program.output


def test_without_the_library_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "watchfiles", None)

    with pytest.raises(BadUsage, match=r'pip install "apoq\[reload\]"'):
        Reloader([], tmp_path, timeout=1).watch()


def test_it_runs_one_process():
    done = CliRunner().invoke(main, ["worker", "app:queue", "--reload", "--processes", "2"])

    assert (done.exit_code, "--processes and --reload can't be combined" in done.output) == (2, True)
