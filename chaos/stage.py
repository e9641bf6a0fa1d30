"""Where a scenario takes place: a database, workers, enqueuing processes, and somebody who watches."""

from __future__ import annotations

import shutil
import signal
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psycopg
import sqlalchemy as sa

from apoq import Queue, prepare
from benchmarks.process import Child
from chaos.proxy import Proxy
from chaos.server import Server, until
from chaos.watcher import WORKERS, Victim, Watcher

OFFERERS = 2
SLOTS = 4 * WORKERS
PATIENCE = 60.0
"""Seconds for which a recovery is waited for."""

STEADY = 3.0
"""Seconds for which full speed must last to count; it counts from when it began."""

UNFINISHED = """
    SELECT type, state, left(worker_id::text, 4), token, fail_count, count(*), min(process_at)::text
    FROM apoq_tasks WHERE state <> 'completed' GROUP BY 1, 2, 3, 4, 5 ORDER BY 6 LIMIT 20
"""

FOUND = """
    WITH tasks AS MATERIALIZED (
        SELECT (data->>'number')::bigint AS number, type, state, attempt, token, fail_count FROM apoq_tasks
    ), effects AS MATERIALIZED (SELECT number, count(*) AS times FROM ledger GROUP BY number)
    SELECT
        (SELECT count(*) FROM offered WHERE sure) AS offered,
        (SELECT count(*) FROM offered WHERE NOT sure) AS maybe,
        count(*) FILTER (WHERE state = 'completed') AS completed,
        (SELECT count(*) FROM offered WHERE sure AND number NOT IN (SELECT number FROM tasks))
            + count(*) FILTER (WHERE state <> 'completed') AS lost,
        count(*) FILTER (WHERE times > 1)
            + (SELECT count(*) FROM effects WHERE number NOT IN (SELECT number FROM tasks)) AS doubled,
        count(*) FILTER (WHERE state = 'completed' AND type <> 'noop' AND times IS NULL) AS effects_lost,
        coalesce(sum(attempt - 1) FILTER (WHERE state = 'completed'), 0)::bigint AS wasted,
        coalesce(sum(token - 1) FILTER (WHERE token > 0), 0)::bigint AS claimed_again,
        coalesce(sum(fail_count), 0)::bigint AS failures
    FROM tasks LEFT JOIN effects USING (number)
"""


class Process(Child):
    """A worker or an enqueuing process."""

    program = "chaos.child"

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        return self._process.wait(seconds)


@dataclass
class Worker:
    """A worker's process, and its own way to the server, where there is one."""

    process: Process
    proxy: Proxy | None
    environment: dict[str, str]


