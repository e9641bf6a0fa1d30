"""docs/tutorial.md, followed step by step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pages
import pytest
import sqlalchemy as sa

from apoq import Task

pytestmark = pytest.mark.slow

PAGE = pages.DOCS / "tutorial.md"

BEFORE = re.compile(r"python3 -m venv|pip install|export DATABASE_URL|python -c .from apoq.embedded")
"""What the tests have done already."""


@pytest.mark.slow
def test_it_leads_where_it_says(empty_url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", empty_url.render_as_string(hide_password=False))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    engine = sa.create_engine(empty_url)
    said = ""

    for block in pages.blocks(PAGE, "py", "sh"):
        if block.language == "py":
            name, _, code = block.code.partition("\n")
            Path(name.removeprefix("# ")).write_text(code, encoding="utf-8")
            continue
        for command in block.code.splitlines():
            if command.startswith("apoq worker"):
                said += work(command, engine)
            elif not BEFORE.match(command):
                said += run(command)
    engine.dispose()

    assert "🧾 a receipt for a kettle" in said
    assert "failed (failure 1), and is tried again" in said
    assert "ConnectionError: the mail server is away" in said
    assert "🧾 a receipt for a teapot" in said
    assert "a kettle 1\na teapot 1\n" in said
    assert "2 passed" in said


def run(command: str) -> str:
    ran = subprocess.run(
        command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert ran.returncode == 0, f"{command}\n{ran.stdout}"
    return ran.stdout


def work(command: str, engine: sa.Engine) -> str:
    """Let a worker run until nothing is left to do, and end it as Ctrl-C does."""
    worker = subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 20
        left = sa.select(sa.func.count()).where(Task.state.in_(("pending", "running")))
        while True:
            with engine.connect() as connection:
                if connection.scalar(left) == 0:
                    break
            assert worker.poll() is None, worker.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        worker.send_signal(signal.SIGINT)
        said, _ = worker.communicate(timeout=10)
    assert worker.returncode == 0, said
    return said
