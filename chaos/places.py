"""Places under limits, while workers are killed and callers change tasks and limits."""

from __future__ import annotations

import random
import signal
import struct
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import Queue, Task
from apoq.core.states import FINAL
from chaos.child import PLACED_EVENT
from chaos.scenarios import SCENARIOS, Options, Scenario
from chaos.server import DEFAULT_CONNECTIONS, Place, Server
from chaos.stage import Stage
from chaos.watcher import MAX_OF_KEY

WORKERS: Final = 6
LEASE_SECONDS: Final = 2.0

KEYS: Final = (5, 200, 15_000)
TASKS: Final = 20_000
"""Tasks of each number of keys."""

SECONDS: Final = 300.0
"""Seconds within which they must end, with all kills."""

KILL_SECONDS: Final = 3.0
"""Seconds from one kill to the next."""

KILLS: Final = 6
"""Kills for each number of keys, at most."""

MEDDLING_SECONDS: Final = 0.01
"""Seconds between two changes by callers."""

CROWDED: Final = """
    SELECT key, count(*) FROM apoq_tasks
    WHERE queue = 'default' AND type = 'placed' AND key IS NOT NULL AND indexed_state IS NULL
        AND state = 'running'
    GROUP BY key HAVING count(*) > %s
"""
"""The keys of which too many tasks are running, according to the database."""

PRUNE: Final = sa.text("""
    DELETE FROM apoq_tasks WHERE id IN (
        SELECT id FROM apoq_tasks WHERE type = 'placed' AND indexed_state = 'completed' LIMIT 20
    )
""")


def places(place: Place, _server: Server, folder: Path, options: Options) -> dict[str, Any]:
    """Run tasks of few keys, of some, and of many, on a server with PostgreSQL's default settings."""
    server = Server(place, place.folder / "places", max_connections=DEFAULT_CONNECTIONS).create()
    with Stage(server, "places", folder, 20) as stage:
        stage.begin(workers=[{"lease": LEASE_SECONDS}] * WORKERS)
        wrong: Counter[str] = Counter()
        for keys in KEYS:
            wrong.update(_run(stage, folder, keys, options))
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        wrong["deadlocks"] = stage.ask(deadlocks)[0][0]
        logs = "".join(path.read_text() for path in folder.glob("*-work.log"))
        wrong["out_of_shared_memory"] = logs.count("out of shared memory")
        for what in ("crowded", "began_early", "not_ended", "held", "deadlocks", "out_of_shared_memory"):
            stage.expect(f"places_{what}", wrong[what], at_most=0)
        with server.admin(stage.name) as admin:
            admin.execute("DELETE FROM apoq_tasks WHERE type = 'placed'")
        stage.log("the tasks with places have ended")
        stage.await_recovery(time.monotonic())
        return stage.finish()


