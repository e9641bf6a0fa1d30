"""docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = (HERE.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(test_\w+): (test_\w+)`", TABLE)


def test_there_are_some():
    assert len(NAMED) > 40


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_each_is_there(module, name):
    assert f"def {name}(" in (HERE / f"{module}.py").read_text(encoding="utf-8")
