"""The tests that chaos/NOTES.md names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAILURES = (ROOT / "chaos" / "NOTES.md").read_text(encoding="utf-8").partition("## The known ways to fail")[2]
ROWS = [
    line for line in FAILURES.splitlines() if line.startswith("| ") and not line.startswith("| failure |")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_each_way_to_fail_has_its_tests(row):
    named = re.findall(r"`(tests/[^`]*)`", row)

    assert named
    for name in named:
        file, *path = name.split("::")
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for part in path:
            (found,) = (node for node in body if getattr(node, "name", None) == part)
            body = found.body
        assert isinstance(found, ast.FunctionDef), name


def test_there_are_many_of_them():
    assert len(ROWS) > 30
