"""docs/testing.md is a project whose tests pass."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOCS = (Path(__file__).parent.parent / "docs" / "testing.md").read_text(encoding="utf-8")


def test_its_files_are_a_project_whose_tests_pass(tmp_path, server, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", server.render_as_string(hide_password=False))
    for name, code in re.findall(r"```py\n# (\w+\.py)\n(.*?)```", DOCS, re.DOTALL):
        (tmp_path / name).write_text(code, encoding="utf-8")

    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "--rootdir", str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert "5 passed" in ran.stdout, ran.stdout + ran.stderr


def test_its_other_code_is_python():
    for code in re.findall(r"```py\n(.*?)```", DOCS, re.DOTALL):
        compile(code, "testing.md", "exec")
