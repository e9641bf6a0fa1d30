"""The steps from the commit of a task in one process to the processor of an idle worker in another."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from apoq import Queue, Worker, database_url, prepare
from apoq.embedded import PostgreSQL
from apoq.worker.claiming import claim_statement, listener

TASKS = 300
PAUSE = 0.02
"""Seconds between two tasks, in which the machine is idle."""

WARM_UP = 20

Event = tuple[str, float]


def _work(url: str, parent: Connection) -> None:
    """Run tasks in a process of its own, and send the events with their times."""
    events: list[Event] = []

    def record(owner: Any, name: str, before: str | None, after: str) -> None:
        function = getattr(owner, name)

        def recorded(*arguments: Any, **options: Any) -> Any:
            if before:
                events.append((before, time.monotonic()))
            result = function(*arguments, **options)
            events.append((after, time.monotonic()))
            return result

        setattr(owner, name, recorded)

    record(listener.ListeningConnection, "wait", None, "notified")
    record(claim_statement, "execute", "claiming", "claimed")
    engine = sa.create_engine(database_url(url))
    worker = Worker(engine)
    worker.use("bench", lambda _task: events.append(("started", time.monotonic())))
    worker.start()
    parent.send(None)
    parent.recv()
    worker.stop()
    parent.send(events)


def _parts(committed: float, events: list[Event], following: float) -> tuple[float, ...] | None:
    """Return the times between the commit, the notification, the claim, its result and the processor."""
    started = next((at for name, at in events if name == "started" and committed < at < following), None)
    if started is None:
        return None
    times = [committed]
    at = started
    for name in ("claimed", "claiming", "notified"):
        at = max((when for what, when in events if what == name and when <= at), default=committed)
        times.insert(1, at)
    return tuple(later - earlier for earlier, later in zip(times, [*times[1:], started], strict=True))


def _after_pause(url: str, statement: str) -> float:
    """Return the milliseconds that a statement takes after a pause."""
    took = []
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        for _ in range(TASKS // 3):
            time.sleep(PAUSE)
            began = time.perf_counter()
            connection.pgconn.exec_(statement.encode())
            took.append((time.perf_counter() - began) * 1e3)
    return statistics.median(took)


def show() -> None:
    """Add tasks to an idle worker, and print the medians."""
    context = multiprocessing.get_context("spawn")
    with PostgreSQL() as server:
        engine = sa.create_engine(database_url(make_url(server.url)))
        prepare(engine)
        ours, its = context.Pipe()
        child = context.Process(target=_work, args=(server.url, its))
        child.start()
        ours.recv()
        time.sleep(0.5)
        queue, committed = Queue(), []
        for number in range(TASKS):
            with Session(engine) as session:
                queue.add(session, "bench", number)
                session.commit()
            committed.append(time.monotonic())
            time.sleep(PAUSE)
        time.sleep(0.5)
        ours.send(None)
        events = ours.recv()
        child.join()
        engine.dispose()
        found = [
            parts
            for at, following in zip(committed, [*committed[1:], float("inf")], strict=True)
            if (parts := _parts(at, events, following))
        ][WARM_UP:]
        print(f"{'latency: ms':36}{'median':>15}")
        names = ("notification received", "claim sent", "claim returned", "processor started")
        for name, column in zip(names, zip(*found, strict=True), strict=True):
            print(f"{name:36}{statistics.median(column) * 1e3:15.2f}")
        print(f"{'in total':36}{statistics.median(map(sum, found)) * 1e3:15.2f}")
        for name, statement in (
            ("SELECT 1 after the same pause", "SELECT 1"),
            (
                "a commit that is written to disk",
                "SELECT txid_current(), pg_logical_emit_message(true, '', 'x')",
            ),
        ):
            print(f"{name:36}{_after_pause(server.url, statement):15.2f}")
