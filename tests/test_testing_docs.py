"""docs/testing.md is a project whose tests pass."""

from __future__ import annotations

import re
import subprocess
import sys

import pages


def test_its_files_are_a_project_whose_tests_pass(tmp_path, server, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", server.render_as_string(hide_password=False))
    for block in pages.blocks(pages.DOCS / "testing.md", "py"):
        if named := re.match(r"# (\w+\.py)\n", block.code):
            (tmp_path / named[1]).write_text(block.code, encoding="utf-8")

    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "--rootdir", str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert "5 passed" in ran.stdout, ran.stdout + ran.stderr
