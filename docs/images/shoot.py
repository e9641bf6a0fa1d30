"""Takes the screenshots of the dashboard in this folder, of a real run on a private PostgreSQL.

python docs/images/shoot.py [FOLDER]

It needs Playwright and Chromium: ``pip install playwright pillow``; CHROMIUM is the path of the browser.
"""

# ruff: noqa: INP001 - a script

from __future__ import annotations

import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.orm import Session

from apoq import Limit, Queue, RunningTask, Worker, prepare
from apoq.dashboard import app
from apoq.embedded import PostgreSQL

ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
HOST = "web-1"
WIDE, NARROW = 1280, 400
PAGES = {
    "overview": "",
    "queue": "queue?name=emails",
    "tasks": "tasks?state=failed",
    "task": "tasks/{failed}",
    "running": "tasks/{running}",
    "waiting": "tasks?state=waiting",
    "graph": "tasks/{graph}",
    "failures": "failures",
    "keys": "keys",
    "limit": "limit?queue=emails&of=key&name=tenant-7&at_most=0",
    "schedules": "schedules",
    "workers": "workers",
    "doctor": "doctor",
    "many": "many?action=retry&state=failed",
    "missing": "tasks/99999999",
}
"""The pages by the name of their picture."""

PUBLISHED = {"dashboard-overview": "overview", "dashboard-task": "task", "dashboard-keys": "keys"}
"""The pictures of the documentation."""


EARLIER = """
    UPDATE apoq_tasks SET completed_at = now() - (power(random(), 1.7) * interval '59 minutes')
    WHERE state = 'completed' AND mod(id, 9) > 0
"""
PLACES = "UPDATE apoq_tasks SET error = replace(error::text, "
"""Some history, and the paths of a server instead of those of this file."""


class MailboxFull(Exception):
    """The error of some tasks."""


def send(task: RunningTask) -> None:
    """Take a moment, and fail now and then."""
    time.sleep(0.002)
    if task.data["user_id"] % 90 == 0:
        raise MailboxFull(f"552 mailbox of user {task.data['user_id']} is full")


def invoice(task: RunningTask) -> None:
    """Fail each time."""
    raise ConnectionError(f"the mail server is away: invoice {task.data['invoice']}")


def report(task: RunningTask) -> None:
    """Run for as long as the worker does."""
    while not task.should_stop:
        time.sleep(0.05)


MAILS = ("send_welcome", "send_invoice")


def book(task: RunningTask) -> None:
    """Fail, so that the other tasks of the key are held up."""
    raise MailboxFull(f"the entry {task.data['entry']} has no account")


def fill(engine: Engine) -> dict[str, int]:
    """Have queues with something in each state."""
    emails, reports, imports = Queue("emails"), Queue("reports"), Queue("imports")
    with Session(engine) as session, session.begin():
        reports.add_many(session, "build_report", [{"month": f"2026-{month:02}"} for month in range(1, 13)])
        emails.add_many(session, "send_welcome", [{"user_id": n} for n in range(8, 1_500)])
        emails.add_many(session, "send_newsletter", [{"issue": 7}] * 1_200, delay=timedelta(hours=3))
        imports.add_many(session, "import_file", [{"file": f"s3://in/{n}.csv"} for n in range(40)])
        imports.schedule(session, "nightly-import", "import_file", {"file": "all"}, cron="0 3 * * *")
        emails.schedule(session, "digest", "send_digest", every=timedelta(minutes=15))
        imports.pause(session, reason="the warehouse is being migrated")
        failed = emails.add(
            session,
            "send_invoice",
            {"invoice": 1652, "to": "ada@example.org", "api_token": "s3cr3t", "lines": [1, 2, 3]},
            unique_key="invoice-1652",
            meta={"request_id": "4f1c9a", "tenant": "acme"},
        )
        emails.add_many(session, "send_invoice", [{"invoice": n} for n in range(1_653, 1_659)])
        emails.add_many(session, "charge", [{"amount": n} for n in range(9)], key="tenant-7")
        emails.add_many(session, "charge", [{"amount": n} for n in range(2)], key="tenant-8")
        emails.add_many(session, "book", [{"entry": n} for n in range(4)], key="account-12")
        emails.limit(session, 0, type="send_campaign")
        emails.limit(session, 5, key="tenant-9")
        order = emails.add(session, "send_welcome", {"user_id": 7})
        mails = [emails.add(session, name, {"user_id": 7, "invoice": 7}, after=[order]) for name in MAILS]
        done = emails.add(session, "close_order", after=mails, on_parent_failure="hold")
        followed = emails.add(session, "send_survey", after=[done])
        emails.add_many(session, "send_reminder", [{}] * 30, after=[followed])
    return {"failed": failed.id, "graph": done.id}


