"""Where a task's way goes, from its commit in one process to the processor of an idle worker in another."""

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
from apoq.worker.claiming import claimer, listener

TASKS = 300
PAUSE = 0.02
"""Seconds between two of them, in which the machine rests."""

WARM_UP = 20

Event = tuple[str, float]


def _work(url: str, parent: Connection) -> None:
    """Work tasks, and answer what happened when: in a process of its own."""
    events: list[Event] = []

    def note(owner: Any, name: str, before: str | None, after: str) -> None:
        function = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            if before:
                events.append((before, time.monotonic()))
            answer = function(*arguments, **options)
            events.append((after, time.monotonic()))
            return answer

        setattr(owner, name, noted)

    note(listener.ListeningConnection, "wait", None, "heard")
    note(claimer, "execute", "claims", "claimed")
    engine = sa.create_engine(database_url(url))
    worker = Worker(engine)
    worker.use("bench", lambda _task: events.append(("begins", time.monotonic())))
    worker.start()
    parent.send(None)
    parent.recv()
    worker.stop()
    parent.send(events)


def _parts(committed: float, events: list[Event], following: float) -> tuple[float, ...] | None:
    """Answer the times between a commit, the notification, the claim, its answer and the processor."""
    begins = next((at for name, at in events if name == "begins" and committed < at < following), None)
    if begins is None:
        return None
    ways = [committed]
    at = begins
    for name in ("claimed", "claims", "heard"):
        at = max((when for what, when in events if what == name and when <= at), default=committed)
        ways.insert(1, at)
    return tuple(later - sooner for sooner, later in zip(ways, [*ways[1:], begins], strict=True))


def _rested(url: str, statement: str) -> float:
    """Answer the milliseconds that a statement takes after a pause."""
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
        names = ("the notification is heard", "the claim is sent", "it is answered", "the processor begins")
        for name, column in zip(names, zip(*found, strict=True), strict=True):
            print(f"{name:36}{statistics.median(column) * 1e3:15.2f}")
        print(f"{'all of it':36}{statistics.median(map(sum, found)) * 1e3:15.2f}")
        for name, statement in (
            ("SELECT 1 after such a pause", "SELECT 1"),
            (
                "a commit that is written to disk",
                "SELECT txid_current(), pg_logical_emit_message(true, '', 'x')",
            ),
        ):
            print(f"{name:36}{_rested(server.url, statement):15.2f}")
