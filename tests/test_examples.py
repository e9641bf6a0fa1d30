"""Every example runs by itself, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"

SAYS = {
    "quickstart.py": r"100 tasks completed in [\d.]+ s: [\d,]+ a second",
    "transaction.py": r"in the database: \[\('a kettle', 'completed'\)\]",
    "exactly_once.py": r"2,000 payments to 2,000 people, in [\d.]+ s: none lost, none doubled",
    "typed_tasks.py": r"(?s)refused: .* unexpected keyword .*over 19\.90 € \(fr\).*over 19\.90 € \(en\)",
    "async_app.py": r"10 tasks of 0.1 s each in 0\.[1-9]\d s",
}


def run(name: str, environment: dict[str, str]) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name],
        env={**os.environ, **environment, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_all_examples_are_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_it_runs_on_a_database_by_url(name, empty_url):
    url = empty_url.set(drivername="postgresql").render_as_string(hide_password=False)

    assert re.search(SAYS[name], run(name, {"DATABASE_URL": url}))


def test_it_runs_on_a_server_of_its_own(monkeypatch):
    monkeypatch.delenv("DATABASE_URL", raising=False)

    said = run("quickstart.py", {})

    assert re.search(SAYS["quickstart.py"], said)
    assert said.count("sending a") == said.count("complete\n") == 100


def test_it_runs_twice_on_the_same_database(empty_url):
    url = empty_url.set(drivername="postgresql").render_as_string(hide_password=False)

    for _ in range(2):
        for name in ("quickstart.py", "transaction.py"):
            run(name, {"DATABASE_URL": url})