@contextmanager
def working(engine: Engine) -> Iterator[None]:
    """Have workers."""
    emails = Worker(engine, Queue("emails"), concurrency=12)
    workers = [emails, Worker(engine, Queue("reports"), concurrency=2)]
    emails.use("charge", report, limit=Limit(2, key=True))
    strict = Limit(1, key=True, order="strict", after_failure="hold")
    emails.use("book", book, retry_limit=0, limit=strict)
    for worker in workers:
        worker.use("send_welcome", send, retry_limit=0)
        worker.use("send_invoice", invoice, retry_limit=1, retry_delay=0.2)
        worker.use("build_report", report)
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.stop(timeout=1)


@contextmanager
def serving(application: Any) -> Iterator[str]:
    """Serve the dashboard on a free port, and yield its address."""
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def shoot(address: str, ids: dict[str, int], folder: Path) -> None:
    """Take all pictures: narrow and wide, light and dark."""
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        for width in (WIDE, NARROW):
            for scheme in ("light", "dark"):
                page = browser.new_page(
                    viewport={"width": width, "height": 800 if width == WIDE else 1000}, color_scheme=scheme
                )
                for name, path in PAGES.items():
                    page.goto(address + path.format(**ids))
                    at = folder / f"{name}-{width}-{scheme}.png"
                    page.screenshot(path=at, full_page=width == WIDE)
                    wide = page.evaluate("document.documentElement.scrollWidth")
                    if wide > width:
                        print(f"{at.name}: {wide} pixels wide")  # noqa: T201
                page.close()
        browser.close()


def publish(address: str, ids: dict[str, int], folder: Path) -> None:
    """Take the pictures of the documentation."""
    with sync_playwright() as playwright:
        chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1100, "height": 620})
        for name, of in PUBLISHED.items():
            page.goto(address + PAGES[of].format(**ids))
            page.screenshot(path=folder / f"{name}.png")
            with Image.open(folder / f"{name}.png") as picture:
                picture.quantize(128).save(folder / f"{name}.png", optimize=True)
        browser.close()


def main(folder: Path, *, every: bool) -> None:
    """Fill a server, and take the pictures."""
    platform.node = lambda: HOST  # as the workers here register
    logging.disable()
    with PostgreSQL() as server:
        engine = create_engine(make_url(server.url))
        prepare(engine)
        ids = fill(engine)
        with working(engine):
            time.sleep(12)
            with engine.begin() as connection:
                connection.exec_driver_sql(EARLIER)
                connection.exec_driver_sql(f"{PLACES}'{Path(__file__)}', '/srv/shop/tasks.py')::jsonb")
                running = "SELECT min(id) FROM apoq_tasks WHERE state = 'running'"
                ids["running"] = connection.exec_driver_sql(running).scalar_one()
            dashboard = app(engine, authorize=lambda _request: "write", environment="staging")
            with serving(dashboard) as address:
                (shoot if every else publish)(address, ids, folder)
        engine.dispose()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent, every=bool(sys.argv[1:]))