class Stage:
    """One scenario's processes and their load, from their start to the count of what came of it."""

    def __init__(self, server: Server, name: str, folder: Path, rate: float) -> None:
        self.server = server
        self.rate = rate
        self.workers: list[Worker] = []
        self.way: Proxy | None = None
        """The enqueuing processes' own way to the server."""
        self.pooler_port: int | None = None
        """Where the workers connect to, if not straight to the server."""
        self.full_speed: list[float | None] = []
        self.all_work: list[float | None] = []
        self.memory: tuple[float, float] | None = None
        self.stack = ExitStack()
        self._name = name
        self._folder = folder
        self._offerers: list[Process] = []
        self._offered: list[int] = []
        self._begun = 0

    def __enter__(self) -> Self:
        with self.server.admin() as admin:
            admin.execute(f"DROP DATABASE IF EXISTS {self._name} WITH (FORCE)")
            admin.execute(f"CREATE DATABASE {self._name} OWNER app")
        engine = sa.create_engine(self.server.url(self._name))
        prepare(engine)
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE ledger (number bigint NOT NULL)"))
        engine.dispose()
        shutil.rmtree(self._folder, ignore_errors=True)  # an earlier run's
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def begin(self, *, proxies: bool = False, environments: tuple[dict[str, str], ...] = ()) -> None:
        """Start workers, load and watcher, and wait until all run at full speed."""
        for number in range(WORKERS):
            proxy = self._proxy() if proxies else None
            environment = environments[number] if environments else {}
            self.workers.append(Worker(self._new_worker(proxy, environment), proxy, environment))
        until(lambda: self._ask("SELECT count(*) FROM apoq_workers")[0][0] == WORKERS)
        for number in range(1, OFFERERS + 1):
            url = self.server.url(self._name, self.way.port if self.way else None)
            rate, folder = self.rate / OFFERERS, str(self._folder)
            offerer = self._start("offer", url=url, first=number * 10**9, rate=rate, folder=folder)
            offerer.answer()
            self._offerers.append(offerer)
        self._watcher = Watcher(self._name, self.rate, lambda: self.server)
        self.stack.callback(self._watcher.stop)
        began = time.monotonic()
        until(lambda: self._watcher.since(began, 1.0, lambda sample: sample.all_work) is not None)

    def lead_all_by_proxy(self) -> None:
        """Let the enqueuing processes come through a proxy, too; before `begin`."""
        self.way = self._proxy()

    def hold_each(self) -> None:
        """Give each worker a task that it keeps until the end, so that one sees when another has it."""
        query = """
            SELECT number, row_number() OVER (PARTITION BY worker_id ORDER BY number), state FROM (
                SELECT (data->>'number')::bigint AS number, worker_id, state FROM apoq_tasks
                WHERE type = 'hold' AND state IN ('pending', 'running')
            ) AS holds
        """
        held: list[Any] = []
        while len(held) < WORKERS:
            self._hold()
            until(lambda: all(state == "running" for _, _, state in self._ask(query)))
            # Those that came to a worker that has one are ended.
            rows = self._ask(query)
            held = [number for number, place, _ in rows if place == 1]
            for number, place, _ in rows:
                if place > 1:
                    self._release(number)

    def strike(self, worker: Worker, act: Callable[[], object]) -> float:
        """Do this to a worker, and watch when what it held runs anew; answer when it was done."""
        query = "SELECT id FROM apoq_workers WHERE pid = %s ORDER BY started_at DESC LIMIT 1"
        found = self._ask(query, worker.process.pid)
        act()
        now = time.monotonic()
        if found:
            query = "SELECT id, token FROM apoq_tasks WHERE state = 'running' AND worker_id = %s"
            held = self._ask(query, found[0][0])
            self._watcher.victims.append(Victim(now, [row[0] for row in held], [row[1] for row in held]))
        return now

    def replace(self, worker: Worker) -> None:
        """Start a new process in a worker's place, as its supervisor would."""
        worker.process = self._new_worker(worker.proxy, worker.environment)

    def await_recovery(self, since: float) -> None:
        """Wait until the victims' tasks run elsewhere and all is at full speed, and note since when."""
        deadline = time.monotonic() + PATIENCE
        full = all_work = None
        while full is None or all_work is None or self._watcher.left:
            if time.monotonic() > deadline:
                self._complain("not so well")
                break
            time.sleep(0.1)
            full = self._watcher.since(since, STEADY, lambda sample: sample.is_full)
            all_work = self._watcher.since(since, STEADY, lambda sample: sample.all_work)
        self.full_speed.append(full)
        self.all_work.append(all_work)

    def note(self, what: str) -> None:
        """Write down what happens, beside the workers' logs."""
        with (self._folder / "faults.log").open("a") as file:
            file.write(f"{time.strftime('%X')} {what}\n")

    def _complain(self, what: str) -> None:
        """Write down what there is to see, and the workers' stacks beside their logs."""
        self.note(f"{what}: {self._ask(UNFINISHED)}")
        for worker in self.workers:
            worker.process.send(signal.SIGUSR1)
        time.sleep(0.2)

    def finish(self) -> dict[str, Any]:
        """Offer no more, let the workers end what there is, and count."""
        for offerer in self._offerers:
            offerer.say("stop")
        for offerer in self._offerers:
            offerer.answer()
        for number in range(len(self._offered)):
            self._release(number)
        self._end_all()
        found = self._count()
        elsewhere = [victim.seconds for victim in self._watcher.victims]
        return {
            **found,
            "elsewhere": None if not elsewhere else _longest(elsewhere),
            "full_speed": _longest(self.full_speed),
            "all_work": _longest(self.all_work),
            "memory": self.memory,
            "slots": self._muster(),
        }

    def _end_all(self) -> None:
        unfinished = "SELECT count(*) FROM apoq_tasks WHERE state IN ('pending', 'running')"
        with suppress(TimeoutError):
            until(lambda: self._ask(unfinished)[0][0] == 0, PATIENCE)

    def _muster(self) -> int:
        """Answer how many slots can still run a task: none may be left waiting for what never comes."""
        running = "SELECT count(*) FROM apoq_tasks WHERE type = 'hold' AND state = 'running'"
        for _ in range(SLOTS):
            self._hold()
        with suppress(TimeoutError):
            until(lambda: self._ask(running)[0][0] == SLOTS, 15)
        found: int = self._ask(running)[0][0]
        if found < SLOTS:
            self._complain("not all slots work")
        return found

    def _hold(self) -> None:
        number = len(self._offered)
        with psycopg.connect(self.server.url(self._name).replace("+psycopg", "")) as connection:
            Queue().add(connection, "hold", {"number": number}, priority=1)
        self._offered.append(number)

    def _release(self, number: int) -> None:
        (self._folder / f"release-{number}").touch()

    def _count(self) -> dict[str, Any]:
        with self.server.admin(self._name) as admin:
            admin.execute("CREATE TABLE offered (number bigint, sure boolean)")
            admin.execute("SET work_mem = '256MB'")  # so that NOT IN looks things up
            with admin.cursor() as cursor, cursor.copy("COPY offered FROM STDIN") as copy:
                for number in self._offered:
                    copy.write_row((number, True))
                for path in [*self._folder.glob("sure-*"), *self._folder.glob("unsure-*")]:
                    for number in array("q", path.read_bytes()):
                        copy.write_row((number, path.name.startswith("sure")))
            cursor = admin.execute(FOUND)
            row = cursor.fetchone()
            assert row is not None
            assert cursor.description is not None
            return dict(zip((column.name for column in cursor.description), row, strict=True))

    def _proxy(self) -> Proxy:
        proxy = Proxy(self.server.port)
        self.stack.callback(proxy.close)
        return proxy

    def _new_worker(self, proxy: Proxy | None, environment: dict[str, str]) -> Process:
        url = self.server.url(self._name, proxy.port if proxy else self.pooler_port)
        direct = self.server.url(self._name) if self.pooler_port else None
        return self._start("work", url=url, direct=direct, folder=str(self._folder), environment=environment)

    def _start(self, role: str, **task: Any) -> Process:
        self._begun += 1
        process = Process(role, log=str(self._folder / f"{self._begun:02}-{role}.log"), **task)
        self.stack.push(process)
        # Whatever state it is in: what was to be shown has been.
        self.stack.callback(process.send, signal.SIGKILL)
        return process

    def _ask(self, query: str, *parameters: object) -> list[Any]:
        with self.server.admin(self._name) as admin:
            return admin.execute(query, parameters or None).fetchall()


def _longest(seconds: list[float | None]) -> float | None:
    """Answer the longest of these; infinity where one never came to its end."""
    return max((float("inf") if one is None else one for one in seconds), default=None)
