"""The first example of a page, saved and started as the page says, does what the page says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pages
import pytest

pytestmark = pytest.mark.slow

Run = Callable[[str], str]


@pytest.fixture(autouse=True)
def folder(tmp_path, empty_url, monkeypatch) -> Path:
    """Work in an empty folder, on an empty database, with the commands of this environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", empty_url.render_as_string(hide_password=False))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    return tmp_path


@pytest.fixture
def run(folder) -> Run:
    def run(command: str) -> str:
        ran = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
        return ran.stdout

    return run


def save(page: Path, language: str, name: str) -> None:
    Path(name).write_text(next(pages.blocks(page, language)).code, encoding="utf-8")


def commands(page: Path, last: str) -> list[str]:
    """Return the commands between the page's `export` and the one that begins with `last`."""
    block = next(block for block in pages.blocks(page, "sh") if f"\n{last}" in block.code)
    lines = block.code.splitlines()[1:]
    return lines[: next(n for n, line in enumerate(lines) if line.startswith(last))]


def test_the_readmes_adds_101_tasks_and_runs_them_until_it_is_stopped():
    save(pages.README, "python", "app.py")
    program = subprocess.Popen([sys.executable, "app.py"], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    said = ""  # by several threads, so lines may be mixed
    try:
        while said.count(" complete") < 101:
            line = program.stdout.readline()
            assert line, said
            said += line
    finally:
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=30)

    assert program.returncode == 0
    assert said.count("📧 welcome, user ") == 100


def test_that_for_fastapi_welcomes_who_signs_up(run):
    save(pages.DOCS / "fastapi.md", "python", "main.py")
    for command in commands(pages.DOCS / "fastapi.md", "uvicorn main:app"):
        run(command)
    Path("serve.py").write_text(
        "import threading, main\n"
        "from fastapi.testclient import TestClient\n"
        "done = threading.Event()\n"
        "main.worker.events.on('task.completed', lambda task: done.set())\n"
        "with TestClient(main.app) as client:\n"
        "    response = client.post('/sign-up', json={'email': 'ada@example.org'})\n"
        "    assert done.wait(20)\n"
        "print(response.status_code)\n"
    )

    said = run(f"{sys.executable} -W ignore serve.py")

    assert said == "📧 welcome, ada@example.org\n201\n"


def test_that_for_pyramid_welcomes_who_signs_up(run):
    page = pages.DOCS / "pyramid.md"
    save(page, "python", "shop.py")
    save(page, "ini", "development.ini")
    for command in commands(page, "pserve development.ini"):
        run(command)
    Path("serve.py").write_text(
        "from pyramid.paster import get_app\n"
        "from webtest import TestApp\n"
        "from apoq.pyramid import load_worker\n"
        "print(TestApp(get_app('development.ini')).get('/sign-up?name=Ada').text, end='')\n"
        "load_worker('development.ini').work()\n"
    )

    said = run(f"{sys.executable} -W ignore serve.py")

    assert said == "Your mail is task 1.\n📧 Welcome, Ada! http://localhost/sign-up\n"
