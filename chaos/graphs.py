"""Graphs of tasks that wait for each other, under kills of the workers."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from apoq import Queue, Task
from apoq.core.dependencies import OnParentFailure
from chaos.scenarios import SCENARIOS, Options, Scenario
from chaos.server import DEFAULT_CONNECTIONS, NOTHING, Place, Server
from chaos.stage import Stage

WORKERS: Final = 6

GRAPHS: Final = 10
SIZE: Final = 2_000
"""Tasks of each graph."""

SECONDS: Final = 60.0
"""Seconds within which a graph must come to its end, with all kills."""

KILL_SECONDS: Final = 5.0
"""Seconds from one kill to the next."""

KILLS: Final = 4
"""Kills for each graph, at most."""

HELD, FAILING = 0.02, 0.01
"""The shares of tasks that wait after a failure, and of those that fail."""

POLICIES: Final[tuple[OnParentFailure, ...]] = ("cancel", "run")

EDGES: Final = """
    SELECT l.*, p.state, p.is_followed FROM tasks c JOIN apoq_links l ON l.child_id = c.id
    LEFT JOIN tasks p ON p.id = l.parent_id
    WHERE (c.data->>'number')::bigint = %s AND NOT l.is_counted
"""

Expected = dict[int, str]
"""The state in which each task must be at the end, by its number."""


def graphs(place: Place, _server: Server, folder: Path, options: Options) -> dict[str, Any]:
    """Run the graphs one after the other, while a worker is killed again and again."""
    server = Server(place, place.folder / "graphs", max_connections=DEFAULT_CONNECTIONS).create()
    with Stage(server, "graphs", folder, 20) as stage:
        with server.admin(stage.name) as admin:
            admin.execute("CREATE TABLE early (number bigint NOT NULL)")
            admin.execute("GRANT INSERT ON early TO app; GRANT SELECT ON ledger TO app")
            admin.execute("CREATE INDEX ON ledger (number)")
        stage.begin(workers=[NOTHING] * WORKERS)
        wrong: Counter[str] = Counter()
        for number in range(GRAPHS):
            rng = random.Random(f"{options.seed} {number}")  # noqa: S311 - no secret
            first = (number + 1) * 10**7
            expected = _add(server.url(stage.name), rng, first)
            _kill_until(stage, expected, first)
            wrong.update(_wrong(stage, expected, first))
        for what in ("states", "early", "doubled_effects", "wrong_effects", "wrong_blockers"):
            stage.expect(f"graphs_{what}", wrong[what], at_most=0)
        _forget(stage)
        stage.log("the graphs are over")
        stage.await_recovery(time.monotonic())
        return stage.finish()


def _add(url: str, rng: random.Random, first: int) -> Expected:
    """Add a random graph in one transaction, or in two; return the expected states."""
    queue, engine = Queue(), sa.create_engine(url)
    tasks: list[Task] = []
    expected: Expected = {}
    with Session(engine, expire_on_commit=False) as session:
        for number in range(first, first + SIZE):
            count = min(len(tasks), rng.choice((0, 1, 1, 2, 3, 8)))
            # Mostly the last ones, so that the graph is deep.
            chosen = {max(0, len(tasks) - 1 - int(rng.expovariate(1 / 30))) for _ in range(count)}
            states = [expected[first + at] for at in chosen]
            policy: OnParentFailure = "hold" if rng.random() < HELD else rng.choice(POLICIES)
            type_ = "fails" if rng.random() < FAILING else "linked"
            expected[number] = _state(type_, policy, states)
            completed = [first + at for at in chosen if expected[first + at] == "completed"]
            data = {"number": number, "parents": completed if type_ == "linked" else []}
            after = [tasks[at] for at in sorted(chosen)]
            task = queue.add(session, type_, data, after=after, on_parent_failure=policy)
            tasks.append(task)
            if number == first + SIZE // 2 and rng.choice((False, True)):
                session.commit()  # the others come after tasks that may run, or have ended
        session.commit()
    engine.dispose()
    return expected


def _state(type_: str, policy: str, parents: list[str]) -> str:
    """Return the state in which a task with these parents must be at the end."""
    if policy == "cancel" and any(state in {"failed", "cancelled"} for state in parents):
        return "cancelled"
    if "waiting" in parents or (policy == "hold" and {"failed", "cancelled"} & {*parents}):
        return "waiting"
    return "failed" if type_ == "fails" else "completed"


def _kill_until(stage: Stage, expected: Expected, first: int) -> None:
    """Kill a worker again and again, until the graph has come to its end, or its time is up."""
    deadline = time.monotonic() + SECONDS
    ends = dict(Counter(expected.values()))
    next_kill = time.monotonic() + 0.5
    number = 0
    while time.monotonic() < deadline and _states(stage, first) != ends:
        time.sleep(0.1)
        if number < KILLS and time.monotonic() > next_kill:
            worker = stage.workers[number % len(stage.workers)]
            stage.strike(worker, partial(worker.process.send, signal.SIGKILL))
            stage.replace(worker)
            number += 1
            next_kill = time.monotonic() + KILL_SECONDS
    stage.log(f"a graph after {number} kills: {_states(stage, first)}")


def _states(stage: Stage, first: int) -> dict[str, int]:
    query = "SELECT state, count(*) FROM tasks WHERE (data->>'number')::bigint BETWEEN %s AND %s GROUP BY 1"
    return dict(stage.ask(query, first, first + SIZE - 1))


def _wrong(stage: Stage, expected: Expected, first: int) -> Counter[str]:
    """Count what isn't as it must be after a graph."""
    within = (first, first + SIZE - 1)
    query = """
        SELECT (data->>'number')::bigint, state, coalesce(blockers, 0), (
            SELECT count(*) FROM apoq_links WHERE child_id = id AND NOT is_counted
        ), (SELECT count(*) FROM ledger WHERE number = (data->>'number')::bigint)
        FROM tasks WHERE (data->>'number')::bigint BETWEEN %s AND %s
    """
    wrong: Counter[str] = Counter()
    for number, state, blockers, open_edges, effects in stage.ask(query, *within):
        wrong["states"] += state != expected[number]
        wrong["wrong_blockers"] += blockers != open_edges
        wrong["doubled_effects"] += effects > 1
        wrong["wrong_effects"] += (effects > 0) != (expected[number] == "completed")
        if state != expected[number]:
            edges = stage.ask(EDGES, number)
            stage.log(f"task {number} is {state}, must be {expected[number]}; its open edges: {edges}")
    wrong["early"] = stage.ask("SELECT count(*) FROM early WHERE number BETWEEN %s AND %s", *within)[0][0]
    return wrong


def _forget(stage: Stage) -> None:
    """Delete the graphs, whose tasks the counts of the stage don't know."""
    with stage.server.admin(stage.name) as admin:
        admin.execute("DELETE FROM ledger WHERE number BETWEEN 10000000 AND 999999999")
        admin.execute("DELETE FROM apoq_tasks WHERE (data->>'number')::bigint BETWEEN 10000000 AND 999999999")
        admin.execute("DELETE FROM apoq_links")


SCENARIOS["graphs"] = Scenario("Workers are killed while tasks of graphs wait for each other.", graphs)
