"""The parts of a scenario: a database, processes that add tasks, worker processes, and the checks."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import psycopg

from benchmarks.contender import Contender
from benchmarks.contenders import contender
from benchmarks.process import Child
from benchmarks.server import Server
from benchmarks.sizes import Sizes

MIN_POLL_SECONDS: Final = 0.01
MAX_POLL_SECONDS: Final = 0.25
"""Bounds of the interval at which the progress of workers is polled."""

PREPARE_SECONDS: Final = 600
"""Time to create the tables: those of 200 schemas need a minute on a busy machine."""


class WrongCount(Exception):
    """A task was never handled, was handled more than once, or is not finished in the database."""


@dataclass
class Handled:
    """The tasks that workers have handled: their numbers, start times and durations."""

    numbers: array[int]
    started: array[float]
    took: array[float]


class Database:
    """A fresh database with the tables of one contender."""

    def __init__(
        self, url: str, who: type[Contender], folder: Path, connection: psycopg.Connection[Any]
    ) -> None:
        self.url, self.who, self.folder, self.connection = url, who, folder, connection

    def child(self, role: str, *, who: str = "", **task: Any) -> Child:
        return Child(role, contender=who or self.who.name, url=self.url, **task)

    def path(self) -> str:
        return str(self.folder / uuid4().hex)

    def value(self, query: str, *parameters: Any) -> Any:
        row = self.connection.execute(query, parameters or None).fetchone()
        assert row is not None
        return row[0]

    def fill(self, kind: str, count: int, first: int = 0) -> None:
        """Insert rows of a kind by SQL and vacuum the table, as if the rows had been there for a while."""
        self.connection.execute(self.who.fills[kind], {"count": count, "first": first})
        self.connection.execute(f"VACUUM ANALYZE {self.who.table}")

    def add(self, count: int, *, first: int = 0, step: int = 1) -> float:
        """Add tasks by the contender's own bulk call; return the seconds that it took."""
        # Procrastinate passes a whole batch to one function call, which is slow for large batches.
        portion = 1_000 if self.who.name == "Procrastinate" else 0
        with self.child("enqueue_bulk", first=first, count=count, portion=portion, step=step) as child:
            child.receive()
            return float(child.ask("go", 120 + count / 1_000)["seconds"])

    def checkpoint(self) -> None:
        """Let the server write all earlier changes to disk, so that this doesn't disturb the measurement."""
        with suppress(psycopg.errors.InsufficientPrivilege):
            self.connection.execute("CHECKPOINT")

    def settle(self) -> None:
        """Do the work that autovacuum would do with new rows."""
        self.connection.execute(f"VACUUM (ANALYZE) {self.who.table}")
        self.checkpoint()

    @contextmanager
    def workers(self, *, capacity: int, processes: int = 1, **options: Any) -> Iterator[Workers]:
        with ExitStack() as stack:
            paths = [self.path() for _ in range(processes)]
            children = [
                stack.enter_context(self.child("work", capacity=capacity + 1_000, path=path, **options))
                for path in paths
            ]
            for child in children:
                child.receive()
            yield Workers(self, children, paths)

    def check(self, handled: Handled, expected: Iterable[int]) -> None:
        """Raise `WrongCount` unless each expected task was handled once and is finished in the database."""
        wanted, found = sorted(expected), sorted(handled.numbers)
        if found != wanted:
            lost, twice = set(wanted) - set(found), len(found) - len(set(found))
            raise WrongCount(
                f"{self.who.name}: of {len(wanted)} tasks, {len(lost)} were never handled, "
                f"{twice} more than once"
            )
        self.check_finished(len(wanted))

    def check_finished(self, wanted: int) -> None:
        finished = self.value(self.who.finished)
        if finished != wanted:
            raise WrongCount(f"{self.who.name}: {finished} of {wanted} tasks are finished in the database")


