"""``import apoq`` costs an application little more than what it imports already."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

APOQ = "import apoq"
WITHOUT = "import sqlalchemy, sqlalchemy.orm, sqlalchemy.ext.asyncio, psycopg"

STRANGERS = {
    "alembic",
    "click",
    "django",
    "fastapi",
    "flask",
    "jinja2",
    "msgspec",
    "pydantic",
    "pyramid",
    "pytest",
    "rich",
    "starlette",
    "uvicorn",
}
"""What is imported by those who use it, or by the modules of apoq's that need it."""

LIMIT = 1.4
RUNS, MOST_RUNS = 3, 12
"""More than the first few only where the machine is too busy for these to tell."""


def said(program: str) -> str:
    """Answer what a program of its own prints."""
    # -I: neither what PYTHONPATH names nor this folder may come in between.
    command = [sys.executable, "-I", "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def processor_time(imports: str) -> float:
    """Answer the seconds that these imports take of a processor: however busy the machine is."""
    return float(said(f"import time; t = time.process_time(); {imports}; print(time.process_time() - t)"))


def test_neither_alembic_nor_the_command_line_nor_a_framework_is_imported():
    loaded = set(said(f"{APOQ}\nimport sys\nprint(*sys.modules)").split())

    assert "sqlalchemy" in loaded
    assert STRANGERS & loaded == set()


def test_it_takes_little_longer_than_sqlalchemy_and_psycopg():
    apoqs: list[float] = []
    others: list[float] = []

    # In turn, and the least of each: what else happens on a machine only adds to it.
    for _ in range(MOST_RUNS):
        apoqs.append(processor_time(APOQ))
        others.append(processor_time(WITHOUT))
        if len(apoqs) >= RUNS and min(apoqs) < LIMIT * min(others):
            break

    assert min(apoqs) < LIMIT * min(others)