def _run(stage: Stage, folder: Path, keys: int, options: Options) -> Counter[str]:
    """Run tasks of so many keys, with kills and changes; count what is wrong."""
    url = stage.server.url(stage.name)
    engine, queue = sa.create_engine(url), Queue()
    with Session(engine) as session, session.begin():
        items = [{"key": number % keys} for number in range(TASKS)]
        queue.add_many(session, "placed", items, key=lambda item: str(item["key"]))
        ids = list(session.scalars(sa.select(Task.id).where(Task.type == "placed")))
    monitor, meddler = _Monitor(stage), _Meddler(engine, queue, ids, keys, options.seed)
    monitor.start()
    meddler.start()
    left = sa.select(sa.func.count()).where(Task.type == "placed", Task.state.not_in(FINAL))
    deadline, kills = time.monotonic() + SECONDS, 0
    next_kill = time.monotonic() + 1.0
    while (count := _scalar(engine, left)) and time.monotonic() < deadline:
        time.sleep(0.1)
        if kills < KILLS and time.monotonic() > next_kill:
            worker = stage.workers[kills % len(stage.workers)]
            worker.process.send(signal.SIGKILL)
            stage.replace(worker)
            kills, next_kill = kills + 1, time.monotonic() + KILL_SECONDS
        if meddler.is_alive() and (kills == KILLS or count < TASKS // 4):
            meddler.end()
    meddler.end()
    monitor.end()
    held = sa.select(sa.func.count()).where(Task.type == "placed", Task.held_key.is_not(None))
    found = Counter(
        crowded=monitor.crowded,
        began_early=_began_early(folder),
        not_ended=_scalar(engine, left),
        held=_scalar(engine, held),
    )
    stage.log(f"{keys} keys: {kills} kills, {meddler.changes} changes, {monitor.looks} looks: {dict(found)}")
    engine.dispose()
    return found


def _scalar(engine: sa.Engine, query: sa.Select[Any]) -> int:
    with engine.connect() as connection:
        found: int = connection.execute(query).scalar_one()
    return found


class _Monitor(threading.Thread):
    """Looks again and again for keys of which too many tasks are running, each time as a new client."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(daemon=True)
        self.crowded = 0
        self.looks = 0
        self._stage = stage
        self._ends = threading.Event()

    def run(self) -> None:
        while not self._ends.wait(0.005):
            self.crowded += len(self._stage.ask(CROWDED, MAX_OF_KEY))
            self.looks += 1

    def end(self) -> None:
        self._ends.set()
        self.join()


class _Meddler(threading.Thread):
    """Cancels, retries, deletes and prunes tasks, and changes limits, like callers and operators."""

    def __init__(self, engine: sa.Engine, queue: Queue, ids: list[int], keys: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.changes = 0
        self._engine = engine
        self._queue = queue
        self._ids = ids
        self._keys = keys
        self._rng = random.Random(f"{seed} {keys}")  # noqa: S311 - no secret
        self._ends = threading.Event()

    def run(self) -> None:
        rng, queue = self._rng, self._queue
        while not self._ends.wait(MEDDLING_SECONDS):
            task_id, key = rng.choice(self._ids), str(rng.randrange(self._keys))
            with Session(self._engine) as session, session.begin():
                match rng.randrange(5):
                    case 0:
                        queue.cancel(session, task_id)
                    case 1:
                        queue.retry(session, task_id)
                    case 2:
                        session.execute(sa.delete(Task).where(Task.id == task_id))
                    case 3:
                        session.execute(PRUNE)
                    case _:
                        queue.limit(session, rng.choice([0, 1, 2, None]), key=key)
            self.changes += 1

    def end(self) -> None:
        """End, and remove the limits that were set."""
        if self._ends.is_set():
            return
        self._ends.set()
        self.join()
        with Session(self._engine) as session, session.begin():
            for limit in self._queue.limits(session):
                if limit.key is not None:
                    self._queue.limit(session, None, key=limit.key)


def _began_early(folder: Path) -> int:
    """Count the attempts that began while as many of their key were running, according to the processors.

    An attempt whose worker was killed counts as ended when it began, because nobody has noted its end.
    """
    spans: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
    for path in folder.glob("placed-*"):
        begun: dict[tuple[int, int], float] = {}
        content = path.read_bytes()
        whole = content[: len(content) - len(content) % struct.calcsize(PLACED_EVENT)]
        for key, task_id, at, is_end in struct.iter_unpack(PLACED_EVENT, whole):
            if not is_end:
                begun[key, task_id] = at
            elif (since := begun.pop((key, task_id), None)) is not None:
                spans[key] += [(since, 1), (at, -1)]
    early = 0
    for events in spans.values():
        running = 0
        for _, change in sorted(events):  # at the same time, ends come first
            running += change
            early += change > 0 and running > MAX_OF_KEY
    return early


SCENARIOS["places"] = Scenario(
    "Workers are killed, and callers change tasks and limits, under limits.", places
)
