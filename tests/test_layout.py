"""The map in CONTRIBUTING.md names each folder and module of the package's top, and of the worker's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import apoq

ROOT = Path(__file__).parent.parent
PACKAGE = Path(apoq.__file__).parent
MAP = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("folder", [PACKAGE, PACKAGE / "worker"], ids=["apoq", "worker"])
def test_the_map_names_what_is_there(folder):
    named = set(re.findall(r"`(\w+)/?`", "\n".join(re.findall(r"^\| (`.*?) \|", MAP, re.MULTILINE))))
    there = {
        path.stem
        for path in folder.iterdir()
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").exists())
    }

    assert there - named - {"__init__", "options"} == set()


def test_what_the_map_names_is_there():
    named = set(re.findall(r"`(\w+)/`", MAP))
    folders = {path.name for path in PACKAGE.rglob("*") if path.is_dir()}

    assert named <= folders
