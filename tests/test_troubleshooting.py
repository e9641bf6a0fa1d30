"""docs/troubleshooting.md quotes messages that exist, and its queries find what they are for."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from uuid import uuid4

import pages
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import Task
from apoq.schema.tables import WorkerRow

PAGE = pages.DOCS / "troubleshooting.md"
TEXT = PAGE.read_text(encoding="utf-8")


@cache
def texts() -> list[str]:
    """Return all texts in the source, with a gap where a value is put in."""
    found = []
    for file in sorted((pages.ROOT / "apoq").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.\d]*[sdrfg]|\{\w*\}", "\0", node.value))
    return found


def quoted() -> list[str]:
    """Find the messages in the first columns of the tables of messages."""
    tables = re.findall(r"^\| message .*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split("|")[1])]


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_in_the_source(message):
    fragments = [fragment for fragment in re.split(r"\s*…\s*", message) if fragment]

    assert fragments
    for fragment in fragments:
        assert any(fragment in text for text in texts()), fragment


def test_there_are_many_of_them():
    assert len(quoted()) > 30


def test_it_names_errors_that_exist():
    import apoq

    (table,) = re.findall(r"^\| error .*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    elsewhere = {"TimeoutError", "WorkerDied", "ProcessDied"}
    elsewhere |= {"NoResultFound", "ObjectDeletedError", "OperationalError"}

    named = {name for row in table.splitlines() for name in re.findall(r"`([A-Z]\w+)`", row.split("|")[1])}

    assert named - elsewhere <= set(apoq.__all__)


class TestQueries:
    @pytest.fixture
    def found(self, engine) -> list[list[tuple]]:
        """Return what each query on the page finds in a database where something is wrong."""
        now = datetime.now(UTC)
        hour = timedelta(hours=1)
        live = {"host": "a", "version": "1", "queues": ["q"], "concurrency": 4, "grace": timedelta(seconds=4)}
        with Session(engine) as session, session.begin():
            session.add_all(
                [
                    Task(type="old", state="failed", failed_at=now - 2 * hour),
                    Task(type="new", state="failed", failed_at=now - hour / 2),
                    Task(type="late", queue="q", process_at=now - hour),
                    Task(type="late", queue="q", process_at=now - hour / 2),
                    Task(type="later", queue="r", process_at=now + hour),
                    Task(type="long", state="running", claimed_at=now - 2 * hour),
                    Task(type="short", state="running", claimed_at=now),
                    WorkerRow(id=uuid4(), pid=1, expires_at=now + hour, **live),
                    WorkerRow(id=uuid4(), pid=2, expires_at=now + hour, **live),
                    WorkerRow(id=uuid4(), pid=3, expires_at=now - hour, **live),
                ]
            )
        with engine.connect() as connection:
            return [
                list(map(tuple, connection.exec_driver_sql(block.code.strip()).all()))
                for block in pages.blocks(PAGE, "sql")
            ]

    def test_they_find_what_they_say(self, found):
        failed, [(queue, lag)], workers, [(_, running, _)] = found

        assert failed == [("default", "new", 1)]
        assert queue == "q"
        assert 3_590 < lag < 3_900
        assert workers == [("a", 2)]
        assert running == "long"


@pytest.mark.slow
def test_its_filters_read_the_commands_json(engine, monkeypatch):
    if subprocess.run(["which", "jq"], capture_output=True, check=False).returncode:
        pytest.skip("there is no jq")
    monkeypatch.setenv("DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    with Session(engine) as session, session.begin():
        session.add(Task(type="t", queue="late", process_at=sa.func.now() - timedelta(hours=1)))
        session.add(Task(type="t", queue="punctual"))
    commands = [
        line for block in pages.blocks(PAGE, "sh") for line in block.code.splitlines() if "jq" in line
    ]

    said = [
        subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
        for command in commands
    ]

    assert said == ['"late"\n', "0\n"]