class Workers:
    """Worker processes of one contender."""

    def __init__(self, database: Database, children: list[Child], paths: list[str]) -> None:
        self._database, self._children, self._paths = database, children, paths
        self.began = 0.0
        self._finished = False

    def go(self) -> None:
        self.began = time.monotonic()
        for child in self._children:
            child.say("go")

    def warm_up(self, count: int) -> None:
        """Let the workers run the tasks 0 to `count`, after which they have certainly started."""
        if count:
            self._database.add(count)
            self.wait_handled(count)
            self.wait_finished()

    def reports(self) -> list[dict[str, Any]]:
        """Return each worker's progress, CPU time and memory."""
        return self._ask_all("report")

    def _ask_all(self, word: str) -> list[dict[str, Any]]:
        for child in self._children:
            child.say(word)
        return [child.receive() for child in self._children]

    def wait_handled(self, count: int, timeout: float = 0.0) -> tuple[int, float]:
        """Wait until so many tasks have started; return their number, and the time at which it was read."""
        # Procrastinate has the lowest rate, some 400 tasks per second.
        end = time.monotonic() + (timeout or 60 + count / 100)
        pause, first_seen = MIN_POLL_SECONDS, 0.0
        while True:
            time.sleep(pause)
            responses = self._ask_all("count")
            begun = sum(response["count"] for response in responses)
            now = max(response["now"] for response in responses)
            if begun >= count:
                return begun, now
            # Each poll takes some of the time that is measured, and a late last poll adds to it. So there are
            # few polls, but none is expected to be late: the next one comes after a quarter of the estimated
            # time left, and after no more time than has been observed.
            if begun:
                first_seen = first_seen or now
                ran = now - first_seen
                left = (count - begun) * ran / begun
                pause = min(max(min(left / 4, ran), MIN_POLL_SECONDS), MAX_POLL_SECONDS)
            if now > end:
                raise WrongCount(
                    f"{self._database.who.name}: only {begun} of {count} tasks have started in time"
                )

    def wait_finished(self, timeout: float = 60) -> float:
        """Wait until the database has no unfinished task; return the time at which that was read."""
        connection, end = self._database.connection, time.monotonic() + timeout
        # By the partial indexes, because a scan of the whole table would disturb the measurement.
        connection.execute("SET enable_seqscan = off")
        while self._database.value(self._database.who.unfinished):
            if time.monotonic() > end:
                raise WrongCount(f"{self._database.who.name}: tasks were handled, but not finished in time")
            time.sleep(0.004)
        now = time.monotonic()
        self._finished = True
        connection.execute("RESET enable_seqscan")
        return now

    def stop(self) -> Handled:
        """End the workers, gracefully if a task is unfinished; return the tasks that they have handled."""
        handled = Handled(array("q"), array("d"), array("d"))
        for child in self._children:
            child.say("leave" if self._finished else "stop")
        for child, path in zip(self._children, self._paths, strict=True):
            count = child.receive()["count"]
            with Path(path).open("rb") as file:
                for column in (handled.numbers, handled.started, handled.took):
                    column.fromfile(file, count)
            Path(path).unlink()
        return handled


class Bench:
    """The server and the sizes of this run."""

    def __init__(self, server: Server, sizes: Sizes, folder: Path) -> None:
        self.server, self.sizes, self._folder = server, sizes, folder

    @contextmanager
    def database(self, name: str, *, counting: bool = False) -> Iterator[Database]:
        with (
            self.server.database(name, partial(_prepare, name), counting=counting) as url,
            psycopg.connect(url, autocommit=True) as connection,
        ):
            yield Database(url, contender(name), self._folder, connection)

    def count(self, name: str, size: int) -> int:
        """Return the number of tasks for this contender if others get `size`."""
        return max(50, round(size * contender(name).share))

    def drain(self, name: str, size: int, *, processes: int = 1, **options: Any) -> float:
        """Drain a backlog; return the tasks per second from the first start to the last settlement.

        The time until the first start is a scenario of its own. Here, it would only distort the rates of the
        contenders that need half a second for it.
        """
        count = self.count(name, size)
        with self.database(name) as database:
            if options.get("kind") == "session":
                database.connection.execute("CREATE TABLE effects (n bigint NOT NULL)")
            database.add(count)
            database.settle()
            with database.workers(capacity=count, processes=processes, **options) as workers:
                workers.go()
                workers.wait_handled(count)
                end = workers.wait_finished()
                handled = workers.stop()
            database.check(handled, range(count))
            if options.get("kind") == "session":
                effects = database.value("SELECT count(DISTINCT n) + count(*) FROM effects")
                if effects != 2 * count:
                    raise WrongCount(f"{name}: {effects / 2} effects of {count} tasks")
            return count / (end - min(handled.started))


def _prepare(name: str, url: str) -> None:
    with Child("prepare", contender=name, url=url) as child:
        child.receive(PREPARE_SECONDS)


def percentile(values: list[float], share: float) -> float:
    """Return the value that a `share` of the values don't exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def read_times(path: str) -> array[float]:
    """Read the times of commits that a process has written to a file."""
    times = array("d")
    times.frombytes(Path(path).read_bytes())
    Path(path).unlink()
    return times


def delays(handled: Handled, first: int, committed: array[float]) -> list[tuple[float, float]]:
    """Return the time of each commit, with the milliseconds until its task started."""
    return [
        (committed[number - first], (started - committed[number - first]) * 1_000)
        for number, started in zip(handled.numbers, handled.started, strict=True)
        if 0 <= number - first < len(committed) and committed[number - first]
    ]
