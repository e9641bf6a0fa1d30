"""Worker processes that leak, and are replaced when they use too much memory."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import prepare
from benchmarks.child import memory
from chaos.leaking import frees, leaks, queue
from chaos.scenarios import SCENARIOS, Options, Scenario
from chaos.server import Place, Server

TASKS: Final = 10_000
PROCESSES: Final = 4
CONCURRENCY: Final = 2
MAX_MEMORY: Final = "1G"

PATIENCE: Final = 900.0
ROOT: Final = Path(__file__).parent.parent

FOUND: Final = """
    SELECT count(*) FILTER (WHERE state = 'completed') AS completed,
        count(*) FILTER (WHERE state = 'failed') AS failed,
        count(*) FILTER (WHERE state NOT IN ('completed', 'failed')) AS lost,
        coalesce(sum(attempt - 1) FILTER (WHERE state = 'completed'), 0)::bigint AS wasted,
        coalesce(sum(fail_count), 0)::bigint AS failures,
        coalesce(sum(rescue_count), 0)::bigint AS rescued,
        0.8 * count(*) / extract(
            epoch FROM percentile_disc(0.9) WITHIN GROUP (ORDER BY completed_at)
            - percentile_disc(0.1) WITHIN GROUP (ORDER BY completed_at)
        )::float AS rate
    FROM apoq_tasks WHERE type = %s
"""
"""The rate is that of four fifths of the tasks, without the start and the end of the program."""


def recycling(_place: Place, server: Server, folder: Path, options: Options) -> dict[str, Any]:
    """Run tasks that leak their memory, with a limit, and before and after them tasks that free it."""
    count = TASKS // 10 if options.is_quick else TASKS
    folder.mkdir(parents=True, exist_ok=True)
    with server.admin() as admin:
        admin.execute("CREATE DATABASE recycling OWNER app")
    engine = sa.create_engine(server.url("recycling"))
    prepare(engine)
    before = _Run(server, folder / "before.log", engine, "frees", count // 4)
    limited = _Run(server, folder / "limited.log", engine, "leaks", count, "--max-memory", MAX_MEMORY)
    after = _Run(server, folder / "after.log", engine, "frees", count // 4)
    engine.dispose()
    rate, usual = limited.found.pop("rate"), (before.found["rate"] + after.found["rate"]) / 2
    recyclings = len(re.findall("is replaced by its successor", limited.log))
    figures = {
        f"rate lost to {recyclings} recyclings, of {usual:.0f} tasks/s, in %": 100 * (1 - rate / usual),
        "errors in the log": len(re.findall(r" ERROR \[", limited.log)),
        "growth of the supervisor's descriptors": limited.descriptors[-1] - limited.descriptors[0],
        "memory of a process, in MB": limited.most_memory,
    }
    at_most = dict(zip(figures, (20.0, 0, 8, math.inf), strict=True))
    at_most |= {"lost": 0, "failed": 0, "wasted": 0, "failures": 0, "rescued": 0}
    lost = count - limited.found["completed"] - limited.found["failed"]
    return {**limited.found, "offered": count, "lost": lost, **figures, "limits": at_most}


class _Run:
    """The tasks of one type, run by an `apoq worker` with several processes."""

    def __init__(
        self, server: Server, log: Path, engine: sa.Engine, type_: str, count: int, *more: str
    ) -> None:
        typed = {"leaks": leaks, "frees": frees}[type_]
        with Session(engine) as session, session.begin():
            session.execute(sa.text("TRUNCATE apoq_tasks"))
            queue.add_many(session, typed.type, [{}] * count)
        options = ["--processes", str(PROCESSES), "--concurrency", str(CONCURRENCY), *more]
        command = [sys.executable, "-m", "apoq", "worker", "chaos.leaking:queue", *options]
        command += ["--database-url", server.url("recycling")]
        self.most_memory = 0.0
        self.descriptors: list[int] = []
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
            try:
                deadline = time.monotonic() + PATIENCE
                while time.monotonic() < deadline and not self._is_over(server, type_):
                    self._look_at(process.pid)
                    time.sleep(0.5)
                process.send_signal(signal.SIGTERM)
                code = process.wait(60)
            finally:
                process.kill()
                process.wait()
        self.log = log.read_text()
        if code:
            raise RuntimeError(f"the worker ended with {code}: {self.log[-1000:]}")
        self.found = self._count(server, type_)

    def _count(self, server: Server, type_: str) -> dict[str, Any]:
        with server.admin("recycling") as admin:
            cursor = admin.execute(FOUND, (type_,))
            row = cursor.fetchone()
            assert row is not None
            assert cursor.description is not None
            return dict(zip((column.name for column in cursor.description), row, strict=True))

    def _is_over(self, server: Server, type_: str) -> bool:
        return bool(self._count(server, type_)["lost"] == 0)

    def _look_at(self, pid: int) -> None:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in children:
            try:
                self.most_memory = max(self.most_memory, memory(int(child)))
            except (OSError, ValueError, StopIteration):
                continue  # it has just ended
        if len(children) >= PROCESSES:
            self.descriptors.append(len(list(Path(f"/proc/{pid}/fd").iterdir())))


SCENARIOS["recycling"] = Scenario(
    "Worker processes that leak 5 MB per task are replaced, and keep four fifths of their rate.",
    recycling,
    is_default=False,
)
