"""A private server, worker processes that record what they run, and figures."""

from __future__ import annotations

import multiprocessing
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple, Self

import sqlalchemy as sa
from prometheus_client import start_http_server
from sqlalchemy.orm import Session

from apoq import Limit, Queue, RunningTask, Worker, database_url, prepare
from apoq.embedded import PostgreSQL
from benchmarks.bench import percentile

START_SECONDS: Final = 60.0
RUN_SECONDS: Final = 900.0
"""Longest time that a measurement waits for its tasks."""

SCRAPE_SECONDS: Final = 0.5
"""Seconds between two scrapes of a worker's metrics."""


class Run(NamedTuple):
    """A task that a worker process has run, with times of the machine's monotonic clock."""

    type: str
    id: int
    number: int
    started: float
    ended: float
    started_at: float
    """By the wall clock, as the server's times."""


class Figure(NamedTuple):
    """A measured value, and the bound that it should keep."""

    title: str
    value: float
    unit: str
    bound: str = ""


@dataclass(frozen=True)
class Crew:
    """What a worker process runs."""

    types: Mapping[str, float]
    """The seconds that a task of each type takes."""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    concurrency: int = 4
    has_metrics: bool = False


class WorkerProcess:
    """A worker in a process of its own."""

    def __init__(self, url: str, crew: Crew) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(url, crew, theirs), daemon=True)
        self._process.start()

    def wait_until_ready(self) -> None:
        """Wait until the worker has started."""
        assert self._pipe.poll(START_SECONDS), "the worker has not started"
        self._pipe.recv()

    def count(self, type_: str) -> int:
        """Return how many tasks of a type have ended."""
        self._pipe.send(type_)
        return int(self._pipe.recv())

    def stop(self) -> list[Run]:
        """Stop the worker, and return what it has run."""
        self._pipe.send(None)
        runs: list[Run] = self._pipe.recv()
        self._process.join()
        return runs


def _work(url: str, crew: Crew, parent: Connection) -> None:
    runs: dict[str, list[Run]] = {type_: [] for type_ in crew.types}
    worker = Worker(
        sa.create_engine(url),
        Queue(),
        concurrency=crew.concurrency,
        metrics=crew.has_metrics,
        keep_completed=None,
    )
    for type_, seconds in crew.types.items():
        worker.use(type_, _processor(runs[type_], seconds), limit=crew.limits.get(type_))
    worker.start()
    if worker.metrics is not None:
        server, _ = start_http_server(0, "127.0.0.1", worker.metrics)
        address = f"http://127.0.0.1:{server.server_port}/metrics"
        threading.Thread(target=_scrape, args=(address,), daemon=True).start()
    parent.send("ready")
    while (type_ := parent.recv()) is not None:
        parent.send(len(runs[type_]))
    worker.stop()
    parent.send([run for its in runs.values() for run in its])


def _scrape(address: str) -> None:
    while True:
        with urllib.request.urlopen(address) as response:  # noqa: S310 - our own
            response.read()
        time.sleep(SCRAPE_SECONDS)


def _processor(runs: list[Run], seconds: float) -> Callable[[RunningTask], None]:
    def process(task: RunningTask) -> None:
        started, started_at = time.monotonic(), time.time()
        if seconds:
            time.sleep(seconds)
        number = task.data if isinstance(task.data, int) else 0
        runs.append(Run(task.type, task.id, number, started, time.monotonic(), started_at))

    return process


class Laboratory:
    """A private server with PostgreSQL's default settings, and apoq's tables."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        server = self._stack.enter_context(PostgreSQL())
        self.url = database_url(server.url).render_as_string(hide_password=False)
        self.engine = sa.create_engine(self.url, pool_size=20)
        self._stack.callback(self.engine.dispose)
        self.queue = Queue()
        self.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def clear(self) -> None:
        """Create the tables again, empty."""
        with self.engine.begin() as connection:
            connection.exec_driver_sql("DROP SCHEMA public CASCADE")
            connection.exec_driver_sql("CREATE SCHEMA public")
        prepare(self.engine)

    def size(self, count: int, least: int = 1) -> int:
        """Return a number of tasks for this scale."""
        return max(least, round(count * self.scale))

    def add(self, type_: str, numbers: range, **options: Any) -> None:
        """Add tasks of a type in one transaction."""
        with Session(self.engine) as session, session.begin():
            self.queue.add_many(session, type_, list(numbers), **options)

    def value(self, query: str) -> Any:
        """Return the result of a query."""
        return self.execute(query).scalar_one()

    def execute(self, statement: str) -> sa.CursorResult[Any]:
        """Execute a statement outside of a transaction."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            return connection.exec_driver_sql(statement)

    def settle(self) -> None:
        """Do the work that autovacuum would do with new rows, and write them to disk."""
        self.execute("VACUUM (ANALYZE) apoq_tasks")
        self.execute("CHECKPOINT")

    @contextmanager
    def workers(self, *crews: Crew) -> Iterator[list[WorkerProcess]]:
        """Start a worker process for each crew."""
        found = [WorkerProcess(self.url, crew) for crew in crews]
        for worker in found:
            worker.wait_until_ready()
        yield found

    def run(self, *crews: Crew, wait_for: Mapping[str, int]) -> list[Run]:
        """Let workers run until they have ended so many tasks of each type; return what they have run."""
        with self.workers(*crews) as workers:
            wait_for_runs(workers, wait_for)
            return [run for worker in workers for run in worker.stop()]


def wait_for_runs(workers: list[WorkerProcess], counts: Mapping[str, int]) -> None:
    """Wait until so many tasks of each type have ended."""
    deadline = time.monotonic() + RUN_SECONDS
    for type_, count in counts.items():
        while (found := sum(worker.count(type_) for worker in workers)) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{found} of {count} tasks of the type {type_} have ended")
            time.sleep(0.02)


def rate(runs: list[Run]) -> float:
    """Return how many of these tasks were run per second."""
    return len(runs) / (max(run.ended for run in runs) - min(run.started for run in runs))


def percentiles(title: str, seconds: list[float], *bounds: str) -> list[Figure]:
    """Return the median and the 99th percentile of times, in milliseconds."""
    return [
        Figure(f"{title}, p{share}", percentile(seconds, share / 100) * 1e3, "ms", bound)
        for share, bound in zip((50, 99), (*bounds, "", "")[:2], strict=True)
    ]
