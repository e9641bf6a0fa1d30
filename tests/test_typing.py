"""Type checkers accept what users write, and reject just what `tests/typing` marks as wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FILES = [*sorted((ROOT / "tests" / "typing").glob("*.py")), *sorted((ROOT / "examples").glob("*.py"))]
MARK = re.compile(r"# wrong: (?P<mypy>\S+) (?P<pyright>\S+)$")

Found = dict[str, set[str]]
"""What is wrong at each place, by its file and line."""


def marked(checker: str) -> dict[str, str]:
    return {
        f"{path.name}:{number}": mark[checker]
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (mark := MARK.search(line))
    }


def run(*command: str | Path) -> str:
    # It answers 1 where it finds something, and 2 where it couldn't look.
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


def by_mypy() -> Iterator[tuple[str, int, str]]:
    for line in run("mypy", "--strict", "--output=json", *FILES).splitlines():
        found = json.loads(line)
        if found["severity"] == "error":
            yield found["file"], found["line"], found["code"]


def by_pyright() -> Iterator[tuple[str, int, str]]:
    said = run("pyright", "--outputjson", "--pythonpath", sys.executable, *FILES)
    for found in json.loads(said)["generalDiagnostics"]:
        yield found["file"], found["range"]["start"]["line"] + 1, found.get("rule", "")


@pytest.mark.parametrize("checker", [by_mypy, by_pyright])
def test_it_rejects_what_is_marked_and_nothing_else(checker):
    name = checker.__name__.removeprefix("by_")
    if name == "pyright" and not shutil.which("node"):
        pytest.skip("pyright needs node")
    expected = marked(name)

    found: Found = defaultdict(set)
    for file, line, rule in checker():
        found[f"{Path(file).name}:{line}"].add(rule)

    assert found.keys() == expected.keys()
    assert {place: rules for place, rules in found.items() if expected[place] not in rules} == {}


def test_much_is_marked():
    assert len(marked("mypy")) > 25
