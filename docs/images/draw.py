"""Draws the terminal's pictures in this folder, of real runs on a private PostgreSQL.

python docs/images/draw.py [FOLDER]
"""

# ruff: noqa: INP001 - a script

from __future__ import annotations

import fcntl
import io
import logging
import os
import platform
import pty
import re
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from apoq import Queue, RunningTask, Worker, prepare
from apoq.embedded import PostgreSQL

COLUMNS = 80
HOST = "web-1"

TASKS = """
import time
from apoq import Queue

queue = Queue("shop")

def send_mail(text: str) -> None:
    raise ConnectionError("the mail server is away")

@queue.task(retry_delay=lambda fail_count: 60)
def send_receipt(order_id: int) -> None:
    send_mail(f"a receipt for the order {order_id}")

@queue.task
def build_report(year: int) -> None:
    time.sleep(4)
"""


class MailboxFull(Exception):
    """The error of some tasks."""


def send(task: RunningTask) -> None:
    """Take a moment, and fail now and then."""
    time.sleep(0.02)
    if task.data["user_id"] % 40 == 0:
        raise MailboxFull(f"552 mailbox of user {task.data['user_id']} is full")
    if task.type == "send_invoice":
        raise ConnectionError("the mail server is away")


def report(task: RunningTask) -> None:
    """Run for as long as the worker does."""
    while not task.should_stop:
        time.sleep(0.05)


@contextmanager
def busy(engine: Engine) -> Iterator[None]:
    """Have two queues with something in each state, and workers that run them."""
    emails, reports = Queue("emails"), Queue("reports")
    workers = [Worker(engine, emails), Worker(engine, emails), Worker(engine, reports, concurrency=2)]
    for worker in workers:
        worker.use("send_welcome", send, retry_limit=0)
        worker.use("send_invoice", send, retry_delay=lambda _: 600)
        worker.use("build_report", report)
    with Session(engine) as session, session.begin():
        reports.add_many(session, "build_report", [{"month": f"2026-{month:02}"} for month in range(1, 13)])
        emails.add_many(session, "send_invoice", [{"user_id": 307}, {"user_id": 611}])
        emails.add_many(session, "send_welcome", [{"user_id": n} for n in range(8, 2_000)])
        emails.add_many(session, "send_newsletter", [{"issue": 7}] * 1_200, delay=timedelta(hours=3))
    for worker in workers:
        worker.start()
    time.sleep(4)
    try:
        yield
    finally:
        for worker in workers:
            worker.stop(timeout=1)


def run(command: str, url: str, folder: str, *, interrupt_after: str = "") -> str:
    """Run a command in a terminal, and return what it prints; press Ctrl-C when it has printed this."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ.update(DATABASE_URL=url, TERM="xterm-256color", COLORTERM="truecolor", PYTHONPATH=ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "apoq", *command.split()])  # noqa: S606
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 60, COLUMNS, 0, 0))
    output = b""
    while True:
        try:
            output += os.read(terminal, 65536)
        except OSError:  # its end, on Linux
            break
        if interrupt_after and re.search(interrupt_after.encode(), output):
            interrupt_after = ""
            time.sleep(1)
            os.write(terminal, b"\x03")
    os.waitpid(pid, 0)
    return output.decode().replace("\r\n", "\n")


def draw(folder: Path, command: str, shown: str) -> None:
    """Draw what a command has printed."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(f"$ apoq {command}", style="bold")
    console.print(Text.from_ansi(shown.rstrip()))
    name = command.split(maxsplit=1)[0]
    picture = console.export_svg(title="", theme=MONOKAI, unique_id=name)
    # The fonts that the reader has: a picture in the documentation loads nothing from elsewhere.
    picture = re.sub(r"@font-face \{.*?\}\n", "", picture, flags=re.DOTALL).replace(
        "Fira Code", "DejaVu Sans Mono"
    )
    (folder / f"{name}.svg").write_text(re.sub(r"[ \t]+\n", "\n", picture), "utf-8")


def draw_all(folder: Path) -> None:
    """Draw a worker, a failed task, statistics of busy queues, and what the doctor says about problems."""
    platform.node = lambda: HOST  # as the workers here register
    logging.disable()
    with PostgreSQL() as server, tempfile.TemporaryDirectory(prefix="shop") as application:
        engine = create_engine(server.url)
        prepare(engine)
        Path(application, "tasks.py").write_text(TASKS, "utf-8")
        with engine.begin() as connection:
            for number in (1, 2):
                Queue("shop").add(connection, "tasks.build_report", {"year": 2024 + number})
            failed = Queue("shop").add(connection, "tasks.send_receipt", {"order_id": 1652})
        command = "worker tasks:queue"
        draw(folder, command, run(command, server.url, application, interrupt_after="is tried again"))
        command = f"show {failed.id}"
        shown = run(command, server.url, application).replace(application, "/srv/shop").replace(ROOT, "…")
        draw(folder, command, shown)
        with engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM apoq_tasks")
        with busy(engine):
            for command in ("stats --types", "list --state failed --limit 5"):
                draw(folder, command, run(command, server.url, application))
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE apoq_tasks SET (autovacuum_enabled = false)")
            connection.exec_driver_sql("ALTER DATABASE postgres SET statement_timeout = '5s'")
            late = datetime.now(UTC) - timedelta(minutes=20)
            Queue("reports").add(connection, "build_report", process_at=late)
        engine.dispose()
        draw(folder, "doctor", run("doctor", server.url, application))


ROOT = str(Path(__file__).parents[2])

if __name__ == "__main__":
    draw_all(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
