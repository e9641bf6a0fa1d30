"""Draws the terminal's pictures in this folder, of real runs on a private PostgreSQL.

python docs/images/draw.py [FOLDER]
"""

# ruff: noqa: INP001 - a script

from __future__ import annotations

import io
import logging
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from apoq import Queue, RunningTask, Worker, prepare
from apoq.cli import list as listing
from apoq.cli import main, output, stats
from apoq.embedded import PostgreSQL

COLUMNS = 80


class MailboxFull(Exception):
    """What some tasks fail with."""


def send(task: RunningTask) -> None:
    """Take a moment, and fail now and then."""
    time.sleep(0.02)
    if task.data["user_id"] % 40 == 0:
        raise MailboxFull(f"552 mailbox of user {task.data['user_id']} is full")


def report(task: RunningTask) -> None:
    """Run for as long as the worker does."""
    while not task.should_stop:
        time.sleep(0.05)


@contextmanager
def busy(engine: Engine) -> Iterator[None]:
    """Have two queues with something in each state, and workers at them."""
    emails, reports = Queue("emails"), Queue("reports")
    workers = [Worker(engine, emails), Worker(engine, emails), Worker(engine, reports, concurrency=2)]
    for worker in workers:
        worker.use("send_welcome", send, retry_limit=0)
        worker.use("build_report", report)
    with Session(engine) as session, session.begin():
        reports.add_many(session, "build_report", [{"month": f"2026-{month:02}"} for month in range(1, 13)])
        emails.add_many(session, "send_welcome", [{"user_id": n} for n in range(1, 2_000)])
        emails.add_many(session, "send_newsletter", [{"issue": 7}] * 1_200, delay=timedelta(hours=3))
    for worker in workers:
        worker.start()
    time.sleep(4)
    try:
        yield
    finally:
        for worker in workers:
            worker.stop(timeout=1)


def draw(folder: Path, command: str, url: str) -> None:
    """Run a command, and draw what it shows."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False, markup=False
    )
    output.console = lambda: console
    output.widest = listing.widest = stats.widest = lambda columns: columns
    console.print(f"$ apoq {command}", style="bold")
    with suppress(SystemExit):
        main([*command.split(), "--database-url", url])
    name = command.split(maxsplit=1)[0]
    picture = console.export_svg(title="", theme=MONOKAI, unique_id=name)
    # The fonts that the reader has: a picture in the documentation loads nothing from elsewhere.
    picture = re.sub(r"@font-face \{.*?\}\n", "", picture, flags=re.DOTALL).replace(
        "Fira Code", "DejaVu Sans Mono"
    )
    (folder / f"{name}.svg").write_text(re.sub(r"[ \t]+\n", "\n", picture), "utf-8")


def draw_all(folder: Path) -> None:
    """Draw stats and list of a queue at work, and what the doctor says of one that is ill."""
    platform.node = lambda: "web-1"
    logging.disable()
    with PostgreSQL() as server:
        engine = create_engine(server.url)
        prepare(engine)
        with busy(engine):
            draw(folder, "stats --types", server.url)
            draw(folder, "list --state failed --limit 5", server.url)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE apoq_tasks SET (autovacuum_enabled = false)")
            connection.exec_driver_sql("ALTER DATABASE postgres SET statement_timeout = '5s'")
            late = datetime.now(UTC) - timedelta(minutes=20)
            Queue("reports").add(connection, "build_report", process_at=late)
        engine.dispose()
        draw(folder, "doctor", server.url)


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
