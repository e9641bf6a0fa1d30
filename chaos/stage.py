"""The setting of a scenario: a database, workers, enqueuing processes, and a watcher."""

from __future__ import annotations

import math
import shutil
import signal
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from apoq import prepare
from benchmarks.process import Child
from chaos.proxy import Proxy
from chaos.server import NOTHING, Server, until
from chaos.watcher import MAX_OF_KEY, WORKERS, Victim, Watcher

OFFERERS = 2
SLOTS = 4 * WORKERS
PATIENCE = 60.0
"""Seconds to wait for a recovery."""

LIMITS: Mapping[str, float] = {
    "lost": 0,
    "failed": 0,
    "doubled": 0,
    "overshot": 0,
    "effects_lost": 0,
    "elsewhere": 20,
    "full_speed": 5,
}
"""Maximum values of the counts, unless a scenario has others; times are in seconds.

`elsewhere` is the time until a lost worker's tasks run again. `full_speed` is the time from the end of the
fault until all tasks are completed at the offered rate.
"""

STEADY = 3.0
"""Seconds for which full speed must last to count; the time of recovery is when it began."""

UNFINISHED = """
    SELECT type, state, left(worker_id::text, 4), claim_token, fail_count, count(*), min(process_at)::text
    FROM tasks WHERE state <> 'completed' GROUP BY 1, 2, 3, 4, 5 ORDER BY 6 LIMIT 20
"""

FOUND = """
    WITH found AS MATERIALIZED (
        SELECT (data->>'number')::bigint AS number, type, state, attempt, claim_token, fail_count,
            rescue_count
        FROM tasks
    ), effects AS MATERIALIZED (SELECT number, count(*) AS times FROM ledger GROUP BY number)
    SELECT
        (SELECT count(*) FROM offered WHERE sure) AS offered,
        (SELECT count(*) FROM offered WHERE NOT sure) AS maybe,
        count(*) FILTER (WHERE state = 'completed') AS completed,
        (SELECT count(*) FROM offered WHERE sure AND number NOT IN (SELECT number FROM found))
            + count(*) FILTER (WHERE state NOT IN ('completed', 'failed')) AS lost,
        count(*) FILTER (WHERE state = 'failed') AS failed,
        count(*) FILTER (WHERE times > 1)
            + (SELECT count(*) FROM effects WHERE number NOT IN (SELECT number FROM found)) AS doubled,
        count(*) FILTER (
            WHERE state = 'completed' AND type IN ('ledger', 'hold') AND times IS NULL
        ) AS effects_lost,
        coalesce(sum(attempt - 1) FILTER (WHERE state = 'completed'), 0)::bigint AS wasted,
        coalesce(sum(claim_token - 1) FILTER (WHERE claim_token > 0), 0)::bigint AS claimed_again,
        coalesce(sum(fail_count), 0)::bigint AS failures,
        coalesce(sum(rescue_count), 0)::bigint AS rescued
    FROM found LEFT JOIN effects USING (number)
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
    """A worker's process, and its own proxy to the server, if there is one."""

    process: Process
    proxy: Proxy | None
    settings: dict[str, Any]
    """Arguments of its process, in addition to the server's URL."""


