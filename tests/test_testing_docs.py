"""docs/testing.md is a project whose tests pass, and so is what it says of Flask."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest

pytestmark = pytest.mark.slow

PAGE = pages.DOCS / "testing.md"


@pytest.fixture
def run_project(tmp_path, server, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", server.render_as_string(hide_password=False))

    def run_project(files: dict[str, str], expected: str) -> None:
        for name, code in files.items():
            Path(tmp_path, name).write_text(code, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "--rootdir", str(tmp_path)]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert expected in ran.stdout, ran.stdout + ran.stderr

    return run_project


def files() -> dict[str, str]:
    """Return the blocks of the page that begin with the name of a file."""
    code = [block.code for block in pages.blocks(PAGE, "py")]
    return {named[1]: text for text in code if (named := re.match(r"# (\w+\.py)\n", text))}


def test_its_files_are_a_project_whose_tests_pass(run_project):
    run_project({name: code for name, code in files().items() if name != "test_sign_up.py"}, "5 passed")


def test_its_fixture_for_flask_fits_the_application_of_the_page_about_flask(run_project):
    app = next(pages.blocks(pages.DOCS / "flask.md", "python")).code

    run_project({"app.py": app, "test_sign_up.py": files()["test_sign_up.py"]}, "2 passed")