class Stage:
    """The processes of a scenario and their load, from their start to the final counts.

    The load is spread over the default schema and `schemas`. The view `tasks` has the tasks of all schemas.
    """

    def __init__(
        self, server: Server, name: str, folder: Path, rate: float, schemas: Sequence[str] = ()
    ) -> None:
        self.server = server
        self.name = name
        self.rate = rate
        self.workers: list[Worker] = []
        self.load_proxy: Proxy | None = None
        """The proxy of the enqueuing processes, if they have one."""
        self.pooler_port: int | None = None
        """The port to which the workers connect, if not directly to the server."""
        self.full_speed: list[float | None] = []
        self.all_work: list[float | None] = []
        self.limits = dict(LIMITS)
        self.stack = ExitStack()
        self._schemas = schemas
        self._folder = folder
        self._offerers: list[Process] = []
        self._offered = 0
        self._held: list[int] = []
        self._expected: dict[str, float] = {}
        self._begun = 0

    def __enter__(self) -> Self:
        with self.server.admin() as admin:
            admin.execute(f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)")
            admin.execute(f"CREATE DATABASE {self.name} OWNER app")
        for schema in (None, *self._schemas):
            self.prepare(schema)
        tables = [f"SELECT * FROM {schema}.apoq_tasks" for schema in ("public", *self._schemas)]
        with self.server.admin(self.name) as admin:
            admin.execute(f"CREATE VIEW tasks AS {' UNION ALL '.join(tables)}")
            admin.execute("CREATE TABLE ledger (number bigint NOT NULL)")
            admin.execute("GRANT INSERT ON ledger TO app")
        shutil.rmtree(self._folder, ignore_errors=True)  # of an earlier run
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def prepare(self, schema: str | None) -> None:
        """Create apoq's tables in a schema, as the application would."""
        engine = sa.create_engine(self.server.url(self.name))
        if schema:
            with engine.begin() as connection:
                connection.execute(sa.schema.CreateSchema(schema))
        prepare(engine, schema=schema)
        engine.dispose()

    def begin(
        self,
        *,
        proxies: bool = False,
        speed: float = math.inf,
        workers: Sequence[Mapping[str, Any]] = [NOTHING] * WORKERS,
        load: Mapping[str, Any] = NOTHING,
    ) -> None:
        """Start workers, load and watcher, and wait until all workers run at full speed.

        With `proxies`, each worker has its own proxy to the server, with a `speed` in bytes per second.
        `workers` are the settings of each worker, and `load` those of the enqueuing processes.
        """
        for settings in workers:
            proxy = self._proxy(speed) if proxies else None
            own = {"schemas": [None, *self._schemas], **settings}
            self.workers.append(Worker(self._new_worker(proxy, own), proxy, own))
        until(lambda: self.ask("SELECT count(*) FROM apoq_workers")[0][0] == len(self.workers))
        for number in range(1, OFFERERS + 1):
            offerer = self._start(
                "offer",
                url=self.server.url(self.name, self.load_proxy.port if self.load_proxy else None),
                first=number * 10**9,
                rate=self.rate / OFFERERS,
                folder=str(self._folder),
                schemas=[None, *self._schemas],
                **load,
            )
            offerer.receive()
            self._offerers.append(offerer)
        self._watcher = Watcher(self.name, self.rate, lambda: self.server)
        self.stack.callback(self._watcher.stop)
        began = time.monotonic()
        until(lambda: self._watcher.since(began, 1.0, lambda sample: sample.all_work) is not None)

    def lead_all_by_proxy(self) -> None:
        """Let the enqueuing processes connect through a proxy as well; call it before `begin`."""
        self.load_proxy = self._proxy()

    def hold_each(self) -> None:
        """Give each worker a task that it holds until the end, to measure when another worker takes it."""
        query = """
            SELECT number, row_number() OVER (PARTITION BY worker_id ORDER BY number), state FROM (
                SELECT (data->>'number')::bigint AS number, worker_id, state FROM tasks
                WHERE type = 'hold' AND state IN ('pending', 'running')
            ) AS holds
        """
        held: list[Any] = []
        deadline = time.monotonic() + PATIENCE
        while len(held) < WORKERS:
            if time.monotonic() > deadline:
                raise TimeoutError(f"not every worker has claimed a task to hold in {PATIENCE:g} s")
            self._hold(1)
            until(lambda: all(state == "running" for _, _, state in self.ask(query)))
            # Tasks of a worker that already has one are released.
            rows = self.ask(query)
            held = [number for number, place, _ in rows if place == 1]
            self._release([number for number, place, _ in rows if place > 1])

    def release_all(self) -> None:
        """Let all held tasks end."""
        self._release(self._held)
        self._held = []

    def strike(self, worker: Worker, act: Callable[[], object]) -> float:
        """Make a fault of a worker, and watch when its tasks run again; return the time of the fault."""
        query = "SELECT id FROM apoq_workers WHERE pid = %s ORDER BY started_at DESC LIMIT 1"
        found = self.ask(query, worker.process.pid)
        act()
        now = time.monotonic()
        if found:
            query = "SELECT id, claim_token FROM apoq_tasks WHERE state = 'running' AND worker_id = %s"
            held = self.ask(query, found[0][0])
            self._watcher.victims.append(Victim(now, [row[0] for row in held], [row[1] for row in held]))
        return now

    @property
    def rescued(self) -> int:
        """The number of tasks that were rescued from workers that counted as dead."""
        found: int = self.ask("SELECT coalesce(sum(rescue_count), 0)::bigint FROM tasks")[0][0]
        return found

    @property
    def struck(self) -> int:
        """The number of tasks that the victims held."""
        return sum(len(victim.ids) for victim in self._watcher.victims)

    def replace(self, worker: Worker) -> None:
        """Start a new process in place of a worker's, as a supervisor would."""
        worker.process = self._new_worker(worker.proxy, worker.settings)

    def await_recovery(self, since: float) -> None:
        """Wait until the victims' tasks run elsewhere and the load is at full speed, and record the times."""
        deadline = time.monotonic() + PATIENCE
        full = all_work = None
        while full is None or all_work is None or self._watcher.left:
            if time.monotonic() > deadline:
                self._log_state("not recovered in time")
                break
            time.sleep(0.1)
            full = self._watcher.since(since, STEADY, lambda sample: sample.is_full)
            all_work = self._watcher.since(since, STEADY, lambda sample: sample.all_work)
        self.full_speed.append(full)
        self.all_work.append(all_work)

    def log(self, what: str) -> None:
        """Write a line to a log in the folder of the workers' logs."""
        with (self._folder / "faults.log").open("a") as file:
            file.write(f"{time.strftime('%X')} {what}\n")

    def _log_state(self, what: str) -> None:
        """Log the unfinished tasks, and write the workers' stacks to files next to their logs."""
        self.log(f"{what}: {self.ask(UNFINISHED)}")
        for worker in self.workers:
            worker.process.send(signal.SIGUSR1)
        time.sleep(0.2)

    def finish(self) -> dict[str, Any]:
        """Stop the load, let the workers finish all tasks, and count."""
        for offerer in self._offerers:
            offerer.say("stop")
        for offerer in self._offerers:
            offerer.receive()
        self.release_all()
        self._end_all()
        found = self._count()
        elsewhere = [victim.seconds for victim in self._watcher.victims]
        return {
            **found,
            **self._expected,
            "overshot": max(0, self._watcher.most_of_key - MAX_OF_KEY),
            "elsewhere": None if not elsewhere else _longest(elsewhere),
            "full_speed": _longest(self.full_speed),
            "all_work": _longest(self.all_work),
            "slots": self._working_slots(),
            "limits": self.limits,
        }

    def _end_all(self) -> None:
        unfinished = "SELECT count(*) FROM tasks WHERE state IN ('pending', 'waiting', 'running')"
        with suppress(TimeoutError):
            until(lambda: self.ask(unfinished)[0][0] == 0, PATIENCE)

    def _working_slots(self) -> int:
        """Return how many slots can still run a task: none may hang for ever."""
        running = "SELECT count(*) FROM tasks WHERE type = 'hold' AND state = 'running'"
        self._hold(SLOTS)
        with suppress(TimeoutError):
            until(lambda: self.ask(running)[0][0] == SLOTS, 15)
        found: int = self.ask(running)[0][0]
        if found < SLOTS:
            self._log_state("not all slots work")
        return found

    def add(self, type_: str, count: int, *, padding: str = "", priority: int = 0) -> range:
        """Add tasks at once, in addition to the steady load, and return their numbers."""
        numbers = range(self._offered, self._offered + count)
        self._offered += count
        query = """
            INSERT INTO apoq_tasks (type, data, priority)
            SELECT %s, jsonb_build_object('number', number, 'padding', %s::text), %s
            FROM generate_series(%s::bigint, %s) AS number
        """
        with self.server.admin(self.name) as admin:
            admin.execute(query, (type_, padding, priority, numbers[0], numbers[-1]))
        return numbers

    def expect(self, what: str, found: float, *, at_most: float) -> None:
        """Add a count, with its maximum, that only this scenario has."""
        self._expected[what] = found
        self.limits[what] = at_most

    def _hold(self, count: int) -> None:
        self._held += self.add("hold", count, priority=1)

    def _release(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            (self._folder / f"release-{number}").touch()

    def _count(self) -> dict[str, Any]:
        with self.server.admin(self.name) as admin:
            admin.execute("CREATE TABLE offered (number bigint, sure boolean)")
            admin.execute("SET work_mem = '256MB'")  # so that NOT IN uses a hash table
            with admin.cursor() as cursor, cursor.copy("COPY offered FROM STDIN") as copy:
                for number in range(self._offered):
                    copy.write_row((number, True))
                for path in [*self._folder.glob("sure-*"), *self._folder.glob("unsure-*")]:
                    for number in array("q", path.read_bytes()):
                        copy.write_row((number, path.name.startswith("sure")))
            cursor = admin.execute(FOUND)
            row = cursor.fetchone()
            assert row is not None
            assert cursor.description is not None
            return dict(zip((column.name for column in cursor.description), row, strict=True))

    def _proxy(self, speed: float = math.inf) -> Proxy:
        proxy = Proxy(self.server.port, speed)
        self.stack.callback(proxy.close)
        return proxy

    def _new_worker(self, proxy: Proxy | None, settings: dict[str, Any]) -> Process:
        url = self.server.url(self.name, proxy.port if proxy else self.pooler_port)
        direct = self.server.url(self.name) if self.pooler_port else None
        return self._start("work", url=url, direct=direct, folder=str(self._folder), **settings)

    def _start(self, role: str, **task: Any) -> Process:
        self._begun += 1
        process = Process(role, log=str(self._folder / f"{self._begun:02}-{role}.log"), **task)
        self.stack.push(process)
        # Killed in any state, because the counts are complete.
        self.stack.callback(process.send, signal.SIGKILL)
        return process

    def ask(self, query: str, *parameters: object) -> list[Any]:
        """Execute a query as the superuser, and return its rows."""
        with self.server.admin(self.name) as admin:
            return admin.execute(query, parameters or None).fetchall()


def _longest(seconds: list[float | None]) -> float | None:
    """Return the longest of these times; infinity if one of them is None, because it never ended."""
    return max((float("inf") if one is None else one for one in seconds), default=None)
